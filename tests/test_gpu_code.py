"""The limits of the GPU kernels' machine code, held over what `make gpu-code` has found, without a GPU.

Whoever changes a kernel or its launch table runs `make gpu-code`: what is on record has to be of the present sources.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vlcore.bench import gpu_code
from vlcore.bench.dtypes import TF32
from vlcore.bench.peers import operators
from vlcore.bench.shapes_only import ShapesOnly
from vlcore.kernels import launch

ROOT = Path(__file__).parent.parent
FOUND = gpu_code.read(gpu_code.FILE)
KERNELS = [*FOUND.triton, *FOUND.cuda]
TRITONS = sorted({record["triton"] for record in FOUND.triton})
# What every GPU that is launched by a table gives one block: since Ampere, and of the data centre since Hopper.
SHARED = {"sm_80": 99 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024}
# The tensor cores' instruction for large tiles, whose rows fill a warpgroup; HMMA takes smaller ones.
LARGE_TILES = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA"}
WARPGROUP_ROWS = 64


def offenders(wrong) -> list[str]:
    return [gpu_code.line(record) for record in KERNELS if wrong(record)]


@pytest.mark.parametrize("operator", operators())
def test_is_of_these_sources(operator):
    message = f"it has changed since: run `make gpu-code OPS={operator}`"
    assert FOUND.sources.get(operator, {}) == gpu_code.sources(operator), message


def test_two_tritons():
    """The oldest that is allowed, and the one that is pinned."""
    assert TRITONS[0] == gpu_code.OLDEST_TRITON.name.removeprefix("triton-") and len(TRITONS) == 2


@pytest.mark.parametrize("triton", TRITONS)
def test_every_entry_of_a_launch_table_is_compiled(triton):
    records = [record for record in FOUND.triton if record["triton"] == triton]
    assert not gpu_code.Found(FOUND.sources, records).missing()


@pytest.mark.parametrize("path", sorted(ROOT.glob("csrc/cuda/*.cu")), ids=lambda path: path.stem)
def test_every_cuda_kernel_is_compiled(path):
    compiled = {record["architecture"] for record in FOUND.cuda if record["operator"] == path.stem}
    assert compiled == set(gpu_code.ARCHITECTURES)


def test_nothing_is_spilled():
    assert not offenders(lambda record: record["spills"])


def test_registers_and_shared_memory_fit():
    assert not offenders(lambda record: record["registers"] > 255)
    assert not offenders(lambda record: record["shared"] > SHARED[record["architecture"]])


def test_products_run_on_the_tensor_cores():
    def slow(record):
        rows, wanted = record.get("dot_rows", 0), {LARGE_TILES[record["architecture"]]}
        # TF32 operands have to lie along the sum for those, and not all of them do.
        if rows < WARPGROUP_ROWS or record["dtype"] == TF32:
            wanted |= {"HMMA"}
        return rows and not wanted & record["tensor"].keys()

    # Of float32 only TF32's is a product that they compute.
    assert all(record["dot_rows"] for record in FOUND.triton if record["dtype"] == TF32)

    assert not offenders(slow)


def test_products_of_hopper_s_do_not_wait_for_one_another():
    """Where the compiler cannot tell their operands from what goes on beside them it waits for each of them alone."""

    def serial(record):
        return 0 < record["tensor"].get("HGMMA", 0) <= record["waits"] and not may_wait(record)

    def may_wait(record):
        # Operands that are unpacked in registers have to stay until they are read; the others are little work.
        return record["dtype"] == TF32 or record["kernel"] == "_forward_kernel" or "tables" in record["kernel"]

    assert not offenders(serial)


@pytest.mark.parametrize("size", [3, 2**24 + 1])
def test_what_is_not_computed_is_zero(monkeypatch, size):
    """Whatever was in memory before: weights that are quantised have to be finite."""
    empty = torch.empty_strided
    monkeypatch.setattr(torch, "empty_strided", lambda *given, **how: empty(*given, **how).fill_(torch.nan))
    with ShapesOnly():
        x = torch.randn(size, 2)[:, 1]
        wide = x.double()
    assert x.shape == wide.shape == (size,) and wide.dtype == torch.float64 and not x.any() and not wide.any()


@pytest.mark.skipif(not launch.AVAILABLE, reason="Triton is not installed")
def test_compiles_a_kernel_here_and_now():
    command = [sys.executable, "-m", "vlcore.bench.gpu_code", "swiglu"]
    command += ["--dtype", "bfloat16", "--architecture", "sm_90", "--usual-triton"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"TRITON_INTERPRET": "1"})
    assert done.returncode == 0, done.stderr
    triton = (
        r"swiglu  _(\w+)_kernel  .*  sm_90  bfloat16  swiglu.\1\[0\]  \d+ registers  0 spills  \d+ shared  \d+ warps"
    )
    assert {found and found[1] for found in map(re.compile(triton).fullmatch, done.stdout.splitlines())} == {
        "forward",
        "backward",
    }
