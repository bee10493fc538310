"""Flags: the right country under each artist's name for it, and a drawing as a picture."""

import json

import numpy as np
import pytest
from demo_packages import COUNTRIES

from vlcore.demo.flags import HELD_OUT_STYLE, PACKAGE_OF_STYLE, draw, read_countries, read_drawings


def test_countries_are_those_with_a_code_a_continent_and_their_own_flag(packages):
    places = read_countries(packages["flag-icons"] / "country.json")
    assert [place.code for place in places] == sorted(COUNTRIES)
    france = places[2]
    assert (france.name, france.capital, france.continent) == ("France", "Paris", "Europe")


def test_every_style_is_found_under_its_artists_names(packages):
    drawings = read_drawings(packages, list(COUNTRIES))
    assert set(drawings) == set(PACKAGE_OF_STYLE)
    # circle-flags' "ar" shows a language, not Argentina.
    assert {
        style: set(COUNTRIES) - set(drawn) for style, drawn in drawings.items() if set(drawn) != set(COUNTRIES)
    } == {"circle-flags": {"ar"}}
    for inset, drawn in enumerate(drawings.values()):
        for code, svg in drawn.items():
            assert COUNTRIES[code][3] in svg and f"M{inset} 9" in svg and 'viewBox="0 0 64 64"' in svg


def test_what_an_artist_did_not_draw_is_left_out(packages, tmp_path):
    folder = tmp_path / "cif"
    folder.mkdir()
    icons = json.loads((packages["cif"] / "icons.json").read_text())
    del icons["icons"]["fr"]
    icons["aliases"] = {"de": {"parent": "jp"}}
    (folder / "icons.json").write_text(json.dumps(icons))
    drawn = read_drawings({**packages, "cif": folder}, list(COUNTRIES))["coreui"]
    assert "fr" not in drawn
    assert drawn["de"] == drawn["jp"], "an alias stands for its parent"


def test_a_picture_is_cut_to_the_drawing(packages):
    picture = draw(read_drawings(packages, ["fr"])[HELD_OUT_STYLE]["fr"], side=96)
    assert picture.mode == "RGB" and max(picture.size) == 96
    assert picture.width > picture.height
    middle = np.asarray(picture)[picture.height // 2, picture.width // 2]
    np.testing.assert_array_equal(middle, [0x00, 0x55, 0xA4])


def test_what_is_transparent_becomes_white():
    picture = draw(
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 8 8"><circle cx="4" cy="4" r="4"/></svg>', side=32
    )
    np.testing.assert_array_equal(np.asarray(picture)[0, 0], [255, 255, 255])
    np.testing.assert_array_equal(np.asarray(picture)[16, 16], [0, 0, 0])


def test_an_empty_drawing_is_refused():
    with pytest.raises(ValueError, match="shows nothing"):
        draw('<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 8 8"></svg>')
