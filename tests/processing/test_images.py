import base64
import io
import os
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from vlcore.config import preset
from vlcore.processing import ImageError, ImageSettings, load_image, to_pixels
from vlcore.processing.images import batch_pixels

GRADIENT = np.stack(np.broadcast_arrays(np.arange(40)[:, None], np.arange(60)[None, :], 7), -1).astype(np.uint8) * 4
SETTINGS = ImageSettings(size=64, pad_color=(122, 116, 104), num_tokens=16)


def encode(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


PNG = encode(Image.fromarray(GRADIENT))


@pytest.mark.parametrize(
    "kind", ["path", "str", "bytes", "bytearray", "memoryview", "pillow", "array", "data", "plain"]
)
def test_every_kind_of_source(kind, tmp_path):
    path = tmp_path / "image.png"
    path.write_bytes(PNG)
    source = {
        "path": path,
        "str": str(path),
        "bytes": PNG,
        "bytearray": bytearray(PNG),
        "memoryview": memoryview(PNG),
        "pillow": Image.open(path),
        "array": GRADIENT,
        "data": "data:image/png;base64," + base64.b64encode(PNG).decode(),
        "plain": "data:image/png," + "".join(f"%{byte:02x}" for byte in PNG),
    }[kind]
    loaded = load_image(source)
    assert loaded.mode == "RGB" and np.array_equal(np.asarray(loaded), GRADIENT)


def test_the_source_is_not_shared():
    source = Image.fromarray(GRADIENT)
    load_image(source).putpixel((0, 0), (9, 9, 9))
    array = GRADIENT.copy()
    load_image(array).putpixel((0, 0), (9, 9, 9))
    assert source.getpixel((0, 0)) == (0, 0, 28) and np.array_equal(array, GRADIENT)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_exif_orientation_is_applied(orientation, kind):
    upright = Image.new("RGB", (48, 32), "white")
    upright.paste("red", (0, 0, 16, 16))
    # What a camera held in that way stores: the inverse of the turn that shows it upright.
    turns = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}
    stored = upright if orientation == 1 else upright.transpose(Image.Transpose(turns[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 95} if kind in ("JPEG", "WEBP") else {}
    loaded = load_image(encode(stored, kind, exif=exif, **options))
    assert loaded.size == (48, 32)
    assert np.abs(np.asarray(loaded).astype(int) - np.asarray(upright)).mean() < 8


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_exif_leaves_the_image_as_it_is():
    stored = encode(Image.fromarray(GRADIENT), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\xff\xff\xff\xff\xff\xff")
    assert load_image(stored).size == (60, 40)


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "HSV", "RGBX"])
def test_opaque_modes_are_what_pillow_converts_them_to(mode):
    source = Image.fromarray(GRADIENT).convert(mode)
    assert np.array_equal(np.asarray(load_image(source)), np.asarray(source.convert("RGB")))


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_opaque_alpha_is_dropped_as_the_public_code_does(mode):
    source = Image.fromarray(GRADIENT).convert(mode)
    assert np.array_equal(np.asarray(load_image(source)), np.asarray(source.convert("RGB")))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "RGBa", "La", "P", "gif", "tRNS"])
def test_what_is_transparent_lies_on_white(mode):
    drawing = Image.new("LA", (8, 8), (0, 0))
    drawing.paste((0, 255), (2, 2, 6, 6))
    if mode in ("P", "gif"):
        source = Image.new("P", (8, 8), 0)
        source.putpalette([0, 0, 0, 0, 0, 0])
        source.paste(1, (2, 2, 6, 6))
        source.info["transparency"] = 0
        source = encode(source, "GIF", transparency=0) if mode == "gif" else source
    elif mode == "tRNS":
        source = Image.new("RGB", (8, 8), (1, 2, 3))
        source.paste((0, 0, 0), (2, 2, 6, 6))
        source = encode(source, transparency=(1, 2, 3))
    else:
        source = drawing if mode == "LA" else drawing.convert("RGBA") if mode in ("PA", "RGBa") else drawing
        source = source.convert(mode)
    loaded = np.asarray(load_image(source))
    assert (loaded[0, 0] == 255).all() and (loaded[4, 4] == 0).all()


@pytest.mark.filterwarnings("error")
def test_a_palette_whose_transparency_is_nowhere_seen_is_converted_without_a_warning():
    source = Image.fromarray(GRADIENT).convert("P")
    loaded = load_image(encode(source, transparency=b"\xff" * 256))
    assert np.array_equal(np.asarray(loaded), np.asarray(source.convert("RGB")))
    seen_through = load_image(encode(source, transparency=bytes(256)))
    assert (np.asarray(seen_through) == 255).all()


def test_half_transparent_pixels_are_mixed_with_white():
    assert load_image(Image.new("RGBA", (4, 4), (255, 0, 0, 128))).getpixel((0, 0)) == (255, 127, 127)


@pytest.mark.parametrize("kind", ["png", "tiff", "I;16", "I;16B", "I", "uint16", "float32", "F"])
def test_16_bit_and_float_images_are_scaled_and_not_clipped(kind):
    levels = np.linspace(0, 65535, 64).round().astype(np.uint16).reshape(8, 8)
    expected = np.rint(levels / 257).astype(np.uint8)
    image = Image.fromarray(levels)
    source = {
        "png": lambda: encode(image),
        "tiff": lambda: encode(image, "TIFF"),
        "I;16": lambda: image,
        "I;16B": lambda: Image.frombytes("I;16B", (8, 8), levels.astype(">u2").tobytes()),
        "I": lambda: Image.fromarray(levels.astype(np.int32)),
        "uint16": lambda: levels,
        "float32": lambda: (levels / 65535).astype(np.float32),
        "F": lambda: Image.fromarray((levels / 65535).astype(np.float32)),
    }[kind]()
    loaded = np.asarray(load_image(source))
    assert np.array_equal(loaded, np.repeat(expected[:, :, None], 3, 2))


@pytest.mark.parametrize("color_type, channels", [(2, 3), (6, 4)])
def test_16_bit_colour(color_type, channels):
    levels = np.full((4, 4, channels), 65535, ">u2")
    levels[..., 1] = 32768
    scanlines = b"".join(b"\0" + row.tobytes() for row in levels)
    header = struct.pack(">IIBBBBB", 4, 4, 16, color_type, 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(scanlines)), (b"IEND", b"")]
    png = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    )
    assert load_image(png).getpixel((1, 1)) == (255, 128, 255)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_an_animation_the_first_frame(kind):
    frames = [Image.new("RGB", (16, 16), color) for color in ("red", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    source = encode(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert load_image(source).getpixel((3, 3)) == (255, 0, 0)


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 1), (5, 7, 3), (5, 7, 4)])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float16, np.float64, bool])
def test_arrays(shape, dtype):
    top = {np.uint8: 255, np.uint16: 65535}.get(dtype, 1)
    loaded = load_image(np.full(shape, top, dtype)[::-1])
    assert loaded.size == (7, 5) and loaded.getpixel((0, 0)) == (255, 255, 255)


def damaged_png():
    return PNG[: len(PNG) // 2]


@pytest.mark.parametrize(
    "source, message",
    [
        (b"", r"an image of 0 bytes: it is empty \(0 bytes\)"),
        ("", r"it cannot be opened \(No such file or directory\)"),
        (damaged_png(), r"an image of \d+ bytes: it cannot be decoded \(.*truncated"),
        (encode(Image.fromarray(GRADIENT), "JPEG")[:-200], r"it cannot be decoded \(OSError: .*truncated"),
        (PNG[:20], r"cannot be decoded|no image of a known format"),
        (b"no image at all", r"its 15 bytes are no image of a known format \(PNG, JPEG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", "are no image of a known format"),
        (None, "an image given as NoneType: an image is a path, bytes, a Pillow image, a numpy array or a data: URI"),
        (3, "an image given as int: an image is a path"),
        (["a.png"], "an image given as list: an image is a path"),
        (torch.zeros(3, 4, 4), "an image given as Tensor: an image is a path"),
        ("https://example.org/cat.png", "https://example.org/cat.png: it is an address, and images are not fetched"),
        ("file:///cat.png", "it is an address"),
        ("x" * 5000, r"x{80}… \(5000 characters\): it cannot be opened \(File name too long\)"),
        ("a\0b", "it cannot be opened"),
        ("data:image/png;base64", "a data: URI of 21 characters: the data: URI has no comma"),
        ("data:image/png;base64,@@@", "its base64 is broken"),
        ("data:image/png;base64,", r"it is empty \(0 bytes\)"),
        (Image.new("RGB", (0, 5)), "a Pillow image of mode 'RGB': it has no pixels: its size is 0 x 5"),
        (np.zeros((4, 0, 3), np.uint8), "an array: it has no pixels: its size is 0 x 4"),
        (np.zeros((3, 4, 5), np.uint8), r"an array of shape \(3, 4, 5\) is no image; \(H, W\)"),
        (np.zeros(4, np.uint8), r"an array of shape \(4,\) is no image"),
        (np.zeros((4, 4, 0), np.uint8), r"an array of shape \(4, 4, 0\) is no image"),
        (np.zeros((4, 4), np.int64), "an array of int64 is no image; uint8, uint16, bool or floats"),
        (np.full((4, 4), 255.0), r"its float values run from 255.0 to 255.0; they must be in \[0, 1\]"),
        (np.full((4, 4), np.nan), "its float values run from nan to nan"),
        (Image.new("I", (2, 2), 70000), "its 32-bit values run from 70000 to 70000; 0 to 65535 can be shown"),
        (Image.new("F", (2, 2), -1.0), "its float values run from -1.0"),
    ],
)
def test_bad_sources(source, message):
    with pytest.raises(ImageError, match=message):
        load_image(source)


def test_the_error_names_the_file_or_the_given_name(tmp_path):
    path = tmp_path / "cut.png"
    path.write_bytes(damaged_png())
    with pytest.raises(ImageError, match="cut.png: it cannot be decoded"):
        load_image(path)
    with pytest.raises(ImageError, match="^the third picture: it cannot be decoded"):
        load_image(path, "the third picture")
    with pytest.raises(ImageError, match=r"missing.png: it cannot be opened \(No such file"):
        load_image(tmp_path / "missing.png")
    with pytest.raises(
        ImageError, match=r"it cannot be opened \(it is a folder, a pipe or a device, no regular file\)"
    ):
        load_image(tmp_path)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(ImageError, match="pipe.png: it cannot be opened .*no regular file"):
        load_image(tmp_path / "pipe.png")


def test_a_pillow_image_whose_file_is_cut_short(tmp_path):
    path = tmp_path / "cut.png"
    path.write_bytes(damaged_png())
    with Image.open(path) as opened, pytest.raises(ImageError, match="a Pillow image of mode 'RGB': it cannot be deco"):
        load_image(opened)


def test_a_bomb_is_refused_by_its_header(monkeypatch):
    bomb = encode(Image.new("1", (9000, 8000)))
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("it was decoded"))
    with pytest.raises(ImageError, match="its 9000 x 8000 pixels exceed max_pixels 67108864"):
        load_image(bomb)
    with pytest.raises(ImageError, match="its 60 x 40 pixels exceed max_pixels 2399"):
        load_image(PNG, max_pixels=2399)
    with pytest.raises(ImageError, match="an array: its 60 x 40 pixels exceed max_pixels 10"):
        load_image(GRADIENT, max_pixels=10)


def test_what_pillow_refuses_as_a_bomb(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ImageError, match="it is too large to be decoded: Pillow says"):
        load_image(PNG)


@pytest.mark.parametrize(
    "size, inside",
    [((60, 40), (64, 42)), ((40, 60), (42, 64)), ((31, 31), (64, 64)), ((100, 99), (64, 63)), ((3, 2), (64, 42))],
)
def test_sides_are_truncated_and_centred(size, inside):
    pixels = to_pixels(Image.new("RGB", size, (255, 0, 0)), SETTINGS)
    assert pixels.shape == (3, 64, 64) and pixels.dtype == torch.float32 and pixels.is_contiguous()
    left, top = (64 - inside[0]) // 2, (64 - inside[1]) // 2
    expected = torch.tensor(SETTINGS.pad_color).div(255)[:, None, None].repeat(1, 64, 64)
    expected[:, top : top + inside[1], left : left + inside[0]] = torch.tensor([1.0, 0, 0])[:, None, None]
    torch.testing.assert_close(pixels, expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("size, inside", [((5000, 1), (64, 14)), ((1, 5000), (14, 64)), ((1, 1), (64, 64))])
def test_extreme_shapes_keep_14_pixels(size, inside):
    pixels = to_pixels(Image.new("RGB", size, (255, 255, 255)), SETTINGS)
    assert int((pixels == 1).all(0).sum()) == inside[0] * inside[1]


def test_resize_is_pillows_bicubic_on_8_bits():
    image = Image.fromarray(GRADIENT)
    expected = np.asarray(image.resize((64, 42), Image.Resampling.BICUBIC)).transpose(2, 0, 1) / np.float32(255)
    assert np.array_equal(to_pixels(image, SETTINGS)[:, 11:53].numpy(), expected)


def test_batch_of_pixels():
    image = Image.fromarray(GRADIENT)
    assert batch_pixels([image, image], SETTINGS).shape == (2, 3, 64, 64)
    assert batch_pixels([], SETTINGS) is None


def test_only_rgb_becomes_pixels():
    with pytest.raises(ImageError, match="takes an image of mode 'RGB', not 'L'"):
        to_pixels(Image.new("L", (4, 4)), SETTINGS)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"size": 13}, "size 13 is below 14"),
        ({"pad_color": (1, 2)}, r"pad_color \(1, 2\) is not three levels"),
        ({"pad_color": (1, 2, 256)}, "is not three levels in 0..255"),
        ({"num_tokens": 0}, "num_tokens 0 and max_pixels"),
        ({"max_pixels": 0}, "max_pixels 0 must be positive"),
    ],
)
def test_bad_settings(change, message):
    with pytest.raises(ValueError, match=message):
        ImageSettings(**{"size": 64, "pad_color": (1, 2, 3), "num_tokens": 4} | change)


def test_settings_of_a_configuration():
    assert ImageSettings.from_config(preset("tiny")) == ImageSettings(160, (122, 116, 104), 16)
    assert ImageSettings.from_config(preset("deepseek_vl_1_3b")) == ImageSettings(384, (127, 127, 127), 576)


KINDS = ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "ICO", "TGA", "PCX", "JPEG2000"]


@pytest.mark.parametrize("share", [0.1, 0.5, 0.95])
@pytest.mark.parametrize("kind", KINDS)
def test_no_format_is_read_in_part(kind, share):
    noise = np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8)
    whole = encode(Image.fromarray(noise), kind)
    assert load_image(whole).size == (48, 48)
    with pytest.raises(ImageError, match="cannot be decoded|no image of a known format"):
        load_image(whole[: int(len(whole) * share)])
