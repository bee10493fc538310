"""RMSNorm beside torch's own, forward and with gradients: python bench/bench_rms_norm.py"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from timing import machine, medians
from torch import Tensor

from vlcore import ops
from vlcore.kernels.launch import INTERPRETED
from vlcore.ops.rms_norm import KERNELS

PEER = "F.rms_norm"
# Rows of one decoded token, of one image, of an image with text, and of a packed batch; DeepSeek-VL 1.3B and 7B.
SHAPES = [(1, 2048), (576, 2048), (1088, 2048), (1088, 4096), (4096, 4096)]


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    print(f"{machine()}, {dtype}; microseconds, and how many times as fast as {PEER}")
    for shape in SHAPES:
        x = torch.randn(shape, device=device, dtype=dtype, requires_grad=True)
        weight = torch.randn(shape[-1], device=device, dtype=dtype, requires_grad=True)
        norms = implementations(x, weight)
        for norm in norms.values():
            torch.testing.assert_close(norm(x, weight), norms[PEER](x, weight))
        with torch.no_grad():
            report(shape, "forward", medians(norms, x, weight))
        trained = {name: partial(forward_backward, norm) for name, norm in norms.items()}
        report(shape, "forward + backward", medians(trained, x, weight, torch.randn_like(x)))


def implementations(x: Tensor, weight: Tensor) -> dict[str, Callable]:
    backends = [name for name in KERNELS if not (INTERPRETED or KERNELS[name].refusals(x, weight))]
    ours = {backend: partial(ops.rms_norm, backend=backend) for backend in [*backends, "torch"]}
    return {PEER: lambda x, weight: F.rms_norm(x, weight.shape, weight, 1e-6), **ours}


def forward_backward(norm: Callable, x: Tensor, weight: Tensor, grad: Tensor) -> None:
    torch.autograd.grad(norm(x, weight), (x, weight), grad)


def report(shape: tuple[int, ...], what: str, seconds: dict[str, float]) -> None:
    columns = (f"{name} {time * 1e6:.0f} ({seconds[PEER] / time:.2f}x)" for name, time in seconds.items())
    print(f"{str(shape):13} {what:18}", *columns, sep="  ")


if __name__ == "__main__":
    main()
