"""Documents in JSON Lines: plain text, and text and images interleaved."""

from pathlib import Path
from typing import Any

from vlcore.data.jsonl import JsonRows, inside
from vlcore.data.sample import BadSample, Modality, Sample


class JsonlText:
    """Rows `{"text": "...", "id": optional}`: one document each.

    Args:
        path: a .jsonl file, or a .json array.
        name: names the source in messages and measurements; the file's stem by default.
        field: the key that holds the text.

    Raises:
        ValueError, OSError: the file holds no rows or cannot be read. A bad row raises BadSample when it is drawn.
    """

    modality: Modality = "text"

    def __init__(self, path: str | Path, *, name: str | None = None, field: str = "text"):
        self.rows = JsonRows(path)
        self.name = name or self.rows.path.stem
        self.field = field

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        row = self.rows[index]
        sample_id = self.rows.sample_id(row, index)
        text = row.get(self.field)
        if not isinstance(text, str) or not text:
            raise BadSample(f"{self.field!r} is {_shown(text)}; a document needs text there.", sample_id)
        return Sample(id=sample_id, modality=self.modality, document=[text])

    def fingerprint(self) -> str:
        """Of the file's rows, and of which key is read."""
        return f"{self.rows.digest} {self.field}"


class JsonlDocuments:
    """Rows `{"parts": [{"text": "..."} | {"image": "path"}, ...], "id": optional}`: captions, pages, interleaved text.

    Args:
        path: a .jsonl file, or a .json array.
        images_root: the folder that image paths are relative to, and must stay in.
        name: names the source in messages and measurements; the file's stem by default.

    Raises:
        ValueError, OSError: the file holds no rows or cannot be read. A bad row raises BadSample when it is drawn; so
            does one without an image, for its place is in a text source.
    """

    modality: Modality = "multimodal"

    def __init__(self, path: str | Path, images_root: str | Path, *, name: str | None = None):
        self.rows = JsonRows(path)
        self.images_root = Path(images_root).resolve()
        self.name = name or self.rows.path.stem

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        row = self.rows[index]
        sample_id = self.rows.sample_id(row, index)
        try:
            parts = self._parts(row)
        except BadSample as error:
            raise BadSample(error.reason, sample_id) from None
        return Sample(id=sample_id, modality=self.modality, document=parts)

    def fingerprint(self) -> str:
        """Of the file's rows; images are not looked at."""
        return self.rows.digest

    def _parts(self, row: dict[str, Any]) -> list[str | Path]:
        parts = row.get("parts")
        if not isinstance(parts, list):
            raise BadSample(f"'parts' is {_shown(parts)}; a document needs a list there.")
        result: list[str | Path] = []
        for part in parts:
            if isinstance(part, dict) and isinstance(part.get("text"), str):
                result.append(part["text"])
            elif isinstance(part, dict) and "image" in part:
                result.append(inside(self.images_root, part["image"]))
            else:
                raise BadSample(f"part {_shown(part)} is neither {{'text': ...}} nor {{'image': ...}}.")
        if not any(isinstance(part, Path) for part in result):
            raise BadSample("no part is an image; a document of text alone belongs in JsonlText.")
        return result


def _shown(value: Any) -> str:
    return "missing" if value is None else repr(value)[:80]
