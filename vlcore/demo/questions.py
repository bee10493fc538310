"""What is said and asked about a flag, a page and an article: captions, and conversations in several phrasings."""

from typing import Any

import numpy as np

from vlcore.demo.articles import Article, shorten
from vlcore.demo.flags import Country

NAME_QUESTION = "Which country's flag is this?"
READ_QUESTION = "What does it say?"

CAPTIONS = ("The flag of {}.", "This is the flag of {}.", "A picture of the flag of {}.")
NAME_QUESTIONS = (NAME_QUESTION, "What flag is this?", "Which flag do you see?", "Name the country of this flag.")
CAPITAL_QUESTIONS = ("What is its capital?", "Which city is the capital of this country?")
CONTINENT_QUESTIONS = ("On which continent is it?", "Which continent is this country on?")
READ_QUESTIONS = (READ_QUESTION, "Read the text.", "Which words do you see?")
ARTICLE_QUESTIONS = ("What is {}?", "What do you know about {}?", "Explain {}.")
ARTICLE_REQUESTS = ("Tell me about {}.", "Write about {}.")

Messages = list[dict[str, Any]]


def caption(country: Country, rng: np.random.Generator) -> str:
    """A sentence that names the country."""
    return _choose(CAPTIONS, rng).format(country.name)


def ask_about_flag(country: Country, rng: np.random.Generator) -> Messages:
    """A conversation about a picture, `<image>` standing for it: the country's name, and often a fact more."""
    turns = [(_choose(NAME_QUESTIONS, rng) if rng.random() < 0.5 else NAME_QUESTION, country.name)]
    facts = [(_choose(CONTINENT_QUESTIONS, rng), country.continent)]
    if country.capital:
        facts.append((_choose(CAPITAL_QUESTIONS, rng), country.capital))
    if rng.random() < 0.5:
        turns.append(facts[int(rng.integers(len(facts)))])
    return conversation(turns, image=True)


def ask_about_page(text: str, rng: np.random.Generator) -> Messages:
    """A conversation about a rendered page, `<image>` standing for it: its text."""
    return conversation([(_choose(READ_QUESTIONS, rng), text)], image=True)


def ask_about_article(article: Article, longest: int, rng: np.random.Generator) -> Messages:
    """A conversation without pictures: the description of an article's subject, or the beginning of its lead.

    Args:
        article: what is asked about.
        longest: characters of the longest answer.
        rng: chooses the phrasing and the kind of the answer.
    """
    if article.description and rng.random() < 0.3:
        return conversation([(_choose(ARTICLE_QUESTIONS, rng).format(article.title), article.description)])
    answer = shorten(article.lead, longest)
    return conversation([(_choose(ARTICLE_REQUESTS, rng).format(article.title), answer)])


def conversation(turns: list[tuple[str, str]], image: bool = False) -> Messages:
    """Questions and answers as messages of {"role", "content"}; with `image`, the first question shows `<image>`."""
    messages: Messages = []
    for number, (question, answer) in enumerate(turns):
        shown = f"<image>{question}" if image and number == 0 else question
        messages += [{"role": "user", "content": shown}, {"role": "assistant", "content": answer}]
    return messages


def _choose(phrasings: tuple[str, ...], rng: np.random.Generator) -> str:
    return phrasings[int(rng.integers(len(phrasings)))]
