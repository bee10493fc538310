"""The GPU kernels' machine code, made and looked at where there is no GPU: `make gpu-code`.

Every Triton kernel is compiled ahead of time, for each architecture and with each entry of its launch table, by running
the real launchers on the benches' inputs with the launch replaced by a compilation: what is compiled is what users
launch. csrc/cuda/ is compiled by nvcc. tests/test_gpu_code.py holds the limits over bench/results/gpu_code.json.
"""

import argparse
import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from vlcore.bench.command import benched
from vlcore.bench.dtypes import DTYPES
from vlcore.bench.machine_code import compile_cuda
from vlcore.bench.report import RESULTS

ROOT = Path(__file__).resolve().parent.parent
FILE = RESULTS / "gpu_code.json"
# Of launch tables -> what nvcc compiles for, which has instructions that the plain one lacks.
ARCHITECTURES = {"sm_80": "sm_80", "sm_90": "sm_90a", "sm_100": "sm_100a"}
# The oldest that pyproject.toml allows; `make gpu-code` puts it here, beside the usual one.
OLDEST_TRITON = ROOT / "build" / "triton-3.6.0"
CACHE = ROOT / "build" / "triton-cache"
PROCESSES = 2
# Of kernels/: what looks up how to launch, and launches.
HOST_ONLY = ("launch.py", "direct_launch.py", "replay.py")

Record = dict[str, Any]


@dataclass
class Found:
    """What is known of the kernels' machine code.

    Attributes:
        sources: of each operator, what its records follow from besides the compilers: files, and a hash of each.
        triton, cuda: a record for each kernel, in the order of the operators.
        failures: in words, what there is no record of.
    """

    sources: dict[str, dict[str, str]] = field(default_factory=dict)
    triton: list[Record] = field(default_factory=list)
    cuda: list[Record] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def updated(self, other: "Found") -> "Found":
        """With the other's records in place of one's own of the same operators."""

        def merged(name: str) -> list[Record]:
            mine = [record for record in getattr(self, name) if record["operator"] not in other.sources]
            return sorted(mine + getattr(other, name), key=lambda record: record["operator"])

        sources = dict(sorted((self.sources | other.sources).items()))
        return Found({name: files for name, files in sources.items() if files}, merged("triton"), merged("cuda"))

    def missing(self) -> list[str]:
        """In words, the entries of launch tables that nothing was launched with."""
        reached = {(record["table"], record["entry"], record["architecture"]) for record in self.triton}
        return [
            f"No case in bench/gpu_cases.py launches {path.stem}'s {kernel} with entry {index} of {architecture}."
            for path in sorted(ROOT.glob("kernels/*.json"))
            for kernel, table in json.loads(path.read_text()).items()
            for architecture, entries in table.items()
            for index in range(len(entries))
            if (f"{path.stem}.{kernel}", index, architecture) not in reached
        ]

    def write(self, path: Path) -> None:
        """A line for each kernel, as a row of a table."""
        parts = [f'"sources": {json.dumps(self.sources, indent=1)}']
        for name in ("triton", "cuda"):
            records = getattr(self, name)
            columns = list(records[0]) if records else []
            rows = ",\n".join(json.dumps([record[column] for column in columns]) for record in records)
            parts.append(f'"{name}": {{"columns": {json.dumps(columns)}, "rows": [\n{rows}\n]}}')
        path.write_text("{" + ",\n".join(parts) + "}\n")


def read(path: Path) -> Found:
    """A file that `Found.write` wrote."""
    whole = json.loads(path.read_text())
    triton, cuda = (
        [dict(zip(whole[name]["columns"], row, strict=True)) for row in whole[name]["rows"]]
        for name in ("triton", "cuda")
    )
    return Found(whole["sources"], triton, cuda)


def sources(operator: str) -> dict[str, str]:
    """The files of an operator's GPU kernels, and a hash of each, but for those that no compiled kernel depends on."""
    files: set[Path] = set()
    left = {ROOT / "kernels" / f"{operator}.py", ROOT / "csrc" / "cuda" / f"{operator}.cu"}
    while left:
        file = left.pop()
        if file.exists() and file not in files and file.name not in HOST_ONLY:
            files |= {file, *ROOT.glob(f"kernels/{file.stem}.json")}
            left |= _imported(file) if file.suffix == ".py" else _included(file)
    return {str(path.relative_to(ROOT)): sha256(path.read_bytes()).hexdigest()[:16] for path in sorted(files)}


def _imported(file: Path) -> set[Path]:
    """The other files of kernels/ that one imports."""
    stems = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.level == 1 or (node.module or "").startswith("vlcore.kernels")):
            stem = (node.module or "").removeprefix("vlcore.kernels").removeprefix(".")
            stems |= {stem} if stem else {alias.name for alias in node.names}
    return {file.parent / f"{stem}.py" for stem in stems}


def _included(file: Path) -> set[Path]:
    """The files of csrc/ that one includes, which are named from its folder or from csrc/."""
    names = re.findall(r'^#include "(.+)"', file.read_text(), re.MULTILINE)
    return {(folder / name).resolve() for folder in (file.parent, ROOT / "csrc") for name in names}


def triton_records(triton: Path | None, architecture: str, operators: Sequence[str], dtypes: Sequence[str]) -> dict:
    """What bench/ahead_of_time.py finds with the Triton in a folder, or (None) with the usual one.

    It runs in a process of its own: a process has one Triton, and one GPU that it takes itself to have."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(CACHE)
    if triton is not None:
        environment["PYTHONPATH"] = os.pathsep.join([str(triton), environment.get("PYTHONPATH", "")])
    chosen = json.dumps({"architecture": architecture, "operators": operators, "dtypes": dtypes})
    command = [sys.executable, "-m", "vlcore.bench.ahead_of_time", chosen]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return json.loads(done.stdout)


def cuda_records(operators: Sequence[str], architecture: str) -> list[Record]:
    """Of csrc/cuda/.

    Raises:
        ValueError: there are files to compile, and nvcc is not there or refuses them.
    """
    records = []
    for file in sorted(ROOT.glob("csrc/cuda/*.cu")):
        if file.stem in operators:
            for function in compile_cuda(file, ROOT / "csrc", ARCHITECTURES[architecture]):
                found = {"operator": file.stem, "kernel": function.name, "architecture": architecture}
                names = ("registers", "spills", "stack", "shared", "tensor", "waits")
                records.append(found | {name: getattr(function, name) for name in names})
    return records


def find(operators: Sequence[str], architectures: Sequence[str], tritons: Mapping[Path | None, Sequence[str]]) -> Found:
    """Compile these; `tritons` are folders, or None for the usual one, with the dtypes to compile for."""
    found = Found({operator: sources(operator) for operator in operators})
    with ThreadPoolExecutor(PROCESSES) as pool:
        runs = [
            pool.submit(triton_records, triton, architecture, operators, dtypes)
            for triton, dtypes in tritons.items()
            for architecture in architectures
        ]
        cuda = [pool.submit(cuda_records, operators, architecture) for architecture in architectures]
        for done in runs:
            found.triton += done.result()["records"]
            found.failures += done.result()["failures"]
        found.cuda = [record for done in cuda for record in done.result()]
    return found


def line(record: Record) -> str:
    """A record for a terminal."""
    names = ("operator", "kernel", "triton", "architecture", "dtype")
    entry = [f"{record['table']}[{record['entry']}]"] if record.get("table") else []
    measured = [f"{record[name]} {name}" for name in ("registers", "spills", "shared", "warps") if name in record]
    tensor = [f"{count} {name}" for name, count in record["tensor"].items()]
    tensor += [f"{record['waits']} waits"] if record["waits"] else []
    return "  ".join([*(str(record[name]) for name in names if name in record), *entry, *measured, *tensor])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m vlcore.bench.gpu_code", description=__doc__)
    parser.add_argument("operators", nargs="*", metavar="OP", help="operators of vlcore.ops (default: all)")
    parser.add_argument(
        "--architecture", action="append", choices=ARCHITECTURES, help="only this, and nothing is written"
    )
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="only this, and nothing is written")
    parser.add_argument("--usual-triton", action="store_true", help="only this, and nothing is written")
    arguments = parser.parse_args(argv)
    if strays := set(arguments.operators) - set(benched()):
        parser.error(f"There are no operators {sorted(strays)} that have a bench.")
    if not (arguments.usual_triton or OLDEST_TRITON.exists()):
        parser.error(f"{OLDEST_TRITON} is not there: `make gpu-code` installs it.")
    dtypes = arguments.dtype or list(DTYPES)
    found = find(
        arguments.operators or benched(),
        arguments.architecture or list(ARCHITECTURES),
        {None: dtypes}
        if arguments.usual_triton
        else {None: dtypes, OLDEST_TRITON: [x for x in dtypes if x != "float16"]},
    )
    for record in [*found.triton, *found.cuda]:
        print(line(record))
    if not (found.failures or arguments.architecture or arguments.dtype or arguments.usual_triton):
        kept = read(FILE) if arguments.operators and FILE.exists() else Found()
        found = kept.updated(found)
        found.write(FILE)
        # A table may be another operator's too: what is not reached shows when all are known.
        if not arguments.operators:
            found.failures += found.missing()
    kernels = [*found.triton, *found.cuda]
    spilling = sum(1 for record in kernels if record["spills"])
    print(f"{len(kernels)} kernels, of which {spilling} spill registers", file=sys.stderr)
    for failure in found.failures:
        print(failure, file=sys.stderr)
    return 1 if found.failures else 0


if __name__ == "__main__":
    sys.exit(main())
