"""The language model's head and its loss, -log softmax(hidden weight^T)[label], without ever holding the logits.

Rows that are not supervised are left out first. On "torch" the others go in chunks: a chunk's logits give its losses
and, in the same pass, its gradients. "cpp" goes over blocks of the vocabulary, with the softmax of all rows kept up to
date as attention does over blocks of keys: each product of a block is that of a small matrix which stays in the cache.
"triton" goes over such blocks twice, for the softmax of all rows and for the gradients.
"""

from collections.abc import Iterator, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from vlcore import native
from vlcore.kernels import launch
from vlcore.ops import autocast, checks, products
from vlcore.ops.dispatch import (
    AUTO,
    Kernel,
    apply,
    choose,
    define,
    has_values,
    is_transformed,
    known,
    once_differentiable,
)

REDUCTIONS = ("mean", "sum", "none")
# Logits that are held at a time: 4 MiB of float32, which stay in a cache; but no fewer rows than a matrix product needs
# to be fast.
_CHUNK_LOGITS = 2**20
_CHUNK_ROWS = 128
# Of the C++ kernel: words in a block of the vocabulary, about how many rows pass over it together, and rows of one
# float32 sum.
_BLOCK_WORDS = 1024
_GROUP_ROWS = 512
_TILE_ROWS = 64


def linear_cross_entropy_reference(
    hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int = -100, reduction: str = "mean"
) -> Tensor:
    """The definition, which every kernel is tested against. It holds all logits."""
    logits = F.linear(hidden.reshape(labels.numel(), hidden.shape[-1]), weight)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = F.cross_entropy(wide, labels.flatten().long(), ignore_index=ignore_index, reduction=reduction)
    return losses.view(labels.shape) if reduction == "none" else losses


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    backend: str = AUTO,
) -> Tensor:
    """Cross-entropy of the logits hidden @ weight^T, which are never held whole; rows to ignore cost nothing.

    Args:
        hidden: (..., D), float32, float16 or bfloat16; float64 on "torch".
        weight: (V, D), of hidden's dtype.
        labels: (...), int32 or int64, in 0..V-1 or `ignore_index`. Their values are checked on the CPU; a GPU stops
            when it meets another.
        ignore_index: label of rows that have no loss.
        reduction: "mean" over the supervised rows (NaN when there is none, as in torch), "sum", or "none".
        backend: "auto", "torch", "triton" or "cpp".

    Returns:
        A float32 scalar (float64 for float64), or (...) with 0 at ignored rows for "none". Under torch.autocast hidden
        and weight are cast to its dtype.

    Raises:
        ValueError: shapes, dtypes, devices or labels that do not fit, an unknown reduction, or a backend that cannot
            run them.
    """
    if autocast.is_on(hidden):
        options = {"ignore_index": ignore_index, "reduction": reduction, "backend": backend}
        return autocast.run(linear_cross_entropy, autocast.low(hidden), hidden, weight, labels, **options)
    _check(hidden, weight, labels, ignore_index, reduction)
    backend = choose("linear_cross_entropy", KERNELS, backend, hidden, weight, labels)
    if is_transformed():
        return linear_cross_entropy_reference(hidden, weight, labels, ignore_index, reduction)
    rows, flat = hidden.reshape(labels.numel(), hidden.shape[-1]), labels.flatten()
    needs = [torch.is_grad_enabled() and tensor.requires_grad for tensor in (hidden, weight)]
    losses = apply(LinearCrossEntropy, rows, weight, flat, *needs, ignore_index, reduction, backend)
    return losses.view(labels.shape) if reduction == "none" else losses


def _check(hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int, reduction: str) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"linear_cross_entropy: reduction {reduction!r} is none of {REDUCTIONS}.")
    checks.alike("linear_cross_entropy", hidden=hidden, weight=weight)
    checks.rank("linear_cross_entropy", "weight", weight, "V D")
    checks.shape("linear_cross_entropy", "weight", weight, (weight.shape[0], *hidden.shape[-1:]), "hidden", hidden)
    checks.integer("linear_cross_entropy", "labels", labels)
    checks.whole("linear_cross_entropy", "ignore_index", ignore_index)
    checks.shape("linear_cross_entropy", "labels", labels, hidden.shape[:-1], "hidden", hidden)
    checks.on_device("linear_cross_entropy", "labels", labels, "hidden", hidden)
    if checks.may_read(labels):
        strange = labels[(labels != ignore_index) & ((labels < 0) | (labels >= weight.shape[0]))]
        if strange.numel():
            given = f"{strange.numel()} labels, such as {strange[0].item()}, are neither"
            known = f"in a vocabulary of {weight.shape[0]} nor ignore_index {ignore_index}"
            raise ValueError(f"linear_cross_entropy: {given} {known}.")


# What float16 keeps the gradients of a mean times at most, until that of the loss is known: a word's probability over
# thousands of rows is below its range, from which a loss scale would bring back nothing. Above 1023 there is no room.
RAISED = 64.0


class LinearCrossEntropy(torch.autograd.Function):
    """`linear_cross_entropy` through its torch op, on hidden (R, D) and labels (R,).

    A scalar's gradients come with the forward, and the backward scales them. Losses that are not reduced may each
    have another gradient, so there the backward runs the op again.
    """

    @staticmethod
    def forward(ctx, hidden, weight, labels, needs_hidden, needs_weight, ignore_index, reduction, backend):
        hidden, weight, labels = hidden.contiguous(), weight.contiguous(), labels.contiguous()
        needs, row_scale, raised = (needs_hidden, needs_weight), None, None
        ctx.needs, ctx.ignore_index, ctx.backend = needs, ignore_index, backend
        ctx.reduced = reduction != "none"
        if reduction == "mean":
            count = (labels != ignore_index).sum().to(torch.promote_types(hidden.dtype, torch.float32))
            raised = count.clamp(1, RAISED) if hidden.dtype == torch.float16 else None
            row_scale = ((1.0 if raised is None else raised) / count).expand(labels.shape).contiguous()
        losses, *grads = linear_cross_entropy_forward(
            hidden, weight, labels, row_scale, ignore_index, *(needs if ctx.reduced else (False, False)), backend
        )
        ctx.save_for_backward(*(grads if ctx.reduced else (hidden, weight, labels)), raised)
        if reduction == "none":
            return losses
        return losses.sum() if reduction == "sum" else losses.sum() / count

    @staticmethod
    @partial(once_differentiable, instead="F.cross_entropy of F.linear")
    def backward(ctx, grad_loss):
        *saved, raised = ctx.saved_tensors
        if ctx.reduced:
            grads = _scaled(saved, grad_loss if raised is None else grad_loss / raised, ctx.backend)
        else:
            _, *grads = linear_cross_entropy_forward(
                *saved, grad_loss.contiguous(), ctx.ignore_index, *ctx.needs, ctx.backend
            )
        grads = [grad if needed else None for grad, needed in zip(grads, ctx.needs, strict=True)]
        return *grads, None, None, None, None, None, None


def _scaled(grads: Sequence[Tensor], grad_loss: Tensor, backend: str) -> list[Tensor]:
    """The gradients times that of the loss; in place, as a head's is large, unless this may be asked for again."""
    may_read, is_compiling = checks.may_read(grad_loss), torch.compiler.is_compiling()
    # A loss scale may lie outside of a narrow dtype's range. Eager torch takes a number on the CPU as it is; elsewhere
    # one dimension makes it widen the product.
    scale = grad_loss if may_read else grad_loss.reshape(1)
    if not (is_compiling or has_values(grad_loss)):
        # One of a batch cannot be told where to write.
        return [(grad * scale).to(grad.dtype) for grad in grads]
    if is_compiling or torch._C._autograd._get_current_graph_task_keep_graph():
        return [torch.mul(grad, scale, out=torch.empty_like(grad)) for grad in grads]
    if backend == "triton":
        return [_scale(grad, grad_loss) for grad in grads]
    return list(grads) if may_read and grad_loss == 1 else [torch.mul(grad, scale, out=grad) for grad in grads]


_scale = native.triton("linear_cross_entropy", "scale")


def _triton_refusals(hidden: Tensor, weight: Tensor, labels: Tensor) -> list[str]:
    return launch.refusals(hidden, weight, labels)


def _cpp_refusals(hidden: Tensor, weight: Tensor, labels: Tensor) -> list[str]:
    return native.cpp_refusals(hidden)


def _cpp_worthwhile(hidden: Tensor, weight: Tensor, labels: Tensor) -> bool:
    # Fewer logits than these stay in a cache, and one product of them all costs fewer calls.
    return known(labels.numel() * weight.shape[0] >= 2**20)


@torch.no_grad()
def _cpp_forward(hidden, weight, labels, row_scale, ignore_index, needs_hidden, needs_weight):
    supervised = (labels != ignore_index).nonzero()[:, 0]
    x, label = hidden, labels.long()
    scale = torch.ones(labels.shape, dtype=torch.float32) if row_scale is None else row_scale
    if len(supervised) < len(labels):
        x, label, scale = x[supervised], label[supervised], scale[supervised]
    grad_x = torch.empty_like(x) if needs_hidden else hidden.new_empty(0)
    grad_weight = native.fresh(torch.empty_like(weight)) if needs_weight else weight.new_empty(0)
    # The gradient of the weight is written last. Until then it has room for the logits if there are fewer rows than
    # each is wide; if not, the logits are computed twice.
    kept = grad_weight.view(-1) if needs_weight and x.shape[0] <= x.shape[1] else None
    losses, *softmax = torch.empty(3, len(x), dtype=torch.float32)
    for rows in _groups(x):
        group = [tensor[rows] for tensor in (x, label, scale, losses, *softmax)]
        _softmax(weight, kept, rows.start, grad_x[rows] if needs_hidden else None, *group)
    if needs_weight:
        _write_grad_weight(x, weight, label, scale, kept, *softmax, grad_weight)
    if len(supervised) < len(labels):
        losses = torch.zeros(labels.shape, dtype=torch.float32).index_copy_(0, supervised, losses)
        grad_x = torch.zeros_like(hidden).index_copy_(0, supervised, grad_x) if needs_hidden else grad_x
    return losses, grad_x, grad_weight


def _groups(x: Tensor) -> list[slice]:
    # Even ones: a group of a few rows that are left would read all of the weight once more.
    size = -(-len(x) // max(round(len(x) / _GROUP_ROWS), 1))
    return [slice(first, min(first + size, len(x))) for first in range(0, len(x), size or 1)]


def _blocks(weight: Tensor) -> Iterator[tuple[int, Tensor]]:
    return zip(range(0, len(weight), _BLOCK_WORDS), weight.split(_BLOCK_WORDS), strict=True)


def _place(kept: Tensor | None, room: Tensor, first: int, block: Tensor, x: Tensor, start: int) -> Tensor:
    """Where a block's logits (words, rows) of the rows x from `start` on are: a part of `kept`, if that is given."""
    at = 0 if kept is None else first * x.shape[1] + len(block) * start
    size = len(block) * len(x)
    return (room if kept is None else kept).view(-1)[at : at + size].view(len(block), len(x))


def _softmax(weight, kept, start, grad_x, x, label, scale, losses, largest, total):
    """Of a group of rows the losses, the largest logits and the sums of exp(logit - largest), and x's gradient."""
    largest.fill_(torch.finfo(torch.float32).min)
    total.zero_()
    factor, room = torch.empty_like(largest), x.new_empty(_BLOCK_WORDS * len(x))
    if grad_x is not None:
        sums, product = x.new_zeros(x.shape, dtype=torch.float32), torch.empty_like(x)
    for first, block in _blocks(weight):
        logits = products.a_bt(block, x, _place(kept, room, first, block, x, start))
        numerators = None if grad_x is None else _place(None, room, first, block, x, start)
        # The logit of the label comes first, and then its loss.
        known = (largest, total, losses, factor)
        native.run_cpp("softmax_block", x.dtype, logits, label, numerators, *known, first, *logits.shape)
        if numerators is not None:
            # As attention does over blocks of keys, with the words as keys and as values.
            products.at_b(numerators, block, product)
            native.run_cpp("add_scaled_rows", x.dtype, product, factor, sums, *x.shape)
    torch.add(largest - losses, total.log(), out=losses)
    if grad_x is not None:
        given = (sums, total, scale, label, weight, grad_x)
        native.run_cpp("cross_entropy_grad_hidden", x.dtype, *given, *x.shape)


def _write_grad_weight(x, weight, label, scale, kept, largest, total, grad_weight):
    """The gradient of a block of the vocabulary at a time: one product of the gradients of its logits with x."""
    groups = _groups(x)
    grad_logits, room = (x.new_empty(_BLOCK_WORDS, rows) for rows in (len(x), groups[0].stop if groups else 0))
    for first, block in _blocks(weight):
        for rows in groups:
            logits = _place(kept, room, first, block, x[rows], rows.start)
            if kept is None:
                products.a_bt(block, x[rows], logits)
            given = (logits, label[rows], largest[rows], total[rows], scale[rows], grad_logits[:, rows])
            native.run_cpp("cross_entropy_grad_logits", x.dtype, *given, len(x), first, *logits.shape)
        _multiply(grad_logits[: len(block)], x, grad_weight[first : first + len(block)])


def _multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a @ b. float32 products of torch sum one after the other, with errors that grow: here only in tiles."""
    if out.dtype != torch.float32:
        products.a_b(a, b, out)
        return
    torch.mm(a[:, :_TILE_ROWS], b[:_TILE_ROWS], out=out)
    for first in range(_TILE_ROWS, len(b), _TILE_ROWS):
        out.addmm_(a[:, first : first + _TILE_ROWS], b[first : first + _TILE_ROWS])


# In order of preference; without backwards, as a forward gives the gradients.
KERNELS = {
    "triton": Kernel(native.triton("linear_cross_entropy", "forward"), None, _triton_refusals, launch.worthwhile),
    "cpp": Kernel(_cpp_forward, None, _cpp_refusals, _cpp_worthwhile),
}


def _torch_forward(hidden, weight, labels, row_scale, ignore_index, needs_hidden, needs_weight):
    """Losses (R,), and the gradients of sum(row_scale * losses), empty where they are not needed."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    losses = hidden.new_zeros(labels.shape, dtype=wide)
    grad_hidden = torch.zeros_like(hidden) if needs_hidden else hidden.new_empty(0)
    grad_weight = torch.zeros_like(weight, dtype=wide) if needs_weight else weight.new_empty(0)
    chunk = max(_CHUNK_LOGITS // max(weight.shape[0], 1), _CHUNK_ROWS)
    for rows in (labels != ignore_index).nonzero()[:, 0].split(chunk):
        x, label = hidden[rows], labels[rows].long()[:, None]
        log_probabilities = F.linear(x, weight).log_softmax(-1, dtype=wide)
        losses[rows] = -log_probabilities.gather(1, label)[:, 0]
        if not (needs_hidden or needs_weight):
            continue
        grad_logits = log_probabilities.exp_().scatter_add_(1, label, log_probabilities.new_full(label.shape, -1.0))
        if row_scale is not None:
            grad_logits.mul_(row_scale[rows, None])
        grad_logits = grad_logits.to(hidden.dtype)
        if needs_hidden:
            grad_hidden[rows] = grad_logits @ weight
        if needs_weight and wide == x.dtype:
            grad_weight.addmm_(grad_logits.t(), x)
        elif needs_weight:
            grad_weight.add_(grad_logits.t() @ x)
    return losses, grad_hidden, grad_weight.to(weight.dtype)


def _fake_forward(hidden, weight, labels, row_scale, ignore_index, needs_hidden, needs_weight, backend):
    losses = hidden.new_empty(labels.shape, dtype=torch.promote_types(hidden.dtype, torch.float32))
    grad_hidden = torch.empty_like(hidden) if needs_hidden else hidden.new_empty(0)
    return losses, grad_hidden, torch.empty_like(weight) if needs_weight else weight.new_empty(0)


linear_cross_entropy_forward = define(
    "linear_cross_entropy_forward(Tensor hidden, Tensor weight, Tensor labels, Tensor? row_scale, int ignore_index,"
    " bool needs_hidden, bool needs_weight, str backend) -> (Tensor losses, Tensor grad_hidden, Tensor grad_weight)",
    KERNELS,
    _torch_forward,
    fake=_fake_forward,
    tags=(torch.Tag.cudagraph_unsafe,),  # it asks how many rows are supervised
)
