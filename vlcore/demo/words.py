"""Pages of rendered letters: words of real articles in real fonts, and which of them training never sees."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

PAGE_SIDE = 96
# A page is set like an eye chart, four rows of four: a model this small learns letters before it learns words.
ROW_LETTERS = 4
MOST_LETTERS = ROW_LETTERS**2
CELL = PAGE_SIDE // ROW_LETTERS
FONT_SIZE = 21
BETWEEN_WORDS = "-"

# They come with matplotlib, so that no font has to be installed.
FONT_FILES = ("DejaVuSansMono.ttf", "DejaVuSans-Bold.ttf", "DejaVuSerif.ttf")


def split_words(texts: Iterable[str], held_out: int, rng: np.random.Generator) -> tuple[list[str], list[str]]:
    """The words of three to eight letters in the texts: (those to train on, `held_out` others), shuffled.

    Words that differ in case alone fall on the same side.

    Raises:
        ValueError: the texts have fewer words than are to be held out.
    """
    found = sorted({word for text in texts for word in re.findall(r"\b[A-Za-z]{3,8}\b", text)})
    spellings: dict[str, list[str]] = {}
    for word in found:
        spellings.setdefault(word.lower(), []).append(word)
    groups = [spellings[key] for key in sorted(spellings)]
    if len(groups) <= held_out:
        raise ValueError(f"{held_out} words cannot be held out of {len(groups)}.")
    order = [groups[index] for index in rng.permutation(len(groups))]
    return [word for group in order[held_out:] for word in group], [group[0] for group in order[:held_out]]


def choose_words(words: Sequence[str], rng: np.random.Generator) -> list[str]:
    """Words drawn until the next one has no room on the page."""
    chosen: list[str] = []
    while True:
        word = words[int(rng.integers(len(words)))]
        if len(BETWEEN_WORDS.join([*chosen, word])) > MOST_LETTERS:
            return chosen
        chosen.append(word)


def transcript(words: Sequence[str]) -> str:
    """What a page of these words says, letter by letter: "c a t - d o g"."""
    return " ".join(BETWEEN_WORDS.join(words))


def fonts() -> list[ImageFont.FreeTypeFont]:
    """The fonts that pages are set in."""
    import matplotlib

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    return [ImageFont.truetype(folder / name, FONT_SIZE) for name in FONT_FILES]


def render_page(words: Sequence[str], font: ImageFont.FreeTypeFont) -> Image.Image:
    """A 96 × 96 grey page, dark letters on light ground, each in the middle of a cell of 24 × 24 pixels.

    Raises:
        ValueError: the words and what parts them are more than sixteen letters.
    """
    letters = BETWEEN_WORDS.join(words)
    if len(letters) > MOST_LETTERS:
        raise ValueError(f"The {len(letters)} letters of {letters!r} do not fit on a page of {MOST_LETTERS}.")
    page = Image.new("L", (PAGE_SIDE, PAGE_SIDE), 255)
    pen = ImageDraw.Draw(page)
    for place, letter in enumerate(letters):
        row, column = divmod(place, ROW_LETTERS)
        pen.text(((column + 0.5) * CELL, (row + 0.78) * CELL), letter, font=font, fill=0, anchor="ms")
    return page
