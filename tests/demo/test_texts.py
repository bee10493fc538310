"""Words, pages, articles and the questions about them."""

import json

import numpy as np
import pytest

from vlcore.demo import articles, questions, words
from vlcore.demo.articles import Article
from vlcore.demo.flags import Country

FRANCE = Country("fr", "France", "Paris", "Europe")
NOWHERE = Country("aq", "Antarctica", "", "Antarctica")


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_held_out_words_are_apart_from_the_others_whatever_their_case():
    texts = ["The cat met the Cat, and a dog saw THE incomprehensible bird sit; one more word here."]
    kept, held_out = words.split_words(texts, 4, rng())
    assert len(held_out) == 4
    assert not {word.lower() for word in kept} & {word.lower() for word in held_out}
    assert all(3 <= len(word) <= 8 for word in kept + held_out)
    assert words.split_words(texts, 4, rng()) == (kept, held_out)


def test_too_few_words_are_refused():
    with pytest.raises(ValueError, match="5 words cannot be held out of 2"):
        words.split_words(["one two"], 5, rng())


def test_chosen_words_fill_a_page_and_no_more():
    for seed in range(30):
        chosen = words.choose_words(["cat", "horse", "elephant"], rng(seed))
        assert chosen and len("-".join(chosen)) <= words.MOST_LETTERS


def test_a_page_shows_each_letter_in_its_cell():
    page = np.asarray(words.render_page(["cat", "dog"], words.fonts()[0]))
    assert page.shape == (96, 96) and page.dtype == np.uint8
    inked = (page.reshape(4, 24, 4, 24) < 128).any(axis=(1, 3))
    assert inked.ravel().tolist() == [True] * 7 + [False] * 9
    assert words.transcript(["cat", "dog"]) == "c a t - d o g"


def test_every_letter_fits_into_its_cell_in_every_font():
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
    for font in words.fonts():
        for letter in letters:
            left, top, right, bottom = font.getbbox(letter, anchor="ms")
            assert right - left <= words.CELL + 2 and top + 0.78 * words.CELL >= -1 and bottom <= 0.22 * words.CELL + 2


def test_more_letters_than_cells_are_refused():
    with pytest.raises(ValueError, match="17 letters of 'elephant-elephant' do not fit on a page of 16"):
        words.render_page(["elephant", "elephant"], words.fonts()[0])


def test_articles_are_read_by_title_and_blanks_made_one(tmp_path):
    path = tmp_path / "summaries.json"
    entries = {
        "B": {"title": "B", "extract": "B is  a\nletter.", "description": None},
        "A": {"title": "A", "extract": "A."},
    }
    path.write_text(json.dumps(entries | {"C": {"title": "C", "extract": "  "}}))
    assert articles.read_articles(path) == [Article("A", "A.", ""), Article("B", "B is a letter.", "")]


def test_articles_are_held_out_once():
    all_of_them = [Article(str(number), "x", "") for number in range(20)]
    kept, held_out = articles.split_articles(all_of_them, 5, rng())
    assert len(held_out) == 5 and sorted(kept + held_out, key=lambda a: int(a.title)) == all_of_them
    with pytest.raises(ValueError, match="20 articles cannot be held out of 20"):
        articles.split_articles(all_of_them, 20, rng())


@pytest.mark.parametrize(
    "longest, expected",
    [
        (100, "One two. Three 3.5 four! Five."),
        (28, "One two. Three 3.5 four!"),
        (24, "One two. Three 3.5 four!"),
        (23, "One two."),
        (6, "One"),
    ],
)
def test_texts_are_cut_at_sentences_and_otherwise_at_words(longest, expected):
    assert articles.shorten("One two. Three 3.5 four! Five.", longest) == expected


def test_a_flag_is_asked_about_first_and_a_fact_follows_sometimes():
    lengths = set()
    for seed in range(40):
        messages = questions.ask_about_flag(FRANCE, rng(seed))
        assert [message["role"] for message in messages] == ["user", "assistant"] * (len(messages) // 2)
        assert messages[0]["content"].startswith("<image>") and messages[1]["content"] == "France"
        assert all("<image>" not in message["content"] for message in messages[1:])
        if len(messages) == 4:
            assert messages[3]["content"] in ("Paris", "Europe")
        lengths.add(len(messages))
    assert lengths == {2, 4}


def test_no_capital_is_asked_for_where_there_is_none():
    for seed in range(40):
        answers = [message["content"] for message in questions.ask_about_flag(NOWHERE, rng(seed))[1::2]]
        assert set(answers) == {"Antarctica"}


def test_captions_and_pages_and_articles():
    assert "France" in questions.caption(FRANCE, rng())
    page = questions.ask_about_page("c a t", rng())
    assert page[0]["content"].startswith("<image>") and page[1]["content"] == "c a t"
    article = Article("Cat", "A cat is an animal. It sleeps.", "Small animal")
    answers = {questions.ask_about_article(article, 20, rng(seed))[1]["content"] for seed in range(40)}
    assert answers == {"Small animal", "A cat is an animal."}
    without = Article("Cat", "A cat is an animal.", "")
    assert {questions.ask_about_article(without, 20, rng(s))[1]["content"] for s in range(20)} == {
        "A cat is an animal."
    }
