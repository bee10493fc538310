"""Run the C++ kernels' tests with a build that stops at reads and writes past a tensor: `make sanitize`.

Expects that build first on the path and the sanitizer's library preloaded. First it proves that an access one element
too far would be seen; then it runs the tests of every operator that has a "cpp" kernel, but for their other backends,
and those of what else is C++.
"""

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from vlcore import native

TESTS = Path(__file__).parent
PROGRAM = """
import sys, torch
from vlcore import native
native.level = int(sys.argv[1])
x, y = torch.zeros(49), torch.zeros(49)
native.run_cpp("swiglu_forward", x.dtype, x, x, y, int(sys.argv[2]))
"""


class OnlyCpp:
    """Of a parametrised test, leaves out the cases of other backends."""

    OTHERS = {"torch", "triton", "cuda", "xformers"}

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        others = [item for item in items if self.OTHERS & self._strings(item)]
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if item not in others]

    @staticmethod
    def _strings(item: pytest.Item) -> set[str]:
        parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
        return {value for value in parameters if isinstance(value, str)}


def sees_an_overflow(level: int) -> bool:
    """Whether reading one element past a tensor ends the process with the sanitizer's report, and reading all not."""
    right, wrong = (
        subprocess.run([sys.executable, "-c", PROGRAM, str(level), size], capture_output=True, text=True)
        for size in ("49", "50")
    )
    return right.returncode == 0 and wrong.returncode != 0 and "heap-buffer-overflow" in wrong.stderr


def main() -> int:
    if native.cpp is None or "sanitize" not in Path(native.cpp.__file__).parts:
        raise SystemExit(f"{native.cpp} is no sanitizer's build: run `make sanitize`.")
    for level in range(native.level + 1):
        if not sees_an_overflow(level):
            raise SystemExit(f"The sanitizer does not see a kernel of level {level} read past a tensor.")
    operators = [path.stem.removeprefix("test_") for path in sorted(TESTS.glob("test_*.py"))]
    known = [name for name in operators if (TESTS.parent / "vlcore" / "ops" / f"{name}.py").exists()]
    tested = [name for name in known if "cpp" in getattr(import_module(f"vlcore.ops.{name}"), "KERNELS", {})]
    print(f"Every level's overflow is seen. Testing {', '.join(tested)}.", flush=True)
    # What launches kernels of Triton is C++ too.
    files = [str(TESTS / f"test_{name}.py") for name in (*tested, "direct_launch", "native")] + [str(TESTS / "replay")]
    # Output that is captured would be lost with the process that the sanitizer ends.
    return pytest.main(["-q", "-x", "--capture=no", "-p", "no:cacheprovider", *sys.argv[1:], *files], [OnlyCpp()])


if __name__ == "__main__":
    sys.exit(main())
