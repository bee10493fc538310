"""What runs CUDA kernels on a CPU for the tests tells the faults that a GPU may hide."""

import ctypes
import sys

import pytest
import torch

if sys.platform != "linux":
    pytest.skip("it knows Linux's libraries only", allow_module_level=True)

import cuda_on_cpu

THREADS = 64


@pytest.fixture(scope="module")
def library():
    sources = [cuda_on_cpu.HERE / name for name in ("faults.cpp", "blocks.cpp")]
    library = ctypes.CDLL(str(cuda_on_cpu.compiled(sources, "faults.so")))
    library.launch.restype = ctypes.c_char_p
    return library


def launch(library, kernel, cluster=1, threads=THREADS):
    """What two blocks give, and the error."""
    out = torch.full((2, threads), -1.0)
    error = library.launch(kernel.encode(), cluster, threads, ctypes.c_void_p(out.data_ptr()))
    return out, error.decode()


def test_threads_of_a_block_share_memory(library):
    out, error = launch(library, "mirror")
    assert not error and torch.equal(out, torch.arange(THREADS - 1.0, -1, -1).expand(2, -1))


def test_a_missing_barrier_leaves_nothing_to_read(library):
    """Whichever way the threads of a block run, those that come first find nothing."""
    out, error = launch(library, "mirror at once")
    first, last = out.isnan()
    assert not error and first[: THREADS // 2].all() and last[THREADS // 2 :].all()


def test_blocks_of_a_cluster_read_each_other(library):
    out, error = launch(library, "neighbour", cluster=2)
    assert not error and torch.equal(out, torch.tensor([[1.0], [0.0]]).expand(2, THREADS))


@pytest.mark.parametrize(
    ("kernel", "cluster", "threads", "error"),
    [
        ("without a lane", 1, 64, "a lane waits for others of its warp"),
        ("at two places", 1, 64, "a lane waits for others of its warp"),
        ("without a warp", 1, 64, "some threads are at a barrier that others are not at"),
        ("without a block", 2, 64, "blocks of its cluster wait for something else, or have failed"),
        ("mirror", 1, 2048, "no GPU launches 2 blocks in clusters of 1, of 2048 threads"),
        ("mirror", 3, 64, "no GPU launches 2 blocks in clusters of 3, of 64 threads"),
    ],
)
def test_what_a_gpu_would_hang_on_is_an_error(library, kernel, cluster, threads, error):
    assert launch(library, kernel, cluster, threads)[1].endswith(error)
