"""Triton's kernels compiled for a GPU that is not there: run by bench/gpu_code.py in a process of its own.

The operators are called on the benches' inputs, on the CPU; where a launcher would launch, the kernel is compiled.
"""

import json
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from importlib import import_module
from typing import Any

from vlcore.bench import machine_code
from vlcore.bench.dtypes import DTYPES, TF32, computing_in
from vlcore.bench.gpu_cases import gpu_cases
from vlcore.bench.harness import Case, Maker, values
from vlcore.bench.launches import Entry, Tried, Watcher, watched
from vlcore.bench.shapes_only import ShapesOnly
from vlcore.bench.stand_in import Driver, in_place_of_a_gpu
from vlcore.kernels import launch

MEASURES = ("registers", "spills", "stack", "shared", "warps", "waits")
# A product that tensor cores compute, of 16-bit tiles or in TF32, in Triton's own language, and its rows.
IN_TF32 = "inputPrecision = tf32"
DOT = re.compile(rf"tt\.dot\b.*(?:: tensor<(\d+)x\d+x(?:bf16|f16)>|{IN_TF32} : tensor<(\d+)x\d+xf32>)")

Record = dict[str, Any]


def compiled(case: Case, dtype: str, tried: Tried | None = None) -> list[Record]:
    """A record of each kernel that a case launches; `tried` are other settings than the tables'."""
    made: dict[int, tuple[Any, Record]] = {}

    def compile_instead(kernel: str, entry: Entry | None, go: Callable[..., Any]) -> Any:
        binary = go(warmup=True)
        # What multiplies nothing in TF32 is float32's.
        if id(binary) not in made and (dtype != TF32 or IN_TF32 in binary.asm["ttir"]):
            table = f"{entry.operator}.{entry.kernel}" if entry else None
            found = {"operator": case.operator, "kernel": kernel, "dtype": dtype}
            made[id(binary)] = binary, found | {"table": table, "entry": entry and entry.index} | _measured(binary)
        return binary

    called(case, dtype, compile_instead, tried)
    return [record for _, record in made.values()]


def called(case: Case, dtype: str, watcher: Watcher, tried: Tried | None = None) -> None:
    """A case on "triton" without arithmetic, with a watcher of its launches."""
    with ShapesOnly(), computing_in(dtype):
        inputs = case.inputs(Maker(DTYPES[dtype], "cpu"))
        with watched(watcher, tried):
            values(case, case.on("triton"), inputs if isinstance(inputs, tuple) else inputs[0])


def _measured(binary) -> Record:
    (function,) = machine_code.functions(binary.asm["cubin"])
    return {
        "registers": function.registers,
        "spills": function.spills,
        "stack": function.stack,
        "shared": binary.metadata.shared,
        "warps": binary.metadata.num_warps,
        "tensor": function.tensor,
        "waits": function.waits,
        "dot_rows": max((int(a or b) for a, b in DOT.findall(binary.asm["ttir"])), default=0),
    }


def worst(records: Sequence[Record]) -> list[Record]:
    """One record of all that differ in measure alone, as where a size happens to be a multiple of 16: the most of what
    costs, the least of what pays."""
    kept: dict[str, Record] = {}
    for record in records:
        key = json.dumps({name: value for name, value in record.items() if name not in (*MEASURES, "tensor")})
        seen = kept.setdefault(key, dict(record))
        seen |= {name: max(seen[name], record[name]) for name in MEASURES}
        common = seen["tensor"].keys() & record["tensor"].keys()
        seen["tensor"] = {name: min(seen["tensor"][name], record["tensor"][name]) for name in sorted(common)}
    return list(kept.values())


def compile_all(architecture: str, operators: Sequence[str], dtypes: Sequence[str]) -> dict[str, list]:
    """The records of these operators, and in words what there is none of."""
    import triton

    records, failures = [], []
    with in_place_of_a_gpu(Driver(int(architecture.removeprefix("sm_"))), architecture):
        for operator in operators:
            if "triton" not in import_module(f"vlcore.ops.{operator}").KERNELS:
                continue
            for case in gpu_cases(operator):
                for dtype in dtypes:
                    what = f"{case.title}, {case.shape}, {dtype}, {architecture}, Triton {triton.__version__}"
                    try:
                        records += compiled(case, dtype)
                    except Exception as error:  # a compiler raises anything; all of them are reported, and none is lost
                        failures.append(f"{what}: {type(error).__name__}: {error}")
    known = {"triton": triton.__version__, "architecture": architecture}
    return {"records": [known | record for record in worst(records)], "failures": failures}


if __name__ == "__main__":
    assert not launch.INTERPRETED, "Triton's interpreter compiles nothing."
    with redirect_stdout(sys.stderr):
        result = compile_all(**json.loads(sys.argv[1]))
    json.dump(result, sys.stdout)
