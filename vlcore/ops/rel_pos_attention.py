"""SAM's attention with decomposed relative positions: softmax(q k^T D^-1/2 + rel_h + rel_w) v over a grid.

With query (y, x) and key (y', x'): rel_h = q . rel_pos_h[y - y' + Y - 1], rel_w = q . rel_pos_w[x - x' + X - 1],
both with the un-scaled q (public code of segment-anything and of DeepSeek-VL).
"""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

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

# Scores that are held at a time: 128 MiB of float32.
_CHUNK_SCORES = 2**25
# What a program of Triton's holds of each query.
MAX_TRITON_HEAD_DIM = 128


def rel_pos_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, rel_pos_h: Tensor, rel_pos_w: Tensor, grid: tuple[int, int]
) -> Tensor:
    """The definition, which every kernel is tested against. Holds the scores of a few heads at a time."""
    num_tokens = q.shape[2]
    tables = _offsets(rel_pos_h, grid[0]), _offsets(rel_pos_w, grid[1])
    queries, keys, values = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
    chunk = max(_CHUNK_SCORES // max(num_tokens**2, 1), 1)
    if queries.shape[0] <= chunk:
        return _attend(queries, keys, values, *tables).view(q.shape)
    attend = _attend_again if torch.is_grad_enabled() else _attend
    pieces = zip(queries.split(chunk), keys.split(chunk), values.split(chunk), strict=True)
    return torch.cat([attend(q, k, v, *tables) for q, k, v in pieces]).view(q.shape)


def _attend(q: Tensor, k: Tensor, v: Tensor, table_h: Tensor, table_w: Tensor) -> Tensor:
    """q, k, v (heads, Y * X, D); table_h (Y, Y, D), table_w (X, X, D) by query and key. Softmax in float32."""
    wide = torch.promote_types(q.dtype, torch.float32)
    by_row = q.to(wide).unflatten(1, (table_h.shape[0], table_w.shape[0])).transpose(0, 1)
    by_col = by_row.transpose(0, 2)
    rel_h = torch.bmm(by_row.flatten(1, 2), table_h.to(wide).transpose(1, 2))
    rel_w = torch.bmm(by_col.flatten(1, 2), table_w.to(wide).transpose(1, 2))
    rel_h = rel_h.unflatten(1, by_row.shape[1:3]).transpose(0, 1)
    rel_w = rel_w.unflatten(1, by_col.shape[1:3]).permute(1, 2, 0, 3)
    bias = (rel_h[..., :, None] + rel_w[..., None, :]).reshape(q.shape[0], q.shape[1], q.shape[1])
    scores = torch.baddbmm(bias, q.to(wide), k.to(wide).transpose(1, 2), alpha=q.shape[-1] ** -0.5)
    return torch.bmm(scores.softmax(-1).to(v.dtype), v)


def _attend_again(*arguments: Tensor) -> Tensor:
    """`_attend`, whose scores are computed again in the backward instead of being kept."""
    return checkpoint(_attend, *arguments, use_reentrant=False)


def _offsets(table: Tensor, size: int) -> Tensor:
    """Rows of a table (2 * size - 1, D) by query and key, (size, size, D)."""
    place = torch.arange(size, device=table.device)
    return table[place[:, None] - place + size - 1]


def rel_pos_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rel_pos_h: Tensor,
    rel_pos_w: Tensor,
    grid: tuple[int, int],
    *,
    backend: str = AUTO,
) -> Tensor:
    """Attend over a grid with SAM's decomposed relative positions (arXiv 2304.02643, and 2112.01526, section 4.1).

    Args:
        q, k, v: (B, H, Y * X, D), float32, float16 or bfloat16; float64 on "torch". Tokens are row-major.
        rel_pos_h: (2Y - 1, D), rel_pos_w: (2X - 1, D), of q's dtype.
        grid: (Y, X).
        backend: "auto", "torch", "triton" or "cpp".

    Returns:
        (B, H, Y * X, D), of q's dtype. Scores are scaled by D^-1/2, the position terms are not; both terms and the
        softmax are float32. Under torch.autocast all are cast to its dtype.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or a backend that cannot run them.
    """
    if autocast.is_on(q):
        return autocast.run(rel_pos_attention, autocast.low(q), q, k, v, rel_pos_h, rel_pos_w, grid, backend=backend)
    height, width = _sides(grid)
    checks.rank("rel_pos_attention", "q", q, "B H Y*X D")
    checks.head_dim("rel_pos_attention", "q", q)
    checks.alike("rel_pos_attention", q=q, k=k, v=v, rel_pos_h=rel_pos_h, rel_pos_w=rel_pos_w)
    if q.shape[2] != height * width:
        raise ValueError(f"rel_pos_attention: q has {q.shape[2]} tokens; a grid of {grid} has {height * width}.")
    checks.shape("rel_pos_attention", "k", k, q.shape, "q", q)
    checks.shape("rel_pos_attention", "v", v, q.shape, "q", q)
    for name, table, size in (("rel_pos_h", rel_pos_h, height), ("rel_pos_w", rel_pos_w, width)):
        checks.present("rel_pos_attention", name, table)
        if table.shape != (2 * size - 1, q.shape[3]):
            needed = f"a grid of {grid} and heads of {q.shape[3]} need {(2 * size - 1, q.shape[3])}"
            raise ValueError(f"rel_pos_attention: {name} is {tuple(table.shape)}; {needed}.")
    arguments = (q, k, v, rel_pos_h, rel_pos_w)
    backend = choose("rel_pos_attention", KERNELS, backend, *arguments, grid)
    if backend == TORCH:
        return rel_pos_attention_reference(*arguments, grid)
    return apply(RelPosAttention, *arguments, height, width, backend)


def _sides(grid: tuple[int, int]) -> tuple[int, int]:
    if not isinstance(grid, (tuple, list)) or len(grid) != 2:
        raise ValueError(f"rel_pos_attention: grid is {grid!r}; it needs to be two whole numbers (Y, X).")
    for name, side in zip(("grid's Y", "grid's X"), grid, strict=True):
        checks.whole("rel_pos_attention", name, side)
    return grid[0], grid[1]


class RelPosAttention(torch.autograd.Function):
    """`rel_pos_attention` through its torch ops; sums are each softmax's statistics, (B, H, Y * X, 2)."""

    @staticmethod
    def forward(ctx, q, k, v, rel_pos_h, rel_pos_w, height, width, backend):
        tables = rel_pos_h.contiguous(), rel_pos_w.contiguous()
        inputs = *(_with_whole_rows(tensor) for tensor in (q, k, v)), *tables
        out, sums = rel_pos_attention_forward(*inputs, height, width, backend)
        ctx.save_for_backward(*inputs, out, sums)
        ctx.numbers = (height, width, backend)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        grads = rel_pos_attention_backward(_with_whole_rows(grad_out), *ctx.saved_tensors, *ctx.numbers)
        return *grads, None, None, None


def _with_whole_rows(tensor: Tensor) -> Tensor:
    """A tensor whose last dimension is contiguous: views of a fused projection stay what they are."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _empty_output(q: Tensor) -> Tensor:
    """(B, H, T, D) with a token's heads side by side in memory, as the projection behind the attention reads them."""
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], q.shape[3]).transpose(1, 2)


def _torch_forward(q, k, v, rel_pos_h, rel_pos_w, height, width):
    out = rel_pos_attention_reference(q, k, v, rel_pos_h, rel_pos_w, (height, width))
    return out, statistics(q, (), TORCH)


def _torch_backward(grad_out, q, k, v, rel_pos_h, rel_pos_w, out, sums, height, width):
    return gradients(
        lambda *inputs: rel_pos_attention_reference(*inputs, (height, width)),
        (q, k, v, rel_pos_h, rel_pos_w),
        grad_out,
    )


def _cpp_refusals(q, k, v, rel_pos_h, rel_pos_w, grid) -> list[str]:
    return native.cpp_refusals(q)


def _cpp_forward(q, k, v, rel_pos_h, rel_pos_w, height, width):
    out, sums = _empty_output(q), q.new_empty(*q.shape[:3], 2, dtype=torch.float32)
    strides = (tensor.stride()[:3] for tensor in (q, k, v, out))
    sizes = (*q.shape[:2], height, width, q.shape[3])
    native.run_cpp("rel_pos_attention_forward", q.dtype, q, k, v, rel_pos_h, rel_pos_w, out, sums, *strides, *sizes)
    return out, sums


def _cpp_backward(grad_out, q, k, v, rel_pos_h, rel_pos_w, out, sums, height, width):
    grads = tuple(map(native.fresh, _empty_gradients(q, k, v, rel_pos_h, rel_pos_w)))
    strides = (tensor.stride()[:3] for tensor in (grad_out, q, k, v, out))
    given = (grad_out, q, k, v, rel_pos_h, rel_pos_w, out, sums, *grads)
    sizes = (*q.shape[:2], height, width, q.shape[3])
    native.run_cpp("rel_pos_attention_backward", q.dtype, *given, *strides, *sizes)
    return grads


def _empty_gradients(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor.new_empty(tensor.shape) for tensor in tensors)


def triton_refusals(grid: tuple[int, int], *tensors: Tensor) -> list[str]:
    """Why Triton cannot attend with positions in such a grid to these, whose last dimension is that of a head."""
    head_dim, (height, width) = tensors[0].shape[-1], grid
    reasons = {
        f"heads of {head_dim} are wider than {MAX_TRITON_HEAD_DIM}": head_dim > MAX_TRITON_HEAD_DIM,
        # Where rel and drel stand is counted in 32 bits.
        f"{height} x {width} are too many places": height * width * max(height * -(-width // 16), height + width)
        >= 1 << 31,
    }
    return launch.dot_refusals(*tensors) + [reason for reason, applies in reasons.items() if applies]


def _triton_refusals(q, k, v, rel_pos_h, rel_pos_w, grid) -> list[str]:
    return triton_refusals(grid, q, k, v, rel_pos_h, rel_pos_w)


# In order of preference.
KERNELS = {
    "triton": Kernel(
        native.triton("rel_pos_attention", "forward"),
        native.triton("rel_pos_attention", "backward"),
        _triton_refusals,
        launch.worthwhile,
    ),
    "cpp": Kernel(_cpp_forward, _cpp_backward, _cpp_refusals),
}

rel_pos_attention_forward = define(
    "rel_pos_attention_forward(Tensor q, Tensor k, Tensor v, Tensor rel_pos_h, Tensor rel_pos_w, SymInt height,"
    " SymInt width, str backend) -> (Tensor out, Tensor sums)",
    KERNELS,
    _torch_forward,
    fake=lambda q, k, v, rel_pos_h, rel_pos_w, height, width, backend: (
        q.new_empty(q.shape) if backend == TORCH else _empty_output(q),
        statistics(q, (*q.shape[:3], 2), backend),
    ),
)
rel_pos_attention_backward = define(
    "rel_pos_attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor rel_pos_h, Tensor rel_pos_w,"
    " Tensor out, Tensor sums, SymInt height, SymInt width, str backend)"
    " -> (Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_rel_pos_h, Tensor grad_rel_pos_w)",
    KERNELS,
    _torch_backward,
    fake=lambda grad_out, q, k, v, rel_pos_h, rel_pos_w, *rest: _empty_gradients(q, k, v, rel_pos_h, rel_pos_w),
)
