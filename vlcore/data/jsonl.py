"""Rows of a JSON or JSON Lines file by number, without holding them all as Python objects."""

import hashlib
import json
import re
from array import array
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from vlcore.data.sample import BadSample

CHUNK = 2**20
# What decides where an item of an array ends: brackets, and strings, in which brackets mean nothing.
TOKEN = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[\[\]{}]', re.DOTALL)


class JsonRows:
    """A `.jsonl` file (one object a line, blank lines ignored) or a `.json` file (one array of objects).

    Of a .jsonl file only the lines' offsets are held, and a row is read when it is asked for; a .json array is held as
    its text. Both are shared between forked worker processes.

    Raises:
        ValueError: the file is empty, or a .json file is not one array and nothing else.
        OSError: it cannot be read.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._text = _read(self.path) if self.path.suffix == ".json" else None
        self._spans = _lines(self.path) if self._text is None else _items(self.path, self._text)
        if len(self._spans) == 0:
            raise ValueError(f"{self.path} holds no rows.")

    def __len__(self) -> int:
        return len(self._spans)

    @cached_property
    def digest(self) -> str:
        """The SHA-256 of the file."""
        digest = hashlib.sha256()
        with self.path.open("rb") as file:
            while block := file.read(CHUNK):
                digest.update(block)
        return digest.hexdigest()

    def name(self, index: int) -> str:
        """How messages call a row that has no id of its own: the file and the row, counted from 1."""
        return f"{self.path.name}:{index + 1}"

    def raw(self, index: int) -> str | bytes:
        """The row's JSON, not yet parsed."""
        start, end = (int(offset) for offset in self._spans[index])
        if self._text is not None:
            return self._text[start:end]
        with self.path.open("rb") as file:
            file.seek(start)
            return file.read(end - start)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The row. Raises BadSample where it is not a JSON object."""
        try:
            row = json.loads(self.raw(index))
        except (ValueError, RecursionError) as error:  # a bad encoding too, and brackets without end
            raise BadSample(f"{self.path}, row {index + 1} is not JSON: {error}", self.name(index)) from None
        if not isinstance(row, dict):
            kind = type(row).__name__
            raise BadSample(f"{self.path}, row {index + 1} is a {kind}, not an object.", self.name(index))
        return row

    def sample_id(self, row: dict[str, Any], index: int) -> str:
        """The row's own id, or its name."""
        return self.name(index) if row.get("id") is None else str(row["id"])


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from None


def _lines(path: Path) -> np.ndarray:
    spans, offset = array("q"), 0
    with path.open("rb") as file:
        for line in file:
            if line.strip():
                spans.extend((offset, offset + len(line)))
            offset += len(line)
    return np.array(spans).reshape(-1, 2)


def _items(path: Path, text: str) -> np.ndarray:
    """Where each item of a JSON array begins and ends in `text`."""
    # Numbers stay text here: Python refuses those of thousands of digits, which is to cost their row alone.
    decoder, spans = json.JSONDecoder(parse_int=str), array("q")
    position = _skip_space(text, 0)
    if text[position : position + 1] != "[":
        raise ValueError(f"{path} is not a JSON array of rows; for one row a line, name the file .jsonl.")
    position = _skip_space(text, position + 1)
    while text[position : position + 1] != "]":
        try:
            _, end = decoder.raw_decode(text, position)
        except RecursionError:
            end = _end(path, text, position)
        except ValueError as error:
            raise ValueError(f"{path}, row {len(spans) // 2 + 1} is not JSON: {error}") from None
        spans.extend((position, end))
        position = _skip_space(text, end)
        if text[position : position + 1] == ",":
            position = _skip_space(text, position + 1)
        elif text[position : position + 1] != "]":
            raise ValueError(f"{path} breaks off after row {len(spans) // 2}: the array has no end.")
    behind = _skip_space(text, position + 1)
    if behind < len(text):
        line = text.count("\n", 0, behind) + 1
        raise ValueError(f"{path} goes on behind its array, in line {line}; for one row a line, name the file .jsonl.")
    return np.array(spans).reshape(-1, 2)


def _end(path: Path, text: str, position: int) -> int:
    """Where the array or object ends that begins at `position`, however deep it is."""
    depth = 0
    for token in TOKEN.finditer(text, position):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(token.group(), 0)
        if depth == 0:
            return token.end()
    raise ValueError(f"{path} breaks off inside of a row: the array has no end.")


def _skip_space(text: str, position: int) -> int:
    while text[position : position + 1] in (" ", "\n", "\r", "\t"):
        position += 1
    return position


def inside(root: Path, image: Any) -> Path:
    """The path of an image that a row names, which must lie below `root`.

    Raises:
        BadSample: `image` is not a path, is a URL, leads outside `root` (through `..`, an absolute path or a link), or
            nowhere (in a circle of links).
    """
    if not isinstance(image, str) or not image or "\0" in image:
        raise BadSample(f"image {image!r} is not a path.")
    if "://" in image or image.startswith("data:"):
        raise BadSample(f"image {image[:80]!r} is a URL; images of training data are files below {root}.")
    try:
        path = (root / image).resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise BadSample(f"image {image!r} is not a path that can be followed: {error}") from None
    if not path.is_relative_to(root):
        raise BadSample(f"image {image!r} leads outside {root}.")
    return path
