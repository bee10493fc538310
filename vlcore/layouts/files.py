"""The safetensors files of a model directory: which tensor is in which file, and whether they are what they claim.

Only safetensors are read. A pickle can run code when it is opened, so .bin and .pt files are refused, never opened.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True)
class StoredTensor:
    """A tensor on disk; `dtype` is safetensors' name of it, such as "BF16"."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


def stored_tensors(directory: Path) -> dict[str, StoredTensor]:
    """Key -> tensor of a directory's safetensors, from their headers alone.

    Raises:
        FileNotFoundError: there is no such directory.
        ValueError: it holds no safetensors; a file is not one; the index is malformed, names files outside of the
            directory or missing, or disagrees with the files.
    """
    weight_map = _weight_map(directory)
    if weight_map is None:
        return _header(_single_file(directory))
    found: dict[str, StoredTensor] = {}
    for name in dict.fromkeys(weight_map.values()):
        claimed = {key for key, file in weight_map.items() if file == name}
        header = _header(_shard(directory, name, claimed))
        if strays := claimed ^ header.keys():
            key = min(strays)
            problem = "lacks" if key in claimed else "holds, unnamed by it,"
            raise ValueError(f"{directory / INDEX} and {name} disagree: the file {problem} {key!r}.")
        found |= header
    return found


def weight_keys(directory: Path) -> set[str] | None:
    """The keys of a directory's weights; None where it has none.

    Raises:
        ValueError: the file or the index that names them is malformed.
    """
    weight_map = _weight_map(directory)
    if weight_map is not None:
        return set(weight_map)
    return set(_header(_single_file(directory))) if any(directory.glob("*.safetensors")) else None


def read_json(file: Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no JSON, nested too deeply, or no object.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON: {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a JSON {type(content).__name__}, not an object.")
    return content


def _weight_map(directory: Path) -> dict[str, str] | None:
    if not directory.is_dir():
        raise FileNotFoundError(f"There is no directory {directory}.")
    if (directory / SINGLE).exists() or not (directory / INDEX).exists():
        return None
    weight_map = read_json(directory / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise ValueError(f"{directory / INDEX} has no weight_map of keys to file names.")
    return weight_map


def _single_file(directory: Path) -> Path:
    if (directory / SINGLE).exists():
        return directory / SINGLE
    files = sorted(directory.glob("*.safetensors"))
    if len(files) == 1:
        return files[0]
    if files:
        raise ValueError(f"{directory} holds {len(files)} safetensors files and no {INDEX} to say what is where.")
    pickles = sorted(file.name for pattern in PICKLES for file in directory.glob(pattern))
    if pickles:
        raise ValueError(
            f"{directory} holds pickled weights only ({', '.join(pickles[:3])}), which can run code when opened; "
            "vlcore reads safetensors."
        )
    raise ValueError(f"{directory} holds no weights: neither {SINGLE} nor {INDEX}.")


def _shard(directory: Path, name: str, keys: set[str]) -> Path:
    if Path(name).name != name or "\\" in name or name in ("", ".", ".."):
        raise ValueError(
            f"{directory / INDEX} puts {min(keys)!r} into {name!r}, which is no file name in its directory."
        )
    if not (directory / name).exists():
        raise ValueError(f"{directory / INDEX} puts {min(keys)!r} into {name!r}, but there is no such file.")
    return directory / name


def _header(file: Path) -> dict[str, StoredTensor]:
    try:
        with safe_open(file, framework="numpy") as tensors:
            slices = {key: tensors.get_slice(key) for key in tensors.keys()}  # noqa: SIM118 (no mapping)
            return {key: StoredTensor(file, s.get_dtype(), tuple(s.get_shape())) for key, s in slices.items()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is not a readable safetensors file: {error}.") from error
