"""Flags of the world in nine drawings: who drew what, and one drawing as a picture."""

import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

HELD_OUT_STYLE = "openmoji"
PICTURE_SIDE = 96

PACKAGE_OF_STYLE = {
    "circle-flags": "circle-flags",
    "flag-icons-4x3": "flag",
    "flag-icons-1x1": "flag",
    "flagpack": "flagpack",
    "coreui": "cif",
    "emojione": "emojione",
    "emojione-v1": "emojione-v1",
    "twemoji": "twemoji",
    HELD_OUT_STYLE: "openmoji",
}

# The drawings give these the flag of the state that they belong to, so no picture could tell them from it.
WITHOUT_OWN_FLAG = frozenset({"bl", "bq", "gf", "gp", "mf", "pm", "re", "sh", "sj", "um", "wf", "yt"})

# Emoji One was named before these countries were renamed; the keys are today's names in Twemoji.
EMOJI_ONE_NAMES = {
    "cocos-keeling-islands": "cocos-islands",
    "eswatini": "swaziland",
    "macao-sar-china": "macau-sar-china",
    "myanmar-burma": "myanmar",
    "north-macedonia": "macedonia",
    "turkiye": "turkey",
}

# Found by comparing the styles with each other: another state's flag, or a language's, under the country's code.
WRONG_DRAWINGS = frozenset(
    {
        ("circle-flags", "ar"),
        ("circle-flags", "ie"),
        ("circle-flags", "la"),
        ("coreui", "gn"),
        ("flagpack", "mq"),
        ("flagpack", "nc"),
    }
)

# Flagpack's "gb" is the flag of England.
FLAGPACK_NAMES = {"gb": "gb-ukm"}


@dataclass(frozen=True)
class Country:
    """A country or territory with a flag of its own. `code` is its ISO 3166-1 code in lower case."""

    code: str
    name: str
    capital: str
    continent: str


def read_countries(path: Path) -> list[Country]:
    """The places of flag-icons' `country.json` that have a two-letter code, a continent and their own flag, by code."""
    entries = json.loads(path.read_text(encoding="utf-8"))
    wanted = [entry for entry in entries if len(entry["code"]) == 2 and entry["code"] not in WITHOUT_OWN_FLAG]
    places = [
        Country(entry["code"], entry["name"], entry.get("capital", ""), entry["continent"])
        for entry in wanted
        if entry.get("continent")
    ]
    return sorted(places, key=lambda place: place.code)


def read_drawings(folders: Mapping[str, Path], codes: list[str]) -> dict[str, dict[str, str]]:
    """{style: {code: SVG document}} of all styles, each without the codes that its artists drew wrong or not at all.

    Args:
        folders: where each package's files lie, by the package's name without its scope.
        codes: of the countries that are wanted.
    """
    emoji = {name: _icon_by_flag(folders[name]) for name in ("twemoji", "openmoji")}

    def emoji_one(code: str) -> str:
        name = emoji["twemoji"].get(code, "").removeprefix("flag-")
        return f"flag-for-{EMOJI_ONE_NAMES.get(name, name)}"

    icon_names: dict[str, Callable[[str], str]] = {
        "flag-icons-4x3": lambda code: f"{code}-4x3",
        "flag-icons-1x1": lambda code: f"{code}-1x1",
        "flagpack": lambda code: FLAGPACK_NAMES.get(code, code),
        "emojione": emoji_one,
        "emojione-v1": emoji_one,
        "twemoji": lambda code: emoji["twemoji"].get(code, ""),
        HELD_OUT_STYLE: lambda code: emoji["openmoji"].get(code, ""),
    }
    drawings = {}
    for style, package in PACKAGE_OF_STYLE.items():
        icons = json.loads((folders[package] / "icons.json").read_text(encoding="utf-8"))
        icon_name = icon_names.get(style, str)
        found = {code: _svg(icons, icon_name(code)) for code in codes if (style, code) not in WRONG_DRAWINGS}
        drawings[style] = {code: svg for code, svg in found.items() if svg}
    return drawings


def _icon_by_flag(folder: Path) -> dict[str, str]:
    """{country code: icon name}, from the pair of regional indicators that spells each flag in Unicode."""
    icons = json.loads((folder / "chars.json").read_text(encoding="utf-8"))
    pairs = {tuple(int(part, 16) for part in spelling.split("-")): name for spelling, name in icons.items()}
    first, last = 0x1F1E6, 0x1F1FF
    return {
        "".join(chr(ord("a") + point - first) for point in pair): name
        for pair, name in pairs.items()
        if len(pair) == 2 and all(first <= point <= last for point in pair)
    }


def _svg(icons: dict, name: str) -> str | None:
    """An icon of an Iconify set as an SVG document, or None where the set has none of that name."""
    alias = icons.get("aliases", {}).get(name, {})
    icon = icons["icons"].get(alias.get("parent", name))
    if icon is None:
        return None
    width, height = (icon.get(side, icons.get(side, 16)) for side in ("width", "height"))
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">{icon["body"]}</svg>'


def draw(svg: str, side: int = PICTURE_SIDE) -> Image.Image:
    """The drawing as an RGB picture on white, cut to its bounding box, the longer side `side` pixels long.

    Raises:
        ValueError: the drawing is empty.
    """
    import resvg_py

    png = resvg_py.svg_to_bytes(svg_string=svg, width=2 * side)
    drawn = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    box = drawn.getchannel("A").getbbox()
    if box is None:
        raise ValueError(f"The drawing {svg[:80]!r} shows nothing.")
    page = Image.new("RGBA", drawn.size, "white")
    page.alpha_composite(drawn)
    cut = page.convert("RGB").crop(box)
    scale = side / max(cut.size)
    return cut.resize([max(1, round(length * scale)) for length in cut.size], Image.Resampling.LANCZOS)
