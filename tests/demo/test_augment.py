"""Augmentation: the same generator gives the same picture, others differ, and what is shown stays to be seen."""

import numpy as np
import pytest
from PIL import Image

from vlcore.demo.augment import redraw_flag, reprint_page


def tricolour(width: int = 96, height: int = 64) -> Image.Image:
    pixels = np.zeros((height, width, 3), np.uint8)
    for third, color in enumerate([(0, 85, 164), (255, 255, 255), (239, 65, 53)]):
        pixels[:, third * width // 3 : (third + 1) * width // 3] = color
    return Image.fromarray(pixels)


def page() -> Image.Image:
    pixels = np.full((96, 96), 255, np.uint8)
    pixels[40:56, 20:76] = 0
    return Image.fromarray(pixels)


@pytest.mark.parametrize("change, image", [(redraw_flag, tricolour()), (reprint_page, page())])
def test_the_generator_decides_everything(change, image):
    before = image.tobytes()
    pictures = [change(image, np.random.default_rng(seed)) for seed in range(10)]
    again = [change(image, np.random.default_rng(seed)) for seed in range(10)]
    assert [picture.tobytes() for picture in pictures] == [picture.tobytes() for picture in again]
    assert len({picture.tobytes() for picture in pictures}) > 4
    assert {picture.mode for picture in pictures} == {"RGB"}
    assert image.tobytes() == before


@pytest.mark.parametrize("size", [(96, 64), (96, 96), (79, 96), (96, 38), (30, 20)])
def test_flags_of_every_shape_are_taken(size):
    given = tricolour(*size)
    for seed in range(20):
        drawn = redraw_flag(given, np.random.default_rng(seed))
        assert max(drawn.size) == 96 or drawn.tobytes() == given.tobytes()


def test_a_flag_keeps_its_colours_in_order():
    for seed in range(40):
        drawn = redraw_flag(tricolour(), np.random.default_rng(seed)).resize((96, 96))
        row = np.asarray(drawn, np.float32)[40:56].mean(0)
        left, right = row[20:30].mean(0), row[66:76].mean(0)
        assert left[2] - left[0] > right[2] - right[0] + 40, f"seed {seed}: blue must stay left of red"


def test_a_page_keeps_dark_text_on_light_paper():
    for seed in range(40):
        pixels = np.asarray(reprint_page(page(), np.random.default_rng(seed)), np.float32)
        assert pixels[44:52, 30:66].mean() < 110 < 140 < pixels[4:20, 30:66].mean()
