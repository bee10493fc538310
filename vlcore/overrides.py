"""Configurations out of Python files, and `key=value` changes to them, checked against their dataclasses."""

import ast
import dataclasses
import difflib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from numbers import Integral, Real
from pathlib import Path
from traceback import extract_tb
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np

SPELLINGS = {"true": True, "false": False, "none": None, "null": None}
NUMBERS, BOOLS = {int: Integral, float: Real}, (bool, np.bool_)
LARGEST_EXACT = 2**53  # of the integers that are floats
SCALARS = (bool, int, float, str, NoneType, Path)


def load(spec: str) -> Any:
    """Call the function that `spec` names, "FILE.py:FUNCTION", and return what it returns.

    The file's folder is put on the import path, as when Python runs the file itself.

    Raises:
        ValueError: `spec` has another form, the file is not there, or it has no such function.
        ValueError, OSError: what the file itself raised, with the line of it that did.
    """
    file, separator, name = spec.rpartition(":")
    path = Path(file).resolve()
    if not separator or not name.isidentifier() or path.suffix != ".py":
        raise ValueError(f"{spec!r} is not of the form FILE.py:FUNCTION.")
    if not path.is_file():
        raise ValueError(f"{spec!r}: there is no file {path}.")
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    module_spec = importlib.util.spec_from_file_location(f"vlcore_run_{path.stem}", path)
    assert module_spec is not None and module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module  # where dataclasses and pickle look for what the file defines
    with _placed(path):
        module_spec.loader.exec_module(module)
    functions = {key: value for key, value in vars(module).items() if callable(value)}
    if name not in functions:
        raise ValueError(f"{path} has no function {name!r}{_nearest(name, functions)}.")
    with _placed(path):
        return functions[name]()


@contextmanager
def _placed(path: Path) -> Iterator[None]:
    """What is raised inside of the block is said of the line of the file that it came through last."""
    try:
        yield
    except (ValueError, OSError) as error:
        frames = extract_tb(error.__traceback__)
        frame = next((frame for frame in reversed(frames) if frame.filename == str(path)), frames[-1])
        kind = OSError if isinstance(error, OSError) else ValueError
        raise kind(f"{frame.filename}, line {frame.lineno}, in {frame.name}: {error}") from error


def apply(config: Any, changes: Sequence[str]) -> Any:
    """A copy of a dataclass with fields changed, each given as "key=value".

    Args:
        config: a dataclass; what it holds may be dataclasses and tuples of them.
        changes: a key is a path of field names and tuple positions, such as "stages.0.steps"; a value is a Python
            literal or a plain word: `10`, `1e-3`, `true`, `none`, `runs/a`, `0.9,0.95`. They apply in order.

    Raises:
        ValueError: there is no such key (the nearest one is named), the value is not of the field's type (what was
            given and what is needed are named), or the dataclass refuses it.
    """
    for change in changes:
        key, separator, text = change.partition("=")
        if not separator or not key:
            raise ValueError(f"{change!r} is not of the form key=value.")
        config = _replaced(config, type(config), key.split("."), text, key)
    return config


def settle(where: str, settings: Any) -> None:
    """Give each field of a frozen dataclass the type that it is declared with; for its `__post_init__`.

    What converts exactly does: a list to a tuple, an integer to a float, NumPy's numbers to Python's.

    Args:
        where: opens the error messages.

    Raises:
        ValueError: a value is of another type, or none of the words declared.
    """
    hints = get_type_hints(type(settings))
    for field in dataclasses.fields(settings):
        value, kind = getattr(settings, field.name), hints[field.name]
        found, settled = _match_any(value, kind)
        if not found:
            # The quotes around a string say already what it is.
            given = f"{value!r:.80}" if isinstance(value, str) else f"{value!r:.80} ({type(value).__name__})"
            raise ValueError(f"{where}: {field.name} is {given}; it must be {_describe(kind)}.")
        object.__setattr__(settings, field.name, settled)


def _replaced(holder: Any, kind: Any, path: Sequence[str], text: str, key: str) -> Any:
    """`holder`, of declared type `kind`, with what `path` leads to replaced by the value that `text` spells."""
    if not path:
        return _value(text, kind, key)
    name, *rest = path
    if dataclasses.is_dataclass(holder) and not isinstance(holder, type):
        hints = get_type_hints(type(holder))
        names = [field.name for field in dataclasses.fields(holder) if field.init]
        if name not in names:
            raise ValueError(f"{key}: {type(holder).__name__} has no field {name!r}{_nearest(name, names)}.")
        value = _replaced(getattr(holder, name), hints[name], rest, text, key)
        try:
            return dataclasses.replace(holder, **{name: value})
        except ValueError as error:
            raise ValueError(f"{key}={text}: {error}") from None
    if isinstance(holder, (tuple, list)):
        if not name.isdecimal() or int(name) >= len(holder):
            raise ValueError(f"{key}: {name!r} is none of the positions 0 to {len(holder) - 1}.")
        index = int(name)
        value = _replaced(holder[index], _item_kind(kind, holder, index), rest, text, key)
        return (*holder[:index], value, *holder[index + 1 :])
    raise ValueError(f"{key}: {name!r} cannot be looked up in {holder!r}, a {type(holder).__name__}."[:300])


def _item_kind(kind: Any, holder: Sequence[Any], index: int) -> Any:
    options = [option for option in _options(kind) if get_origin(option) is tuple]
    if not options:
        return type(holder[index])
    items = get_args(options[0])
    return items[0] if items[-1] is Ellipsis else items[index]


def _value(text: str, kind: Any, key: str) -> Any:
    """The value of type `kind` that `text` spells."""
    for candidate in (_literal(text), text, [_literal(word.strip()) for word in text.split(",")]):
        found, value = _match_any(candidate, kind)
        if found:
            return value
    given, needed = _literal(text), _describe(kind, " (which only the Python file can set)")
    raise ValueError(f"{key}: given {text!r} ({type(given).__name__}), but {needed} is needed.")


def _literal(text: str) -> Any:
    if text.lower() in SPELLINGS:
        return SPELLINGS[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def _options(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)


def _match_any(value: Any, kind: Any) -> tuple[bool, Any]:
    """`_match` with the first that it can be of the kinds that a union is of."""
    matches = (_match(value, option) for option in _options(kind))
    return next((match for match in matches if match[0]), (False, value))


def _match(value: Any, kind: Any) -> tuple[bool, Any]:
    """Whether `value` is, or exactly converts to, a `kind`; and it as one."""
    if get_origin(kind) is Literal:
        return isinstance(value, str) and value in get_args(kind), value
    if get_origin(kind) is tuple:
        return _match_tuple(value, get_args(kind))
    if get_origin(kind) is Callable:
        return callable(value), value
    # To Python, True is an integer.
    if isinstance(value, BOOLS):
        return kind is bool, bool(value)
    if kind is float and isinstance(value, Integral) and abs(int(value)) > LARGEST_EXACT:
        return False, value
    if kind in NUMBERS and isinstance(value, NUMBERS[kind]):
        return True, kind(value)
    if kind is Path and isinstance(value, str):
        return True, Path(value)
    return (kind in SCALARS or dataclasses.is_dataclass(kind)) and isinstance(value, kind), value


def _match_tuple(value: Any, kinds: tuple[Any, ...]) -> tuple[bool, Any]:
    if not isinstance(value, (tuple, list)):
        return False, value
    wanted = [kinds[0]] * len(value) if kinds[-1] is Ellipsis else list(kinds)
    if len(wanted) != len(value):
        return False, value
    matches = [_match(item, kind) for item, kind in zip(value, wanted, strict=True)]
    return all(found for found, _ in matches), tuple(item for _, item in matches)


def _describe(kind: Any, note: str = "") -> str:
    """`kind` in words, with a note behind what no text can spell."""
    if get_origin(kind) in (Union, UnionType):
        return " or ".join(_describe(option, note) for option in get_args(kind))
    if get_origin(kind) is Literal:
        return " or ".join(repr(option) for option in get_args(kind))
    if get_origin(kind) is tuple:
        items = ("..." if item is Ellipsis else _describe(item, note) for item in get_args(kind))
        return f"({', '.join(items)})"
    if kind is NoneType:
        return "none"
    if kind in SCALARS:
        return kind.__name__.lower()
    return f"{getattr(kind, '__name__', kind)}{note}"


def _nearest(name: str, names: Any) -> str:
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; there are {', '.join(names)}"
