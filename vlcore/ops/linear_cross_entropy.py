"""The language model's head and its loss, -log softmax(hidden weight^T)[label], without ever holding the logits.

Rows that are not supervised are left out first. On "torch" the others go in chunks: a chunk's logits give its losses
and, in the same pass, its gradients. "cpp" goes over blocks of the vocabulary, with the softmax of all rows kept up to
date as attention does over blocks of keys: each product of a block is that of a small matrix which stays in the cache.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from vlcore import native
from vlcore.ops import checks
from vlcore.ops.dispatch import AUTO, Kernel, apply, choose, define, once_differentiable

REDUCTIONS = ("mean", "sum", "none")
# Logits that are held at a time: 4 MiB of float32, which stay in a cache; but no fewer rows than a matrix product needs
# to be fast.
_CHUNK_LOGITS = 2**20
_CHUNK_ROWS = 128
# Of the C++ kernel: words in a block of the vocabulary, and rows that pass over it together.
_BLOCK_WORDS = 1024
_GROUP_ROWS = 512


def linear_cross_entropy_reference(
    hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int = -100, reduction: str = "mean"
) -> Tensor:
    """The definition, which every kernel is tested against. It holds all logits."""
    logits = F.linear(hidden.reshape(-1, hidden.shape[-1]), weight)
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
        labels: (...), int32 or int64, in 0..V-1 or `ignore_index`. Their values are checked on the CPU.
        ignore_index: label of rows that have no loss.
        reduction: "mean" over the supervised rows (NaN when there is none, as in torch), "sum", or "none".
        backend: "auto", "torch" or "cpp".

    Returns:
        A float32 scalar (float64 for float64), or (...) with 0 at ignored rows for "none".

    Raises:
        ValueError: shapes, dtypes, devices or labels that do not fit, an unknown reduction, or a backend that cannot
            run them.
    """
    _check(hidden, weight, labels, ignore_index, reduction)
    backend = choose("linear_cross_entropy", KERNELS, backend, hidden, weight, labels)
    rows, flat = hidden.reshape(-1, hidden.shape[-1]), labels.flatten()
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
    checks.shape("linear_cross_entropy", "labels", labels, hidden.shape[:-1], "hidden", hidden)
    checks.on_device("linear_cross_entropy", "labels", labels, "hidden", hidden)
    if checks.may_read(labels):
        strange = labels[(labels != ignore_index) & ((labels < 0) | (labels >= weight.shape[0]))]
        if strange.numel():
            given = f"{strange.numel()} labels, such as {strange[0].item()}, are neither"
            known = f"in a vocabulary of {weight.shape[0]} nor ignore_index {ignore_index}"
            raise ValueError(f"linear_cross_entropy: {given} {known}.")


class LinearCrossEntropy(torch.autograd.Function):
    """`linear_cross_entropy` through its torch op, on hidden (R, D) and labels (R,).

    A scalar's gradients come with the forward, and the backward scales them. Losses that are not reduced may each
    have another gradient, so there the backward runs the op again.
    """

    @staticmethod
    def forward(ctx, hidden, weight, labels, needs_hidden, needs_weight, ignore_index, reduction, backend):
        hidden, weight, labels = hidden.contiguous(), weight.contiguous(), labels.contiguous()
        needs, row_scale = (needs_hidden, needs_weight), None
        ctx.needs, ctx.ignore_index, ctx.backend = needs, ignore_index, backend
        ctx.reduced = reduction != "none"
        if reduction == "mean":
            count = (labels != ignore_index).sum().to(torch.promote_types(hidden.dtype, torch.float32))
            row_scale = count.reciprocal().expand(labels.shape).contiguous()
        losses, *grads = linear_cross_entropy_forward(
            hidden, weight, labels, row_scale, ignore_index, *(needs if ctx.reduced else (False, False)), backend
        )
        ctx.save_for_backward(*(grads if ctx.reduced else (hidden, weight, labels)))
        if reduction == "none":
            return losses
        return losses.sum() if reduction == "sum" else losses.sum() / count

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss):
        if ctx.reduced:
            # A loss scale may lie outside of a narrow dtype's range: one dimension, so that it widens the product.
            scale = grad_loss.reshape(1)
            # A head's gradient is large, and made twice only where this backward may be run again.
            again = torch.compiler.is_compiling() or torch._C._autograd._get_current_graph_task_keep_graph()
            grads = [torch.mul(g, scale, out=torch.empty_like(g) if again else g) for g in ctx.saved_tensors]
        else:
            _, *grads = linear_cross_entropy_forward(
                *ctx.saved_tensors, grad_loss.contiguous(), ctx.ignore_index, *ctx.needs, ctx.backend
            )
        grads = [grad if needed else None for grad, needed in zip(grads, ctx.needs, strict=True)]
        return *grads, None, None, None, None, None, None


def _cpp_refusals(hidden: Tensor, weight: Tensor, labels: Tensor) -> list[str]:
    return native.cpp_refusals(hidden)


@torch.no_grad()
def _cpp_forward(hidden, weight, labels, row_scale, ignore_index, needs_hidden, needs_weight):
    supervised = (labels != ignore_index).nonzero()[:, 0]
    x, label = hidden, labels.long()
    scale = torch.ones(labels.shape) if row_scale is None else row_scale
    if len(supervised) < len(labels):
        x, label, scale = x[supervised], label[supervised], scale[supervised]
    losses, lse = torch.empty(2, len(x))
    grad_x = torch.empty_like(x) if needs_hidden else hidden.new_empty(0)
    grad_weight = torch.empty_like(weight) if needs_weight else weight.new_empty(0)
    # The gradient of the weight is written last. Until then it has room for the logits if there are fewer rows than
    # each is wide; if not, the logits are computed twice.
    kept = grad_weight.view(-1) if needs_weight and x.shape[0] <= x.shape[1] else None
    for rows in _groups(x):
        grads = grad_x[rows] if needs_hidden else None
        _softmax(x, weight, label, scale, rows, kept, losses[rows], lse[rows], grads)
    if needs_weight:
        _write_grad_weight(x, weight, label, scale, lse, kept, grad_weight)
    if len(supervised) < len(labels):
        losses = torch.zeros(labels.shape).index_copy_(0, supervised, losses)
        grad_x = torch.zeros_like(hidden).index_copy_(0, supervised, grad_x) if needs_hidden else grad_x
    return losses, grad_x, grad_weight


def _groups(x: Tensor) -> list[slice]:
    return [slice(first, min(first + _GROUP_ROWS, len(x))) for first in range(0, len(x), _GROUP_ROWS)]


def _room_for_logits(kept: Tensor | None, weight: Tensor, first: int, rows: slice) -> Tensor:
    """(words, rows) for the block of the vocabulary from `first` on: its own place in `kept`, where that is given."""
    words, count = min(_BLOCK_WORDS, len(weight) - first), rows.stop - rows.start
    if kept is None:
        return weight.new_empty(words, count)
    at = first * weight.shape[1] + words * rows.start
    return kept[at : at + words * count].view(words, count)


def _softmax(x, weight, label, scale, rows, kept, losses, lse, grads):
    """The losses of a group of rows, their log-sum-exps, and if they are asked for the gradients of x."""
    x, label, scale, dtype = x[rows], label[rows], scale[rows], x.dtype
    largest, factor, label_logit = x.new_empty(3, len(x), dtype=torch.float32)
    largest.fill_(torch.finfo(torch.float32).min)
    total = torch.zeros_like(largest)
    # What attention does over blocks of keys, with the words as keys and as values.
    sums, product = (x.new_zeros(x.shape, dtype=wide) if grads is not None else None for wide in (torch.float32, dtype))
    for first in range(0, len(weight), _BLOCK_WORDS):
        block = weight[first : first + _BLOCK_WORDS]
        logits = torch.mm(block, x.t(), out=_room_for_logits(kept, weight, first, rows))
        numerators = None if grads is None else logits if kept is None else torch.empty_like(logits)
        known = (largest, total, label_logit, factor)
        native.run_cpp("softmax_block", dtype, logits, label, numerators, *known, first, *logits.shape)
        if grads is not None:
            torch.mm(numerators.t(), block, out=product)
            native.run_cpp("add_scaled_rows", dtype, product, factor, sums, *x.shape)
    torch.add(largest, total.log(), out=lse)
    torch.sub(lse, label_logit, out=losses)
    if grads is not None:
        given = (sums, total, scale, label, weight, grads)
        native.run_cpp("cross_entropy_grad_hidden", dtype, *given, *x.shape)


def _write_grad_weight(x, weight, label, scale, lse, kept, grad_weight):
    """The rows of a block of the vocabulary at a time, each the one product of the gradients of its logits with x."""
    for first in range(0, len(weight), _BLOCK_WORDS):
        block = weight[first : first + _BLOCK_WORDS]
        grad_logits = x.new_empty(len(block), len(x))
        for rows in _groups(x):
            logits = _room_for_logits(kept, weight, first, rows)
            if kept is None:
                torch.mm(block, x[rows].t(), out=logits)
            given = (logits, label[rows], lse[rows], scale[rows], grad_logits[:, rows])
            native.run_cpp("cross_entropy_grad_logits", x.dtype, *given, len(x), first, *logits.shape)
        torch.mm(grad_logits, x, out=grad_weight[first : first + _BLOCK_WORDS])


# In order of preference; without backwards, as a forward gives the gradients.
KERNELS = {"cpp": Kernel(_cpp_forward, None, _cpp_refusals)}


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
)
