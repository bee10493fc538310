"""C++ kernels give the same bits on any number of threads, use as many as torch does, and work wherever it does."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import contextmanager
from importlib import import_module

import pytest
import torch
from operators import values_and_gradients
from test_house import OPERATORS
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vlcore import native, ops

MODULES = {name: import_module(f"vlcore.ops.{name}") for name in sorted(OPERATORS)}
KERNELS = {name: module.KERNELS["cpp"] for name, module in MODULES.items() if "cpp" in module.KERNELS}
# Of these torch's matrix products are the gradients, whose sums depend on its threads in float32, or there are none.
WITHOUT_OWN_GRADIENTS = {"decode_attention", "decode_block", "hybrid_adaptor", "linear", "quantized_linear"}
WITHOUT_OWN_GRADIENTS |= {"downsample_features"}
pytestmark = pytest.mark.skipif(native.cpp is None, reason="vlcore was built without its C++ extension")


def on_cpu(*shape: int, dtype: torch.dtype) -> Tensor:
    """Where C++ kernels run, wherever the other tests do; a forked worker may not touch a GPU."""
    return torch.randn(shape).to(dtype)


def quantized_linear(x: Tensor, backend: str) -> Tensor:
    return ops.quantized_linear(
        x, ops.quantize_weight(on_cpu(1030, 256, dtype=x.dtype), bits=4, group_size=64), backend=backend
    )


def decode_attention(q: Tensor, k: Tensor, v: Tensor, backend: str) -> Tensor:
    caches = on_cpu(2, 2, 700, 4, 64, dtype=q.dtype)
    with torch.no_grad():
        return ops.decode_attention(q, k, v, *caches, torch.tensor([650, 3]), backend=backend)


def decode_block(x: Tensor, residual: Tensor, *weights: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    caches = on_cpu(2, 2, 700, 4, 32, dtype=x.dtype)
    with torch.no_grad():
        return ops.decode_block(
            x, residual, ops.BlockWeights(*weights), *caches, torch.tensor([650, 3]), backend=backend
        )


def examples(dtype: torch.dtype) -> dict[str, tuple[Callable, tuple]]:
    """A call of each operator, large enough that a kernel goes parallel, where its rows do not divide evenly."""

    def r(*shape: int) -> Tensor:
        return on_cpu(*shape, dtype=dtype)

    labels = torch.randint(0, 3000, (333,)).masked_fill(torch.rand(333) < 0.3, -100)
    projections = (r(256, 256), r(128, 256), r(128, 256), r(256, 256))
    return {
        "add_rms_norm": (ops.add_rms_norm, (r(333, 192), r(333, 192), r(192))),
        "apply_rope": (ops.apply_rope, (r(1, 333, 3, 64), torch.arange(333)[None])),
        "attention": (ops.attention, tuple(r(1, 333, 3, 64) for _ in range(3))),
        "decode_attention": (decode_attention, (r(2, 1, 8, 64), r(2, 1, 4, 64), r(2, 1, 4, 64))),
        "decode_block": (
            decode_block,
            (r(2, 1, 256), r(2, 1, 256), r(256), r(256), *projections, r(700, 256), r(700, 256), r(256, 700)),
        ),
        # At the model's size: of float32 maps as small as 12 x 12, torch's convolution sums by threads as well.
        "downsample_features": (
            lambda *given, backend: ops.downsample_features(*given, size=96, backend=backend),
            (r(1, 8, 64, 64), r(1, 8, 64, 64), r(1), r(16, 8, 3, 3), r(32, 16, 3, 3)),
        ),
        "hybrid_adaptor": (
            ops.hybrid_adaptor,
            (r(333, 64), r(333, 64), r(96, 64), r(96), r(96, 64), r(96), r(130, 192), r(130)),
        ),
        "layer_norm": (ops.layer_norm, (r(333, 192), r(192), r(192))),
        "linear": (ops.linear, (r(5, 256), r(1030, 256), r(1030))),
        # Of rows as short as 64, torch's products with the vocabulary sum by threads on some processors.
        "linear_cross_entropy": (ops.linear_cross_entropy, (r(333, 256), r(3000, 256), labels)),
        "quantized_linear": (quantized_linear, (r(5, 256),)),
        "rel_pos_attention": (
            lambda *given, backend: ops.rel_pos_attention(*given, (17, 19), backend=backend),
            (*(r(1, 3, 323, 64) for _ in range(3)), r(33, 64), r(37, 64)),
        ),
        "rms_norm": (ops.rms_norm, (r(333, 192), r(192))),
        "rope_attention": (ops.rope_attention, (*(r(1, 333, 3, 64) for _ in range(3)), torch.arange(333)[None])),
        "swiglu": (ops.swiglu, (r(333, 193), r(333, 193))),
        "window_attention": (ops.window_attention, (r(1, 33, 31, 3, 2, 64), r(3, 2, 64), r(27, 64), r(27, 64))),
    }


def outputs(name: str, dtype: torch.dtype, with_gradients: bool = True) -> list[Tensor]:
    """What the C++ kernels of an operator make of its example, the same at each call."""
    torch.manual_seed(0)
    function, given = examples(dtype)[name]

    def call(*given):
        return function(*given, backend="cpp")

    if with_gradients and name not in WITHOUT_OWN_GRADIENTS:
        return values_and_gradients(call, given)
    with torch.no_grad():
        result = call(*given)
    return list(result) if isinstance(result, tuple) else [result]


@contextmanager
def threads(count: int):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def test_every_kernel_has_an_example():
    assert KERNELS.keys() <= set(examples(torch.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", KERNELS)
def test_the_number_of_threads_changes_no_bit(name, dtype):
    with threads(1):
        wanted = outputs(name, dtype)
    for count in (2, 3):
        with threads(count):
            for got, known in zip(outputs(name, dtype), wanted, strict=True):
                assert torch.equal(got, known)


@pytest.mark.parametrize("name", KERNELS)
def test_runs_in_a_thread_of_python(name):
    wanted, got = outputs(name, torch.bfloat16), []
    thread = threading.Thread(target=lambda: got.extend(outputs(name, torch.bfloat16)))
    thread.start()
    thread.join(timeout=60)
    assert len(got) == len(wanted) and all(map(torch.equal, got, wanted))


class Calls(Dataset):
    """Items that kernels compute."""

    def __len__(self) -> int:
        return len(KERNELS)

    def __getitem__(self, index: int) -> list[Tensor]:
        return outputs(list(KERNELS)[index], torch.bfloat16, with_gradients=False)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux forks the workers of a DataLoader")
def test_runs_in_a_forked_worker_of_a_process_that_ran_it():
    """The threads of the parent are not there in the child, which waits for them for ever if it uses any."""
    with threads(2):
        wanted = [outputs(name, torch.bfloat16, with_gradients=False) for name in KERNELS]
        loader = DataLoader(Calls(), batch_size=None, num_workers=1, multiprocessing_context="fork", timeout=60)
        for got, known in zip(loader, wanted, strict=True):
            assert all(map(torch.equal, got, known))


COUNT = """
import os, sys, threading, torch
from vlcore import ops
def run():
    x = torch.empty(512, 512)
    before = len(os.listdir("/proc/self/task"))
    ops.swiglu(x, x, backend="cpp")
    print(len(os.listdir("/proc/self/task")) - before)
torch.set_num_threads(int(sys.argv[1]))
thread = threading.Thread(target=run)
thread.start() if sys.argv[2] == "other" else run()
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="threads are counted in /proc, as Linux has it")
@pytest.mark.parametrize("where", ["main", "other"])
@pytest.mark.parametrize("count", [1, 3])
def test_takes_as_many_threads_as_torch_is_told(count, where):
    command = [sys.executable, "-c", COUNT, str(count), where]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) == count - 1
