"""What `python -m build` makes installs in a clean environment and works from another directory."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
from pathlib import Path

import pytest

import vlcore

ROOT = Path(__file__).parent.parent
VERSION = vlcore.__version__
UNOPTIMISED = {"CXXFLAGS": "-O0"}
PROGRAM = """
import torch, vlcore, vlcore.kernels
from vlcore.bench import command
from vlcore import ops
assert "site-packages" in vlcore.__file__, vlcore.__file__
x, weight = torch.randn(3, 5), torch.ones(5)
assert "site-packages" in command.__file__ and "rms_norm" in command.benched()
torch.testing.assert_close(ops.rms_norm(x, weight, backend="cpp"), ops.rms_norm(x, weight, backend="torch"))
"""


def run(*command: object, cwd: Path, **environment: str) -> str:
    environment = {**os.environ, **environment}
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """The sdist, and the wheel that is built from the sdist and not from the checkout."""
    target = tmp_path_factory.mktemp("dist")
    # Where nvcc is, for one GPU: three take three times as long.
    environment = {"VLCORE_CUDA": "auto", "VLCORE_CUDA_ARCHS": "90a"} | UNOPTIMISED
    run(sys.executable, "-m", "build", "--outdir", target, ROOT, cwd=target, **environment)
    return target


def test_the_sdist_has_the_sources_of_each_extension_and_all_else_that_the_checkout_has(built):
    (archive,) = built.glob("*.tar.gz")
    with tarfile.open(archive) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    sources = [str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob("**/*.*")]
    assert {"csrc/cuda/device.h", "csrc/cuda/decode_attention.cu"} <= set(sources) <= names
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("this is no git checkout, whose files the sdist could be held against")
    # Links are folders there.
    assert set(listed.stdout.split()) - names <= {".gitignore", "vlcore/bench", "vlcore/kernels"}


@pytest.mark.parametrize(
    ("pattern", "cuda"),
    # The wheel was built with CUDA kernels if it could be; what is built from the sdist here, once more, shall not be.
    [("*.whl", shutil.which("nvcc") is not None), pytest.param("*.tar.gz", False, marks=pytest.mark.soak)],
)
def test_installs_and_works_elsewhere(built, tmp_path, pattern, cuda):
    (archive,) = built.glob(pattern)
    environment = tmp_path / "venv"
    venv.create(environment, with_pip=True)
    python = environment / "bin" / "python"
    # torch and the other dependencies are borrowed from this environment: a directory in a .pth file brings its
    # packages, but not the editable vlcore, whose own .pth is not followed from there.
    (site,) = environment.glob("lib/python*/site-packages")
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib"))
    run(python, "-m", "pip", "install", "--no-deps", archive, cwd=tmp_path, VLCORE_CUDA="0", **UNOPTIMISED)
    run(python, "-c", PROGRAM, cwd=tmp_path)
    run(python, "-c", f"from vlcore import native; assert (native.cuda is not None) == {cuda}", cwd=tmp_path)
    for command in ("-m", "pip", "show", "vlcore"), ("-m", "vlcore.cli", "--version"):
        assert VERSION in run(python, *command, cwd=tmp_path)
    run(
        python,
        "-c",
        "from importlib.resources import files; assert (files('vlcore') / 'py.typed').is_file()",
        cwd=tmp_path,
    )
    assert "parameters" in run(environment / "bin" / "vlcore", "info", "--preset", "tiny", cwd=tmp_path).lower()
