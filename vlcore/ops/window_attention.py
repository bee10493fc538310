"""SAM's attention within windows, equal to attention on the map that is zero-padded to whole windows.

A padded position takes part as a key whose qkv is the bias of the projection (0 through a linear layer), unmasked.
What it would attend to as a query is cropped away: a kernel may leave it out; the reference computes it and crops.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from vlcore import native
from vlcore.kernels import launch
from vlcore.ops import autocast, checks
from vlcore.ops.dispatch import (
    AUTO,
    TORCH,
    Kernel,
    apply,
    choose,
    define,
    gradients,
    once_differentiable,
    statistics,
)
from vlcore.ops.rel_pos_attention import rel_pos_attention_reference, triton_refusals


def window_attention_reference(
    qkv: Tensor, qkv_bias: Tensor | None, rel_pos_h: Tensor, rel_pos_w: Tensor, window: int = 14
) -> Tensor:
    """The definition, which every kernel is tested against."""
    batch, height, width, _, heads, head_dim = qkv.shape
    rows, cols = -(-height // window), -(-width // window)
    padded = _pad(qkv, qkv_bias, rows * window, cols * window)
    # (3, B, window row, window column, H, y, x, D)
    windows = padded.view(batch, rows, window, cols, window, 3, heads, head_dim).permute(5, 0, 1, 3, 6, 2, 4, 7)
    q, k, v = windows.reshape(3, batch * rows * cols, heads, window**2, head_dim)
    out = rel_pos_attention_reference(q, k, v, rel_pos_h, rel_pos_w, (window, window))
    out = out.view(batch, rows, cols, heads, window, window, head_dim).permute(0, 1, 4, 2, 5, 3, 6)
    out = out.reshape(batch, rows * window, cols * window, heads * head_dim)
    return out[:, :height, :width].contiguous()


def _pad(qkv: Tensor, qkv_bias: Tensor | None, height: int, width: int) -> Tensor:
    """qkv (B, Y, X, 3, H, D) at the top left of (B, height, width, 3, H, D) that holds the bias elsewhere."""
    below, right = height - qkv.shape[1], width - qkv.shape[2]
    if not (below or right):
        return qkv.contiguous()
    if qkv_bias is None:
        return F.pad(qkv, (0, 0, 0, 0, 0, 0, 0, right, 0, below))
    batch, _, real_width = qkv.shape[:3]
    qkv = torch.cat((qkv, qkv_bias.expand(batch, qkv.shape[1], right, *qkv_bias.shape)), 2)
    return torch.cat((qkv, qkv_bias.expand(batch, below, width, *qkv_bias.shape)), 1)


def window_attention(
    qkv: Tensor,
    qkv_bias: Tensor | None,
    rel_pos_h: Tensor,
    rel_pos_w: Tensor,
    window: int = 14,
    *,
    backend: str = AUTO,
) -> Tensor:
    """Attend within windows, equal to SAM's attention on the map that is zero-padded before the qkv projection.

    Args:
        qkv: (B, Y, X, 3, H, D) at the real positions, bias included; float32, float16 or bfloat16, float64 on
            "torch". Any Y and X.
        qkv_bias: (3, H, D), what a padded position holds, of qkv's dtype; None: it holds zeros.
        rel_pos_h, rel_pos_w: (2 * window - 1, D), of qkv's dtype.
        window: side of a window; windows start at the top left.
        backend: "auto", "torch", "triton" or "cpp".

    Returns:
        (B, Y, X, H * D), of qkv's dtype. Within a window as `rel_pos_attention`; under torch.autocast too.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or a backend that cannot run them.
    """
    if autocast.is_on(qkv):
        arguments = (qkv, qkv_bias, rel_pos_h, rel_pos_w, window)
        return autocast.run(window_attention, autocast.low(qkv), *arguments, backend=backend)
    checks.rank("window_attention", "qkv", qkv, "B Y X 3 H D")
    if qkv.shape[3] != 3:
        raise ValueError(f"window_attention: qkv is {tuple(qkv.shape)}; dimension 3 holds q, k and v.")
    checks.alike("window_attention", qkv=qkv, qkv_bias=qkv_bias, rel_pos_h=rel_pos_h, rel_pos_w=rel_pos_w)
    checks.head_dim("window_attention", "qkv", qkv)
    checks.whole("window_attention", "window", window)
    if window < 1:
        raise ValueError(f"window_attention: a window of {window} holds nothing.")
    if qkv_bias is not None:
        checks.shape("window_attention", "qkv_bias", qkv_bias, qkv.shape[3:], "qkv", qkv)
    for name, table in (("rel_pos_h", rel_pos_h), ("rel_pos_w", rel_pos_w)):
        checks.present("window_attention", name, table)
        if table.shape != (2 * window - 1, qkv.shape[5]):
            needed = f"a window of {window} and heads of {qkv.shape[5]} need {(2 * window - 1, qkv.shape[5])}"
            raise ValueError(f"window_attention: {name} is {tuple(table.shape)}; {needed}.")
    arguments = (qkv, qkv_bias, rel_pos_h, rel_pos_w, window)
    backend = choose("window_attention", KERNELS, backend, *arguments)
    if backend == TORCH:
        return window_attention_reference(*arguments)
    return apply(WindowAttention, *arguments, backend)


class WindowAttention(torch.autograd.Function):
    """`window_attention` through its torch ops; sums are each softmax's statistics, (B, H, Y, X, 2)."""

    @staticmethod
    def forward(ctx, qkv, qkv_bias, rel_pos_h, rel_pos_w, window, backend):
        inputs = [None if tensor is None else tensor.contiguous() for tensor in (qkv, qkv_bias, rel_pos_h, rel_pos_w)]
        out, sums = window_attention_forward(*inputs, window, backend)
        ctx.save_for_backward(*inputs, out, sums)
        ctx.numbers = (window, backend)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        saved = ctx.saved_tensors  # read once: activation checkpointing gives them once
        grad_qkv, grad_bias, grad_h, grad_w = window_attention_backward(grad_out.contiguous(), *saved, *ctx.numbers)
        return grad_qkv, None if saved[1] is None else grad_bias, grad_h, grad_w, None, None


def _torch_forward(qkv, qkv_bias, rel_pos_h, rel_pos_w, window):
    out = window_attention_reference(qkv, qkv_bias, rel_pos_h, rel_pos_w, window)
    return out, statistics(qkv, (), TORCH)


def _torch_backward(grad_out, qkv, qkv_bias, rel_pos_h, rel_pos_w, out, sums, window):
    if qkv_bias is None:
        qkv_bias = qkv.new_zeros(qkv.shape[3:])
    inputs = (qkv, qkv_bias, rel_pos_h, rel_pos_w)
    return gradients(lambda *inputs: window_attention_reference(*inputs, window), inputs, grad_out)


def _fake_forward(qkv, qkv_bias, rel_pos_h, rel_pos_w, window, backend):
    batch, height, width, _, heads, head_dim = qkv.shape
    out = qkv.new_empty(batch, height, width, heads * head_dim)
    return out, statistics(qkv, (batch, heads, height, width, 2), backend)


def _cpp_refusals(qkv, qkv_bias, rel_pos_h, rel_pos_w, window) -> list[str]:
    return native.cpp_refusals(qkv)


def _cpp_forward(qkv, qkv_bias, rel_pos_h, rel_pos_w, window):
    batch, height, width, _, heads, head_dim = qkv.shape
    out = qkv.new_empty(batch, height, width, heads * head_dim)
    sums = qkv.new_empty(batch, heads, height, width, 2, dtype=torch.float32)
    sizes = (batch, height, width, heads, head_dim, window)
    native.run_cpp("window_attention_forward", qkv.dtype, qkv, qkv_bias, rel_pos_h, rel_pos_w, out, sums, *sizes)
    return out, sums


def _cpp_backward(grad_out, qkv, qkv_bias, rel_pos_h, rel_pos_w, out, sums, window):
    grads = tuple(map(native.fresh, _empty_gradients(qkv, rel_pos_h, rel_pos_w)))
    batch, height, width, _, heads, head_dim = qkv.shape
    sizes = (batch, height, width, heads, head_dim, window)
    given = (grad_out, qkv, qkv_bias, rel_pos_h, rel_pos_w, out, sums, *grads)
    native.run_cpp("window_attention_backward", qkv.dtype, *given, *sizes)
    return grads


def _empty_gradients(qkv, rel_pos_h, rel_pos_w):
    return torch.empty_like(qkv), qkv.new_empty(qkv.shape[3:]), *(torch.empty_like(t) for t in (rel_pos_h, rel_pos_w))


def _triton_refusals(qkv, qkv_bias, rel_pos_h, rel_pos_w, window) -> list[str]:
    return triton_refusals((window, window), qkv, rel_pos_h, rel_pos_w)


# In order of preference.
KERNELS = {
    "triton": Kernel(
        native.triton("window_attention", "forward"),
        native.triton("window_attention", "backward"),
        _triton_refusals,
        launch.worthwhile,
    ),
    "cpp": Kernel(_cpp_forward, _cpp_backward, _cpp_refusals),
}

window_attention_forward = define(
    "window_attention_forward(Tensor qkv, Tensor? qkv_bias, Tensor rel_pos_h, Tensor rel_pos_w, SymInt window,"
    " str backend) -> (Tensor out, Tensor sums)",
    KERNELS,
    _torch_forward,
    fake=_fake_forward,
)
# The gradient of a bias that is None is that of the zeros in its place.
window_attention_backward = define(
    "window_attention_backward(Tensor grad_out, Tensor qkv, Tensor? qkv_bias, Tensor rel_pos_h, Tensor rel_pos_w,"
    " Tensor out, Tensor sums, SymInt window, str backend)"
    " -> (Tensor grad_qkv, Tensor grad_qkv_bias, Tensor grad_rel_pos_h, Tensor grad_rel_pos_w)",
    KERNELS,
    _torch_backward,
    fake=lambda grad_out, qkv, qkv_bias, rel_pos_h, rel_pos_w, *rest: _empty_gradients(qkv, rel_pos_h, rel_pos_w),
)
