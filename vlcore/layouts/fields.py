"""A JSON object of a config.json whose fields are checked as they are read."""

from typing import Any

Json = dict[str, Any]


class Fields:
    """`raw`, with `where` to open the error messages."""

    def __init__(self, raw: Json, where: str):
        self.raw, self.where = raw, where

    def get(self, name: str, default: Any) -> Any:
        """The field; `default` where it is missing or null, whose type it must have otherwise."""
        value = self.raw.get(name)
        if value is None:
            return default
        if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        if isinstance(default, tuple) and isinstance(value, list):
            return tuple(Fields({name: item}, self.where).get(name, default[0]) for item in value)
        if type(value) is not type(default) or (isinstance(value, int) and value < 0):
            expected = f"{type(default).__name__} such as {default!r}"
            raise ValueError(f"{self.where}: {name} is {value!r}; it should be {expected}.")
        return value

    def section(self, name: str) -> "Fields":
        """The object that a field holds; an empty one where it is missing or null."""
        value = self.raw.get(name)
        value = {} if value is None else value
        if not isinstance(value, dict):
            raise ValueError(f"{self.where}: {name} is {value!r}; it should be an object.")
        return Fields(value, f"{self.where}: {name}")

    def require(self, name: str, wanted: Any, default: Any) -> None:
        """Refuse any value of a field but the one that this package computes; missing or null, it is `default`."""
        value = self.raw.get(name)
        given = f"is left out, which stands for {default!r}" if value is None else f"is {value!r}"
        if (default if value is None else value) != wanted:
            raise ValueError(f"{self.where}: {name} {given}; this package computes {wanted!r} only.")

    def side(self, name: str, default: int) -> int:
        """A length that may be written as a pair of equal ones."""
        value = self.raw.get(name)
        if isinstance(value, list) and len(value) == 2 and value[0] == value[1]:
            return Fields({name: value[0]}, self.where).get(name, default)
        return self.get(name, default)

    def color(self, name: str, default: tuple) -> tuple:
        """Three numbers, one a channel."""
        if len(value := self.get(name, default)) != 3:
            raise ValueError(f"{self.where}: {name} is {list(value)!r}; it should be three numbers, one a channel.")
        return value
