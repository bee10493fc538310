"""Any Pillow mode, and any array that looks like an image, as 8-bit RGB."""

import numpy as np
from PIL import Image

WHITE = (255, 255, 255)
PREMULTIPLIED = {"La": "LA", "RGBa": "RGBA"}


class ImageError(ValueError):
    """An image that cannot be used; the message says which one and why."""


def to_rgb(image: Image.Image) -> Image.Image:
    """`image` in mode "RGB"; the caller's image is left as it is.

    An opaque image is what Pillow's `convert("RGB")` makes of it, as in the public DeepSeek-VL code. Two kinds differ:
    an image that is see-through somewhere is laid on white, where the public code shows whatever colour the
    transparent pixels happen to hold (often black, which hides black line art); and 16-bit grey and float images are
    scaled to 8 bits, where `convert` clips them.

    Raises:
        ImageError: a 32-bit integer image exceeds 16 bits, or a float image leaves [0, 1].
    """
    if image.mode in PREMULTIPLIED:
        image = image.convert(PREMULTIPLIED[image.mode])
    if image.mode.startswith("I;16"):
        return _from_levels(np.asarray(image).astype(np.uint16))
    if image.mode == "I":
        levels = np.asarray(image)
        if levels.min() < 0 or levels.max() > 65535:
            raise ImageError(f"its 32-bit values run from {levels.min()} to {levels.max()}; 0 to 65535 can be shown.")
        return _from_levels(levels.astype(np.uint16))
    if image.mode == "F":
        return _from_levels(np.asarray(image))
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        if np.asarray(rgba.getchannel("A")).min() < 255:
            rgba = Image.alpha_composite(Image.new("RGBA", rgba.size, WHITE), rgba)
        # Not of the image itself: of a palette with its transparency in bytes Pillow warns.
        return rgba.convert("RGB")
    return image.convert("RGB")


def array_to_rgb(array: np.ndarray) -> Image.Image:
    """An array as an RGB image.

    Args:
        array: (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), the fourth channel being opacity; uint8, uint16 over its
            whole range, bool, or floating point in [0, 1].

    Raises:
        ImageError: another shape or dtype, no pixels, or floats outside [0, 1].
    """
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        raise ImageError(f"an array of shape {array.shape} is no image; (H, W), (H, W, 1), (H, W, 3) or (H, W, 4) is.")
    if 0 in array.shape:
        raise ImageError(f"it has no pixels: the array's shape is {array.shape}.")
    if array.dtype == np.bool_:
        array = array.astype(np.uint8) * np.uint8(255)
    if array.dtype not in (np.uint8, np.uint16) and array.dtype.kind != "f":
        raise ImageError(f"an array of {array.dtype} is no image; uint8, uint16, bool or floats in [0, 1] are.")
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    return _from_levels(array)


def _from_levels(array: np.ndarray) -> Image.Image:
    """(H, W[, 3 | 4]) uint8, uint16 or float in [0, 1] -> RGB, rounded to the nearest of 256 levels."""
    if array.dtype == np.uint16:
        array = ((array.astype(np.uint32) + 128) // 257).astype(np.uint8)
    elif array.dtype != np.uint8:
        # Written so that NaN fails it too.
        if not (array.min() >= 0 and array.max() <= 1):
            raise ImageError(f"its float values run from {array.min()} to {array.max()}; they must be in [0, 1].")
        array = np.rint(array.astype(np.float64) * 255).astype(np.uint8)
    return to_rgb(Image.fromarray(np.ascontiguousarray(array)))
