"""Writes what the demo found: report.json for programs, report.md for people, samples.png for the eye."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vlcore.demo.fetch import Package
from vlcore.demo.flags import HELD_OUT_STYLE
from vlcore.demo.measure import Answer, Measurement

RIGHT, WRONG = (20, 120, 60), (190, 40, 40)
COLUMNS, TILE_WIDTH, TILE_HEIGHT, PICTURE = 6, 190, 190, 96

MEANINGS = {
    "multiple_choice": "share of the flags in the held-out drawing style whose name has the lowest perplexity of four "
    "(chance 0.25)",
    "exact_name": "share of the same flags that the greedy answer names word for word, out of all names",
    "text_perplexity": "a token, on held-out articles",
    "character_accuracy": "1 - edits / letters, reading held-out words by greedy answers",
}


def stage_row(
    name: str, measured: Measurement, seconds: float = 0.0, samples_per_second: float = 0.0
) -> dict[str, Any]:
    """One entry of report.json's "stages"."""
    return {
        "name": name,
        "seconds": round(seconds, 1),
        "samples_per_second": round(samples_per_second, 1),
        **measured.as_dict(),
    }


def describe_data(packages: Sequence[Package], counts: Mapping[str, Mapping[str, int]]) -> dict[str, dict[str, Any]]:
    """{source: version, client, licence, origin, and what was made of it}, the fonts' package included."""
    described: dict[str, dict[str, Any]] = {}
    for package in packages:
        described[package.name] = {
            "version": package.version,
            "client": package.client,
            "licence": package.licence,
            "origin": package.origin,
            "what": package.what,
            "sizes": dict(counts.get(package.name.split("/")[-1], {})),
        }
    described["matplotlib"] = {
        "client": "pip",
        "licence": "Bitstream-Vera",
        "origin": "dejavu-fonts.github.io",
        "what": "the DejaVu fonts that pages are set in",
        "sizes": dict(counts.get("matplotlib", {})),
    }
    return described


def write_report(directory: Path, report: Mapping[str, Any], parameters: int) -> None:
    """Write report.json and report.md.

    Args:
        directory: must exist.
        report: {"seed", "data", "machine", "stages"}, as report.json has it.
        parameters: of the model.
    """
    (directory / "report.json").write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (directory / "report.md").write_text(_markdown(report, parameters), encoding="utf-8")


def _markdown(report: Mapping[str, Any], parameters: int) -> str:
    keys = ["seconds", "samples_per_second", *MEANINGS]
    stages = [[row["name"], *(row[key] for key in keys)] for row in report["stages"]]
    sources = [_source_row(name, entry) for name, entry in report["data"].items()]
    lines = [
        "# The demo's report",
        "",
        f"A DeepSeek-VL of {parameters / 1e6:.1f} million parameters with the hybrid encoder, trained through the",
        f"three stages from random weights (seed {report['seed']}). The towers start random too, since no pretrained",
        "ones come in a package; therefore stage 3 trains everything.",
        "",
        _table(["stage", *map(_words, keys)], stages),
        "",
        *(f"- **{_words(key)}**: {meaning}." for key, meaning in MEANINGS.items()),
        "",
        f"Nothing of the drawing style `{HELD_OUT_STYLE}` was trained on. Seconds are those of training; measuring is",
        "not counted.",
        "",
        "![loss](loss.png)",
        "",
        "![held-out pictures with answers](samples.png)",
        "",
        "## Machine",
        "",
        *(f"- {key}: {value}" for key, value in report["machine"].items()),
        "",
        "## Data",
        "",
        _table(["source", "what", "sizes", "licence", "origin"], sources),
        "",
    ]
    return "\n".join(lines)


def _words(key: str) -> str:
    return key.replace("_", " ")


def _source_row(name: str, entry: Mapping[str, Any]) -> list[str]:
    sizes = ", ".join(f"{count} {_words(what)}" for what, count in entry["sizes"].items() if count)
    return [f"{name} {entry.get('version', '')}".strip(), entry["what"], sizes, entry["licence"], entry["origin"]]


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def draw_samples(groups: Sequence[Sequence[Answer]], path: Path, *, tiles: Sequence[int], seed: int) -> None:
    """A sheet of held-out pictures, each with its question, what is right, and the answer, green where it is right.

    Args:
        groups: answers of each kind; drawn from at random, and shown in their order.
        path: of the PNG.
        tiles: how many of each kind are shown, or all where there are fewer.
        seed: draws them.
    """
    import matplotlib

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    font = ImageFont.truetype(folder / "DejaVuSans.ttf", 11)
    rng = np.random.default_rng([seed, 5])
    chosen = [
        answers[index]
        for answers, number in zip(groups, tiles, strict=True)
        for index in sorted(rng.permutation(len(answers))[:number])
    ]
    rows = -(-len(chosen) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * TILE_WIDTH, rows * TILE_HEIGHT), "white")
    pen = ImageDraw.Draw(sheet)
    for place, answer in enumerate(chosen):
        row, column = divmod(place, COLUMNS)
        _draw_tile(sheet, pen, font, answer, column * TILE_WIDTH + 8, row * TILE_HEIGHT + 8)
    sheet.save(path)


def _draw_tile(
    sheet: Image.Image, pen: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont, answer: Answer, left: int, top: int
) -> None:
    with Image.open(answer.image) as opened:
        picture = opened.convert("RGB")
    picture.thumbnail((PICTURE, PICTURE))
    sheet.paste(picture, (left, top))
    pen.rectangle((left - 1, top - 1, left + picture.width, top + picture.height), outline=(200, 200, 200))
    color = RIGHT if answer.is_right else WRONG
    shown = [(answer.question, (0, 0, 0)), (f"= {answer.expected}", (110, 110, 110)), (answer.answer, color)]
    for number, (text, ink) in enumerate(shown):
        line = text.strip().split("\n")[0]
        while line and pen.textlength(line, font=font) > TILE_WIDTH - 16:
            line = line.removesuffix("…")[:-1] + "…"
        pen.text((left, top + PICTURE + 8 + 18 * number), line, font=font, fill=ink)
