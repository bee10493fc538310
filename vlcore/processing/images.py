"""Images of every kind -> upright RGB -> the square of floats that the towers see."""

import base64
import binascii
import io
import os
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from vlcore.config import VLConfig
from vlcore.processing.colors import ImageError, array_to_rgb, to_rgb

MAX_PIXELS = 2**26
MIN_SIDE = 14
# Raster formats only: Pillow would hand PostScript to an interpreter and fetch other files for some containers.
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "ICO", "TGA", "PCX", "JPEG2000", "AVIF")
ORIENTATION_TAG = 0x0112
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
DATA_URI = re.compile(r"data:(?P<type>[^;,]*)(?P<parameters>(;[^;,]*)*),(?P<payload>.*)", re.DOTALL)


@dataclass(frozen=True)
class ImageSettings:
    """How an image becomes pixels and placeholders.

    Attributes:
        size: side S of the square, in pixels; at least 14.
        pad_color: fills the square around an image that is not square, RGB in 0..255.
        num_tokens: placeholders an image takes in `input_ids`.
        max_pixels: an image of more is refused before it is decoded.
    """

    size: int
    pad_color: tuple[int, int, int]
    num_tokens: int
    max_pixels: int = MAX_PIXELS

    def __post_init__(self):
        if self.size < MIN_SIDE:
            raise ValueError(f"ImageSettings: size {self.size} is below {MIN_SIDE}, the shortest side of an image.")
        if len(self.pad_color) != 3 or any(not 0 <= level <= 255 for level in self.pad_color):
            raise ValueError(f"ImageSettings: pad_color {self.pad_color} is not three levels in 0..255.")
        if self.num_tokens < 1 or self.max_pixels < 1:
            raise ValueError(
                f"ImageSettings: num_tokens {self.num_tokens} and max_pixels {self.max_pixels} must be positive."
            )

    @classmethod
    def from_config(cls, config: VLConfig) -> "ImageSettings":
        """What a model of this configuration was built for."""
        return cls(config.image_size, config.pad_color, config.num_image_tokens)


def load_image(source: Any, name: str | None = None, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode an image completely and turn it upright.

    The orientation in its EXIF is applied: photographs from a phone stand upright. The public DeepSeek-VL code leaves
    them as the sensor saw them. Of an animation the first frame is taken, of a Pillow image the frame that it is at.

    Args:
        source: a path (str or PathLike), the bytes of a file, a Pillow image, a numpy array (see `array_to_rgb`), or
            a data: URI. Network addresses are refused.
        name: what an error calls the image; by default its path or its kind.
        max_pixels: width times height of the largest image that is decoded. It is checked on the file's header, so
            that a decompression bomb costs nothing. Pillow refuses on its own what exceeds 2 * Image.MAX_IMAGE_PIXELS.

    Returns:
        An image of mode "RGB" that shares nothing with `source`; `to_rgb` says what becomes of other modes.

    Raises:
        ImageError: no such file or no regular one, empty, truncated, of no known format, too large, without pixels, or
            of a wrong type.
    """
    label = name or _label(source)
    try:
        return _load(source, max_pixels)
    except ImageError as error:
        raise ImageError(f"{label}: {error}") from error.__cause__
    except Exception as error:  # on damaged bytes Pillow's decoders raise errors of every kind
        raise ImageError(f"{label}: it cannot be decoded ({type(error).__name__}: {error}).") from error


def to_pixels(image: Image.Image, settings: ImageSettings) -> Tensor:
    """The square that the model sees, as the public DeepSeek-VL image processor makes it.

    Each side becomes max(int(side / longest * S), 14), truncated and not rounded, by Pillow's bicubic filter on 8-bit
    values; the result is pasted on a square of the pad colour, (S - side) // 2 from its edges.

    Args:
        image: mode "RGB", of any size.
        settings: `size` is S.

    Returns:
        (3, S, S) float32 in [0, 1]. Each tower normalises it by its own mean and deviation.

    Raises:
        ImageError: the image is not in mode "RGB"; `load_image` makes it so.
    """
    if image.mode != "RGB":
        raise ImageError(f"to_pixels takes an image of mode 'RGB', not {image.mode!r}; load_image converts it.")
    longest = max(image.size)
    width, height = (max(int(side / longest * settings.size), MIN_SIDE) for side in image.size)
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    square = Image.new("RGB", (settings.size, settings.size), settings.pad_color)
    square.paste(resized, ((settings.size - width) // 2, (settings.size - height) // 2))
    return torch.from_numpy(np.array(square)).permute(2, 0, 1).float().div(255).contiguous()


def batch_pixels(images: Sequence[Image.Image], settings: ImageSettings) -> Tensor | None:
    """(I, 3, S, S) float32 of `to_pixels` over the images, or None where there are none."""
    return torch.stack([to_pixels(image, settings) for image in images]) if images else None


def _load(source: Any, max_pixels: int) -> Image.Image:
    if isinstance(source, np.ndarray):
        _check_size(source.shape[1::-1], max_pixels)
        return array_to_rgb(source)
    if isinstance(source, Image.Image):
        return _decode(source, max_pixels)
    if isinstance(source, str) and source.startswith("data:"):
        source = _data_uri_bytes(source)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _open(io.BytesIO(source), len(source), max_pixels)
    if isinstance(source, str) and re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", source):
        raise ImageError("it is an address, and images are not fetched; give a path, the bytes or a data: URI.")
    if not isinstance(source, (str, os.PathLike)):
        raise ImageError("an image is a path, bytes, a Pillow image, a numpy array or a data: URI.")
    try:
        # To open a pipe is to wait for whoever writes to it.
        if not stat.S_ISREG(os.stat(source).st_mode):
            raise ValueError("it is a folder, a pipe or a device, no regular file")
        file = open(source, "rb")  # noqa: SIM115 - closed by the with below; only opening may fail in this way
    except (OSError, ValueError) as error:
        raise ImageError(f"it cannot be opened ({getattr(error, 'strerror', None) or error}).") from error
    with file:
        return _open(file, os.fstat(file.fileno()).st_size, max_pixels)


def _open(file: Any, num_bytes: int, max_pixels: int) -> Image.Image:
    if num_bytes == 0:
        raise ImageError("it is empty (0 bytes).")
    Image.init()
    formats = [name for name in FORMATS if name in Image.OPEN]
    try:
        opened = Image.open(file, formats=formats)
    except UnidentifiedImageError as error:
        raise ImageError(f"its {num_bytes} bytes are no image of a known format ({', '.join(formats)}).") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"it is too large to be decoded: Pillow says {error}") from error
    with opened:
        return _decode(opened, max_pixels)


def _decode(image: Image.Image, max_pixels: int) -> Image.Image:
    _check_size(image.size, max_pixels)
    image.load()
    rgb = to_rgb(image)
    turn = UPRIGHT.get(_orientation(image))
    return rgb if turn is None else rgb.transpose(turn)


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(ORIENTATION_TAG, 1)
    except (SyntaxError, ValueError, TypeError, KeyError, IndexError, EOFError, OSError, ArithmeticError):
        return 1  # damaged EXIF says nothing of how the photograph was taken; its pixels are still good


def _check_size(size: Sequence[int], max_pixels: int) -> None:
    width, height = size if len(size) == 2 else (1, 1)
    if width * height == 0:
        raise ImageError(f"it has no pixels: its size is {width} x {height}.")
    if width * height > max_pixels:
        raise ImageError(f"its {width} x {height} pixels exceed max_pixels {max_pixels}.")


def _data_uri_bytes(uri: str) -> bytes:
    match = DATA_URI.fullmatch(uri)
    if match is None:
        raise ImageError("the data: URI has no comma, so no data.")
    payload = unquote_to_bytes(match["payload"])
    if ";base64" not in match["parameters"]:
        return payload
    try:
        return base64.b64decode(payload, validate=True)
    except binascii.Error as error:
        raise ImageError(f"its base64 is broken ({error}).") from error


def _label(source: Any) -> str:
    if isinstance(source, str) and source.startswith("data:"):
        return f"a data: URI of {len(source)} characters"
    if isinstance(source, (str, os.PathLike)):
        path = str(Path(source)) if isinstance(source, os.PathLike) else source
        return path if len(path) <= 200 else f"{path[:80]}… ({len(path)} characters)"
    if isinstance(source, (bytes, bytearray, memoryview)):
        return f"an image of {len(source)} bytes"
    if isinstance(source, Image.Image):
        return f"a Pillow image of mode {source.mode!r}"
    return "an array" if isinstance(source, np.ndarray) else f"an image given as {type(source).__name__}"
