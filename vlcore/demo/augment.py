"""Changes pictures as another artist, camera or printer might, so that a model learns what is drawn and not how."""

import numpy as np
from PIL import Image, ImageDraw

SIDE = 96
GROUND = (255, 255, 255)


def redraw_flag(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """The same flag drawn a little otherwise, RGB: proportions, colours, folds, outline and slant vary. Every second
    picture stays as it is: on a model this small and this briefly trained, more variety costs more than it gives.

    Args:
        image: RGB, the flag filling it.
        rng: decides everything; the same state gives the same picture.
    """
    image = image.convert("RGB")
    if rng.random() < 0.5:
        return image
    proportion = image.width / image.height if rng.random() < 0.5 else rng.uniform(1.0, 1.8)
    size = (SIDE, max(8, round(SIDE / proportion))) if proportion >= 1 else (max(8, round(SIDE * proportion)), SIDE)
    cloth = _shade_folds(_shift_colors(image.resize(size, Image.Resampling.BILINEAR), rng), rng)
    page = Image.new("RGB", size, GROUND)
    page.paste(cloth, (0, 0), _outline(size, rng, cloth))
    return _slant(page, rng, GROUND, angle=0.06, shear=0.06, zoom=(0.9, 1.05), shift=3)


def reprint_page(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """The same text on another sheet, RGB, of the same size: ink, paper, place and slant vary a little.

    Args:
        image: dark text on light ground.
        rng: decides everything; the same state gives the same picture.
    """
    grey = np.asarray(image.convert("L"), np.float32)[..., None] / 255
    paper = rng.uniform(170, 255) + rng.uniform(-15, 15, 3)
    ink = rng.uniform(0, 90) + rng.uniform(-15, 15, 3)
    colors = np.clip(ink + grey * (paper - ink), 0, 255)
    page = Image.fromarray(colors.astype(np.uint8))
    return _slant(page, rng, tuple(int(channel) for channel in colors[0, 0]), 0.03, 0.05, (0.95, 1.05), 2)


def _shift_colors(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Brightness, contrast, saturation and a tint, each a little off."""
    pixels = np.asarray(image, np.float32)
    grey = pixels.mean(-1, keepdims=True)
    pixels = grey + (pixels - grey) * np.float32(rng.uniform(0.8, 1.15))
    middle = np.float32(127.5)
    pixels = middle + (pixels - middle) * np.float32(rng.uniform(0.85, 1.1)) + np.float32(rng.uniform(-12, 12))
    pixels = pixels + rng.uniform(-12, 12, 3).astype(np.float32)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def _shade_folds(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Light and shadow of a waving cloth, on one picture in three."""
    if rng.random() > 0.33:
        return image
    waves, phase, depth = rng.uniform(0.5, 2.5), rng.uniform(0, 2 * np.pi), rng.uniform(0.05, 0.25)
    columns = np.linspace(0, 2 * np.pi * waves, image.width, dtype=np.float32)
    light = (1 - depth * (1 + np.sin(columns + phase)) / 2).astype(np.float32)
    return Image.fromarray((np.asarray(image, np.float32) * light[None, :, None]).astype(np.uint8))


def _outline(size: tuple[int, int], rng: np.random.Generator, cloth: Image.Image) -> Image.Image:
    """A mask of the cloth's shape: rectangle, rounded or ellipse. On one picture in three the border is drawn too."""
    width, height = size
    box = (0, 0, width - 1, height - 1)
    radius = {0: 0, 1: 0, 2: int(rng.uniform(0.05, 0.25) * height), 3: height}[int(rng.integers(0, 4))]
    mask = Image.new("L", size, 0)
    pen, border = ImageDraw.Draw(mask), ImageDraw.Draw(cloth)
    line = int(rng.integers(1, 5)) if rng.random() < 0.33 else 0
    color = _dark(rng)
    if radius == height:
        pen.ellipse(box, fill=255)
        border.ellipse(box, outline=color, width=line)
    else:
        pen.rounded_rectangle(box, radius, fill=255)
        if line:
            border.rounded_rectangle(box, radius, outline=color, width=line)
    return mask


def _dark(rng: np.random.Generator) -> tuple[int, int, int]:
    red, green, blue = (int(channel) for channel in rng.integers(0, 81, 3))
    return red, green, blue


def _slant(
    image: Image.Image,
    rng: np.random.Generator,
    ground: tuple[int, ...],
    angle: float,
    shear: float,
    zoom: tuple[float, float],
    shift: float,
) -> Image.Image:
    """An affine change about the centre. angle in radians, shear without unit, zoom a factor, shift in pixels."""
    turn, lean, factor = rng.uniform(-angle, angle), rng.uniform(-shear, shear), rng.uniform(*zoom)
    matrix = np.array([[np.cos(turn), -np.sin(turn) + lean], [np.sin(turn), np.cos(turn)]]) / factor
    centre = np.array([image.width, image.height]) / 2
    offset = centre - matrix @ (centre + rng.uniform(-shift, shift, 2))
    (a, b), (c, d) = matrix
    coefficients = (a, b, offset[0], c, d, offset[1])
    return image.transform(
        image.size, Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR, fillcolor=tuple(ground)
    )
