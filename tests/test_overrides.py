"""Changes by key: what they reach, what they take, and what each refusal says."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from vlcore import overrides


@dataclass(frozen=True, kw_only=True)
class Inner:
    steps: int = 1
    rate: float = 0.1
    kind: Literal["cosine", "step"] = "cosine"
    betas: tuple[float, float] = (0.9, 0.95)
    trains: tuple[str, ...] = ("a",)
    hook: object = None

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"Inner: steps is {self.steps}; it must be at least 1.")


@dataclass(frozen=True, kw_only=True)
class Outer:
    stages: tuple[Inner, ...] = (Inner(), Inner())
    one: Inner = field(default_factory=Inner)
    model: Inner | str | Path = "demo"
    folder: str | Path = "runs"
    path: Path = Path("x")
    flag: bool = False
    every: int | None = None
    name: str = "n"
    mode: bool | str = False


@pytest.mark.parametrize(
    "change, reached, value",
    [
        ("stages.1.steps=10", lambda c: c.stages[1].steps, 10),
        ("stages.0.rate=1e-3", lambda c: c.stages[0].rate, 1e-3),
        ("one.rate=2", lambda c: c.one.rate, 2.0),
        ("one.kind=step", lambda c: c.one.kind, "step"),
        ("one.betas=0.8,0.9", lambda c: c.one.betas, (0.8, 0.9)),
        ("one.betas=(0.8, 1)", lambda c: c.one.betas, (0.8, 1.0)),
        ("one.betas.1=0.5", lambda c: c.one.betas, (0.9, 0.5)),
        ("one.trains=adaptor,language", lambda c: c.one.trains, ("adaptor", "language")),
        ("one.trains=adaptor", lambda c: c.one.trains, ("adaptor",)),
        ("flag=true", lambda c: c.flag, True),
        ("flag=False", lambda c: c.flag, False),
        ("every=3", lambda c: c.every, 3),
        ("every=none", lambda c: c.every, None),
        ("name=12", lambda c: c.name, "12"),
        ("name=a=b", lambda c: c.name, "a=b"),
        ("path=/a/b", lambda c: c.path, Path("/a/b")),
        ("folder=runs/a", lambda c: c.folder, "runs/a"),
        ("model=deepseek", lambda c: c.model, "deepseek"),
        ("mode=true", lambda c: c.mode, True),
        ("mode=aot_eager", lambda c: c.mode, "aot_eager"),
    ],
)
def test_a_value_arrives_where_it_is_sent_with_the_fields_type(change, reached, value):
    before = Outer()
    after = overrides.apply(before, [change])
    assert reached(after) == value and type(reached(after)) is type(value)
    assert before == Outer()


def test_changes_apply_in_order_and_leave_the_rest():
    changed = overrides.apply(Outer(), ["stages.0.steps=5", "stages.0.steps=6", "stages.0.kind=step"])
    assert changed == Outer(stages=(Inner(steps=6, kind="step"), Inner()))
    assert overrides.apply(Outer(), []) == Outer()


@pytest.mark.parametrize(
    "change, message",
    [
        ("stages.0.stpes=3", "stages.0.stpes: Inner has no field 'stpes'; did you mean 'steps'?"),
        ("flga=true", "flga: Outer has no field 'flga'; did you mean 'flag'?"),
        ("one.zzzz=1", "Inner has no field 'zzzz'; there are steps, rate, kind, betas, trains, hook"),
        ("stages.2.steps=3", "stages.2.steps: '2' is none of the positions 0 to 1."),
        ("stages.first.steps=3", "'first' is none of the positions 0 to 1."),
        ("name.x=3", "name.x: 'x' cannot be looked up in 'n', a str."),
        ("stages.0.steps=ten", "stages.0.steps: given 'ten' (str), but int is needed."),
        ("stages.0.steps=1.5", "given '1.5' (float), but int is needed."),
        ("stages.0.steps=true", "given 'true' (bool), but int is needed."),
        ("one.rate=fast", "given 'fast' (str), but float is needed."),
        ("one.kind=linear", "given 'linear' (str), but 'cosine' or 'step' is needed."),
        ("one.betas=0.9", "given '0.9' (float), but (float, float) is needed."),
        ("one.betas=0.9,x", "but (float, float) is needed."),
        ("flag=1", "flag: given '1' (int), but bool is needed."),
        ("every=often", "given 'often' (str), but int or none is needed."),
        ("one=3", "one: given '3' (int), but Inner (which only the Python file can set) is needed."),
        ("stages=3", "but (Inner (which only the Python file can set), ...) is needed."),
        ("stages.0.steps=0", "stages.0.steps=0: Inner: steps is 0; it must be at least 1."),
        ("stages.0.steps", "'stages.0.steps' is not of the form key=value."),
        ("=3", "'=3' is not of the form key=value."),
    ],
)
def test_a_refusal_says_what_was_given_and_what_is_needed(change, message):
    with pytest.raises(ValueError) as caught:
        overrides.apply(Outer(), [change])
    assert message in str(caught.value)


@pytest.fixture
def file(tmp_path):
    (tmp_path / "shared_settings.py").write_text("STEPS = 7\n")
    path = tmp_path / "runs.py"
    path.write_text(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "from shared_settings import STEPS\n"
        "CONSTANT = 3\n"
        "@dataclass(frozen=True)\n"
        "class Run:\n"
        "    steps: int | None = STEPS\n"
        "def small():\n"
        "    return Run()\n"
    )
    return path


@pytest.mark.parametrize(
    "body, error, message",
    [
        ("    return int('x')", ValueError, "line 3, in small: invalid literal for int() with base 10: 'x'"),
        ("    return nested()", ValueError, "line 5, in nested: invalid literal for int() with base 10: 'x'"),
        ("    return open('/nowhere/at/all')", OSError, "line 3, in small: [Errno 2] No such file or directory: "),
        ("    return Fraction('x')", ValueError, "line 3, in small: Invalid literal for Fraction: 'x'"),
        ("    return 3\nint('x')", ValueError, "line 4, in <module>: invalid literal for int() with base 10: 'x'"),
    ],
)
def test_what_a_file_fails_at_is_told_with_its_line(tmp_path, body, error, message):
    path = tmp_path / "runs.py"
    path.write_text(f"from fractions import Fraction\ndef small():\n{body}\ndef nested():\n    return int('x')\n")
    with pytest.raises(error) as caught:
        overrides.load(f"{path}:small")
    assert f"{path}, {message}" in str(caught.value)


def test_a_function_of_a_file_is_called_with_its_folder_importable(file):
    run = overrides.load(f"{file}:small")
    assert dataclasses.asdict(run) == {"steps": 7}
    assert overrides.apply(run, ["steps=none"]).steps is None


@pytest.mark.parametrize(
    "spec, message",
    [
        ("{file}", "is not of the form FILE.py:FUNCTION"),
        ("{file}:", "is not of the form FILE.py:FUNCTION"),
        ("{file}:a b", "is not of the form FILE.py:FUNCTION"),
        ("{file}.txt:small", "is not of the form FILE.py:FUNCTION"),
        ("{file}x.py:small", "there is no file .*x.py"),
        ("{file}:smal", "has no function 'smal'; did you mean 'small'?"),
        ("{file}:CONSTANT", "has no function 'CONSTANT'"),
    ],
)
def test_a_bad_spec_is_refused(file, spec, message):
    with pytest.raises(ValueError, match=message):
        overrides.load(spec.format(file=file))
