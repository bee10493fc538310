"""The C++ kernels beside what a user would run instead: python bench/cpu_operators.py [FILE.json]

The shapes are DeepSeek-VL's. A kernel is held against float64 first, as in the tests, and only then takes turns with
its peers in one process.
"""

import json
import sys
from collections.abc import Callable, Iterator
from itertools import count as count_from
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timing import machine, medians

from vlcore import ops

sys.path.append(str(Path(__file__).parent.parent / "tests"))
from accuracy import assert_as_accurate  # noqa: E402 - the tests' rule, from the tests

DTYPES = (torch.bfloat16, torch.float32)


class Case(NamedTuple):
    """One comparison.

    Attributes:
        run: takes the backend's name.
        peers: what a user would run instead, by name.
        exact: the same computed in float64.
        timed: in place of run when time is taken, where each call needs inputs of its own.
    """

    operator: str
    shape: str
    run: Callable
    peers: dict[str, Callable]
    exact: Callable
    repeats: int = 30
    timed: Callable | None = None


def main() -> None:
    results = {"machine": machine(), "cases": []}
    print(results["machine"], "; milliseconds, and how many times as fast the C++ kernel is", sep="")
    for dtype in DTYPES:
        for case in cases(dtype):
            with torch.inference_mode():
                result = measure(case, dtype)
            results["cases"].append(result)
            columns = (f"{name} {time:.3f} ({time / result['ms']['cpp']:.2f}x)" for name, time in result["ms"].items())
            print(f"{case.operator:18} {case.shape:22} {str(dtype)[6:]:9}", *columns, sep="  ", flush=True)
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(json.dumps(results, indent=1) + "\n")


def measure(case: Case, dtype: torch.dtype) -> dict:
    assert_as_accurate(case.run("cpp"), case.run("torch"), case.exact())
    run = case.timed or case.run
    functions = {"cpp": lambda: run("cpp"), "torch backend": lambda: run("torch"), **case.peers}
    milliseconds = {name: round(time * 1e3, 4) for name, time in medians(functions, repeats=case.repeats).items()}
    return {"operator": case.operator, "shape": case.shape, "dtype": str(dtype)[6:], "ms": milliseconds}


def cases(dtype: torch.dtype) -> Iterator[Case]:
    torch.manual_seed(0)
    yield from vision(dtype)
    yield from norms(dtype)
    yield from decoding(dtype)


def vision(dtype: torch.dtype) -> Iterator[Case]:
    """One image in SAM-B: a global block, and a block of windows."""
    q, k, v = (torch.randn(1, 12, 4096, 64).to(dtype) for _ in range(3))
    tables = [(torch.randn(127, 64) * 0.1).to(dtype) for _ in range(2)]
    # The strongest peer: scores' bias prebuilt, and not counted.
    bias = torch.randn(1, 12, 4096, 4096).to(dtype)
    yield Case(
        "rel_pos_attention",
        "12 x 4096 x 64",
        lambda backend: ops.rel_pos_attention(q, k, v, *tables, (64, 64), backend=backend),
        {"SDPA, dense bias at hand": lambda: F.scaled_dot_product_attention(q, k, v, bias)},
        lambda: ops.rel_pos_attention(*(t.double() for t in (q, k, v, *tables)), (64, 64)),
        repeats=5,
    )
    qkv, padding = torch.randn(1, 64, 64, 3, 12, 64).to(dtype), torch.randn(3, 12, 64).to(dtype)
    narrow = [(torch.randn(27, 64) * 0.1).to(dtype) for _ in range(2)]
    yield Case(
        "window_attention",
        "12 x 64 x 64 x 64",
        lambda backend: ops.window_attention(qkv, padding, *narrow, backend=backend),
        {},
        lambda: ops.window_attention(*(t.double() for t in (qkv, padding, *narrow))),
        repeats=10,
    )


def norms(dtype: torch.dtype) -> Iterator[Case]:
    """A prompt of 1088 tokens in the 1.3B, and one token of it."""
    for rows in (1, 1088):
        x, y, weight, shift = (torch.randn(size).to(dtype) for size in ((rows, 2048), (rows, 2048), 2048, 2048))
        yield Case(
            "rms_norm",
            f"{rows} x 2048",
            lambda backend, x=x, weight=weight: ops.rms_norm(x, weight, backend=backend),
            {"F.rms_norm": lambda x=x, weight=weight: F.rms_norm(x, (2048,), weight, 1e-6)},
            lambda x=x, weight=weight: ops.rms_norm(x.double(), weight.double()),
        )
        yield Case(
            "add_rms_norm",
            f"{rows} x 2048",
            lambda backend, x=x, y=y, weight=weight: ops.add_rms_norm(x, y, weight, backend=backend)[0],
            {"+, F.rms_norm": lambda x=x, y=y, weight=weight: F.rms_norm(x + y, (2048,), weight, 1e-6)},
            lambda x=x, y=y, weight=weight: ops.add_rms_norm(x.double(), y.double(), weight.double())[0],
        )
        yield Case(
            "layer_norm",
            f"{rows} x 2048",
            lambda backend, x=x, w=weight, b=shift: ops.layer_norm(x, w, b, backend=backend),
            {"F.layer_norm": lambda x=x, w=weight, b=shift: F.layer_norm(x, (2048,), w, b, 1e-6)},
            lambda x=x, w=weight, b=shift: ops.layer_norm(x.double(), w.double(), b.double()),
        )
        gate, up = (torch.randn(rows, 5632).to(dtype) for _ in range(2))
        yield Case(
            "swiglu",
            f"{rows} x 5632",
            lambda backend, gate=gate, up=up: ops.swiglu(gate, up, backend=backend),
            {"F.silu, *": lambda gate=gate, up=up: F.silu(gate) * up},
            lambda gate=gate, up=up: ops.swiglu(gate.double(), up.double()),
        )


def decoding(dtype: torch.dtype) -> Iterator[Case]:
    """One token of the 1.3B: its matrix products, and attention over a cache."""
    for outputs, inputs in ((2048, 2048), (5632, 2048), (2048, 5632), (102400, 2048)):
        # As many weights as do not fit a cache, taken in turn: a step reads each from memory.
        count = max(1, 300_000_000 // (outputs * inputs * dtype.itemsize))
        weights = [torch.randn(outputs, inputs).to(dtype) for _ in range(count)]
        x, turns = torch.randn(1, inputs).to(dtype), count_from(0)
        yield Case(
            "linear",
            f"1 x {inputs} -> {outputs}",
            lambda backend, x=x, ws=weights: ops.linear(x, ws[0], backend=backend),
            {},
            lambda x=x, ws=weights: ops.linear(x.double(), ws[0].double()),
            timed=lambda backend, x=x, ws=weights, t=turns: ops.linear(x, ws[next(t) % len(ws)], backend=backend),
        )
    for length in (640, 1088):
        q, k, v = (torch.randn(1, 1, 16, 128).to(dtype) for _ in range(3))
        caches = [torch.randn(1, 1200, 16, 128).to(dtype) for _ in range(2)]
        lengths = torch.tensor([length])
        yield Case(
            "decode_attention",
            f"16 x 128, {length} keys",
            lambda backend, g=(q, k, v, *caches, lengths): ops.decode_attention(*g, backend=backend),
            {},
            lambda g=(q, k, v, *caches), n=lengths: ops.decode_attention(*(t.double() for t in g), n),
        )


if __name__ == "__main__":
    main()
