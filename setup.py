"""Build vlcore: its Python packages, the C++ extension, and the CUDA extension where nvcc exists."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pybind11
from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import Extension, find_namespace_packages, setup

DEFAULT_CUDA_ARCHS = "80;90a;100a"
CUDA_BINDINGS = "csrc/cuda_bindings.cpp"
# Apple's compiler has no OpenMP of its own: there the loops run on one thread.
OPENMP = [] if sys.platform == "darwin" else ["-fopenmp"]
# VLCORE_SANITIZE=1 builds, in a folder apart, C++ kernels that stop at any access outside of an allocation and at
# undefined behaviour; for `make sanitize`.
SANITIZED = os.environ.get("VLCORE_SANITIZE") == "1"
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"] if SANITIZED else []
# Where the environment asks for no optimisation, compiling takes a third of the time, which tests of packaging ask for.
UNOPTIMISED = "-O0" in os.environ.get("CXXFLAGS", "")
OPTIMISATION = "-O0" if UNOPTIMISED else "-O2" if SANITIZED else "-O3"


def sources(pattern: str) -> list[str]:
    return sorted(str(path) for path in Path("csrc").glob(pattern))


def wants_cuda() -> bool:
    """VLCORE_CUDA=0 skips the CUDA kernels, =1 insists on them; unset builds them where nvcc is on PATH."""
    choice = os.environ.get("VLCORE_CUDA", "auto")
    found = shutil.which("nvcc") is not None
    if choice == "1" and not found:
        raise RuntimeError("VLCORE_CUDA=1 asks for the CUDA kernels, but nvcc is not on PATH.")
    if choice != "0" and not found:
        print("vlcore: nvcc not found; building without the CUDA kernels.", file=sys.stderr)
    return choice != "0" and found


class BuildExt(build_ext):
    def build_extension(self, ext):
        if ext.name == "vlcore._cuda":
            self.build_with_nvcc(ext)
        else:
            super().build_extension(ext)

    def build_with_nvcc(self, ext):
        """One nvcc command compiles and links: it knows its own headers and libraries, so no CUDA_HOME."""
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        archs = os.environ.get("VLCORE_CUDA_ARCHS", DEFAULT_CUDA_ARCHS)
        subprocess.check_call(
            [
                "nvcc",
                "-shared",
                "-cudart",
                "static",
                "-O3",
                "-std=c++17",
                "--threads",
                "0",
                "-Xcompiler",
                "-fPIC,-fvisibility=hidden",
                *[f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs.split(";")],
                f'-DVLCORE_CUDA_ARCHS="{archs}"',
                "-Icsrc",
                f"-I{pybind11.get_include()}",
                f"-I{sysconfig.get_path('include')}",
                *ext.sources,
                "-o",
                str(target),
            ]
        )


cpp = Pybind11Extension(
    "vlcore._C",
    [path for path in [*sources("*.cpp"), *sources("cpu/*.cpp")] if path != CUDA_BINDINGS],
    include_dirs=["csrc"],
    depends=[*sources("*.h"), *sources("cpu/*.h")],
    cxx_std=17,
    # GCC warns of intrinsics of its own headers that begin with an undefined register.
    extra_compile_args=[
        OPTIMISATION,
        "-fno-math-errno",
        "-Wno-maybe-uninitialized",
        *OPENMP,
        *SANITIZERS,
    ],
    extra_link_args=[*OPENMP, *SANITIZERS],
)
cuda = Extension("vlcore._cuda", [CUDA_BINDINGS, *sources("cuda/*.cu")])

# All cores compile, a file each.
ParallelCompile(default=0).install()
setup(
    packages=find_namespace_packages(include=["vlcore", "vlcore.*"]),
    package_data={"vlcore": ["py.typed"], "vlcore.kernels": ["*.json"]},
    ext_modules=[cpp, cuda] if cuda.sources[1:] and wants_cuda() else [cpp],
    cmdclass={"build_ext": BuildExt},
    options={"build": {"build_base": "build/sanitize", "build_lib": "build/sanitize/lib"}} if SANITIZED else {},
)
