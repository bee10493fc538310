"""The kernels of csrc/cuda/ on a CPU, as they are written: the host's C++ compiler takes them, with what stands in this
folder in place of instructions.h. It finds wrong sums, places and barriers, and says nothing of speed."""

import fcntl
import hashlib
import os
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pybind11

from vlcore import native

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
CSRC = ROOT / "csrc"
# Where headers are looked for, in that order: this folder's cuda/instructions.h goes before that of csrc/.
FOLDERS = [HERE, CSRC, Path(pybind11.get_include()), Path(sysconfig.get_path("include"))]
COMPILE = [
    *(os.environ.get("CXX", "g++"), "-x", "c++", "-c", "-std=c++17", "-O1", "-fPIC", "-pthread"),
    # Fibers leave stacks by longjmp.
    *("-U_FORTIFY_SOURCE", "-Wno-unknown-pragmas", '-DVLCORE_CUDA_ARCHS="a CPU"'),
    *(f"-I{folder}" for folder in FOLDERS),
]


def compiled(sources: list[Path], name: str) -> Path:
    """A library of these, compiled where they or what they include have changed."""
    files = sorted([*HERE.glob("**/*.h"), *CSRC.glob("*.h"), *CSRC.glob("cuda/*.h"), *sources])
    content = b"".join(file.read_bytes() for file in files) + " ".join(COMPILE).encode()
    folder = ROOT / "build" / "cuda_on_cpu" / hashlib.sha256(content).hexdigest()[:16]
    library = folder / name
    folder.mkdir(parents=True, exist_ok=True)
    # One of several workers compiles, and the others wait.
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            objects = [folder / f"{source.stem}.o" for source in sources]
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                commands = [[*COMPILE, source, "-o", out] for source, out in zip(sources, objects, strict=True)]
                list(pool.map(subprocess.check_call, commands))
            # Under its name only when it is whole.
            subprocess.check_call([COMPILE[0], "-shared", "-pthread", *objects, "-o", folder / "linked"])
            (folder / "linked").rename(library)
    return library


@cache
def extension() -> ModuleType:
    """vlcore._cuda of a CPU."""
    library = compiled([CSRC / "cuda_bindings.cpp", *sorted(CSRC.glob("cuda/*.cu")), HERE / "blocks.cpp"], "_cuda.so")
    spec = spec_from_file_location("_cuda", library)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_on_cpu(monkeypatch) -> None:
    """From now on the "cuda" backend takes tensors on the CPU, and computes there."""

    def refusals(x, since=(8, 0)):
        return [] if x.is_cpu and x.dtype in native._CUDA_DTYPES else ["it runs on the CPU only, here"]

    def run(kernel, x, *arguments):
        getattr(native.cuda, kernel)(*arguments, (native._CUDA_DTYPES[x.dtype], 0))

    monkeypatch.setattr(native, "cuda", extension())
    monkeypatch.setattr(native, "cuda_refusals", refusals)
    monkeypatch.setattr(native, "run_cuda", run)
