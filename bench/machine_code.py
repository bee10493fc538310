"""What stands in a compiled GPU kernel: registers, spills, shared memory, and the tensor cores' instructions."""

import re
import shutil
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

# The tensor cores' instructions: Ampere's HMMA, Hopper's HGMMA, Blackwell's UTCHMMA, and theirs for other dtypes.
TENSOR = re.compile(r"\b([HIQBD]G?MMA|UTC\w*MMA)\b")
# What waits for HGMMA. One that is waited for before the next of its product is issued runs at a fraction of its rate.
WAIT = re.compile(r"\bWARPGROUP\.DEPBAR\b")
SPILL = re.compile(r"\s(LDL|STL)\b")
FUNCTION = re.compile(r"Function\s*:?\s*([\w$.]+)\s*:?")
USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


@dataclass(frozen=True)
class Function:
    """One kernel of a cubin.

    Attributes:
        registers: of a thread.
        spills: instructions that write registers to memory or read them back.
        stack: bytes of a thread's own memory.
        shared: bytes of a block's memory that are set aside when it is compiled, and not at its launch.
        tensor: how many there are of each of the tensor cores' instructions.
        waits: how many there are that wait for Hopper's.
    """

    name: str
    registers: int
    spills: int
    stack: int
    shared: int
    tensor: dict[str, int]
    waits: int


def functions(cubin: bytes) -> list[Function]:
    """The kernels of a cubin, as the cuobjdump that comes with Triton reads it."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, listing = (_by_function(_dump(what, file.name)) for what in ("-res-usage", "-sass"))
    return [_function(name, usage[name], listing[name]) for name in usage]


def _function(name: str, usage: str, listing: str) -> Function:
    found = USAGE.search(usage)
    assert found, usage
    registers, stack, shared, local = map(int, found.groups())
    tensor = dict(sorted(Counter(TENSOR.findall(listing)).items()))
    spills, waits = (len(pattern.findall(listing)) for pattern in (SPILL, WAIT))
    return Function(name, registers, spills, stack + local, shared, tensor, waits)


def _by_function(text: str) -> dict[str, str]:
    _, *parts = FUNCTION.split(text)
    return dict(zip(parts[::2], parts[1::2], strict=True))


def _dump(what: str, file: str) -> str:
    triton = find_spec("triton")
    assert triton and triton.origin
    program = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([program, what, file], capture_output=True, text=True, check=True).stdout


def compile_cuda(file: Path, include: Path, architecture: str) -> list[Function]:
    """The kernels of a .cu file, compiled with the flags of setup.py.

    Args:
        architecture: such as "sm_90a", whose own instructions (wgmma) "sm_90" does not have.

    Raises:
        ValueError: nvcc is not there, or does not take the file.
    """
    if shutil.which("nvcc") is None:
        raise ValueError(f"{file} cannot be compiled: nvcc is not on PATH.")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        options = ["-cubin", "-O3", "-std=c++17", f"-arch={architecture}", f"-I{include}", "-o", cubin.name]
        done = subprocess.run(["nvcc", *options, file], capture_output=True, text=True)
        if done.returncode:
            raise ValueError(f"{file} cannot be compiled for {architecture}:\n{done.stderr}")
        found = functions(Path(cubin.name).read_bytes())
    mangled = "\n".join(function.name for function in found)
    names = subprocess.run(["c++filt"], input=mangled, capture_output=True, text=True, check=True).stdout.splitlines()
    # An unnamed namespace bears a hash of the file's path.
    names = [re.sub(r"_GLOBAL__N__\w+::", "", name) for name in names]
    found = [replace(function, name=name) for function, name in zip(found, names, strict=True)]
    return sorted(found, key=lambda function: function.name)
