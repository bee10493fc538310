"""Conversations in JSON or JSON Lines: LLaVA's `conversations`, and `messages` with `images`."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from vlcore.data.jsonl import JsonRows, inside
from vlcore.data.sample import BadSample, Modality, Sample

PLACEHOLDER = "<image>"
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


class JsonlConversations:
    """Instructions of one modality out of a file in one of two forms.

    * LLaVA's: `{"id", "image": path | [paths] | absent, "conversations": [{"from": "human" | "gpt", "value": "..."}]}`
    * messages: `{"id", "images": [paths], "messages": [{"role": "user" | "assistant", "content": "..."}]}`, where
      content may also be a list of `{"type": "text", "text": ...}` and `{"type": "image"}`, which may name its image
      itself (`"image": path`) where the row has no `images`.

    In both, `<image>` in a user's text stands for the next image. Files of instructions often hold rows with and
    without images; a source yields those of its own modality, and a second source on the same file yields the others.
    An empty path is no image.

    Args:
        path: a .jsonl file, or a .json array.
        images_root: the folder that image paths are relative to, and must stay in; None for text.
        modality: "multimodal" or "text"; by default as `images_root` is given or not.
        name: names the source in messages and measurements; the file's stem by default.

    Raises:
        ValueError, OSError: no row is of the modality, or the file cannot be read. A bad row raises BadSample when it
            is drawn; rows that do not tell their modality, which are not JSON, have no turns, or have an `<image>` and
            name none, belong to both.
    """

    def __init__(
        self,
        path: str | Path,
        images_root: str | Path | None = None,
        *,
        modality: Modality | None = None,
        name: str | None = None,
    ):
        self.rows = JsonRows(path)
        self.images_root = None if images_root is None else Path(images_root).resolve()
        self.modality: Modality = modality or ("text" if images_root is None else "multimodal")
        self.name = name or self.rows.path.stem
        if self.modality == "multimodal" and self.images_root is None:
            raise ValueError(f"JsonlConversations {self.name!r}: a multimodal source needs images_root.")
        wanted = self.modality == "multimodal"
        found = [_has_images(self.rows.raw(i)) for i in range(len(self.rows))]
        if wanted not in found:
            raise ValueError(f"{self.rows.path}: none of the {len(self.rows)} rows is {self.modality}.")
        self._kept = np.array([i for i, has in enumerate(found) if has in (wanted, None)], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int) -> Sample:
        row_number = int(self._kept[index])
        row = self.rows[row_number]
        sample_id = self.rows.sample_id(row, row_number)
        try:
            images = [inside(self.images_root, image) for image in _images(row)] if self.images_root else []
            conversation = _conversation(row, images)
        except BadSample as error:
            raise BadSample(error.reason, sample_id) from None
        return Sample(id=sample_id, modality=self.modality, conversation=conversation)

    def fingerprint(self) -> str:
        """Of the file's rows; images are not looked at."""
        return self.rows.digest


def _has_images(raw: str | bytes) -> bool | None:
    """Whether a row names an image; None where it is bad in a way that does not tell whether it should."""
    try:
        row = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict):
        return None
    if _images(row):
        return True
    return None if not _turns(row) or any(map(_has_placeholder, _turns(row))) else False


def _has_placeholder(turn: Any) -> bool:
    """Whether a user's text has one, in parts or whole."""
    role, content = _role_and_content(turn)
    return role in ("human", "user") and PLACEHOLDER in str(content)


def _images(row: dict[str, Any]) -> list[Any]:
    """What a row names as its images, in reading order: under `images` or `image`, or else in the content's parts."""
    named = row.get("images") or row.get("image")
    named = [each for each in (named if isinstance(named, list) else [named]) if each not in (None, "")]
    if named:
        return named
    contents = [_role_and_content(turn)[1] for turn in _turns(row)]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    return [part.get("image", part.get("path")) for part in parts if _is_image(part)]


def _turns(row: dict[str, Any]) -> list[Any]:
    turns = row.get("conversations", row.get("messages"))
    return turns if isinstance(turns, list) else []


def _role_and_content(turn: Any) -> tuple[Any, Any]:
    """Of a turn of either form, not yet checked; None for what it lacks."""
    if not isinstance(turn, dict):
        return None, None
    return turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))


def _is_image(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "image"


def _conversation(row: dict[str, Any], images: list[Path]) -> list[dict[str, Any]]:
    """The row as messages, `images` put where the text says."""
    turns = _turns(row)
    if not turns:
        raise BadSample("it has neither 'conversations' nor 'messages' with turns in it.")
    waiting = iter(images)
    conversation = [_message(turn, waiting) for turn in turns]
    unused = len(list(waiting))
    if unused:
        raise BadSample(f"it names {len(images)} images, but its text has {len(images) - unused} {PLACEHOLDER}.")
    if conversation[-1]["role"] != "assistant":
        raise BadSample("its last turn is not the assistant's, so there is nothing to learn.")
    return conversation


def _message(turn: Any, waiting: Any) -> dict[str, Any]:
    if not isinstance(turn, dict):
        raise BadSample(f"turn {turn!r} is not an object."[:200])
    role, content = _role_and_content(turn)
    if not isinstance(role, str) or role not in ROLES:
        raise BadSample(f"role {role!r:.80} is none of {', '.join(ROLES)}.")
    if ROLES[role] == "user":
        return {"role": "user", "content": _parts(content, waiting)}
    if isinstance(content, list):
        content = " ".join(_text_of(part) for part in content)  # as the processor joins a user's
    if not isinstance(content, str) or (ROLES[role] == "assistant" and not content.strip()):
        raise BadSample(f"a turn of {role!r} has no text.")
    return {"role": ROLES[role], "content": content}


def _parts(content: Any, waiting: Any) -> list[dict[str, Any]]:
    """A user's content as parts: text, and an image for each placeholder."""
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise BadSample(f"a user's turn has no text: {content!r}."[:200])
    parts: list[dict[str, Any]] = []
    for part in content:
        pieces = [PLACEHOLDER] if _is_image(part) else re.split(f"({PLACEHOLDER})", _text_of(part))
        for piece in pieces:
            if piece != PLACEHOLDER:
                parts.append({"type": "text", "text": piece})
            elif image := next(waiting, None):
                parts.append({"type": "image", "image": image})
            else:
                raise BadSample(f"its text has more {PLACEHOLDER} than it names images.")
    parts = [part for part in parts if part.get("text") != ""]
    if not parts:
        raise BadSample("a user's turn is empty.")
    return parts


def _text_of(part: Any) -> str:
    if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
        raise BadSample(f"content part {part!r} is neither text nor an image in its place."[:200])
    return part["text"]
