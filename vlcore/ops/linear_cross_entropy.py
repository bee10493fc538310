"""The language model's head and its loss, -log softmax(hidden weight^T)[label], without ever holding the logits.

Rows that are not supervised are left out first. The others go in chunks: a chunk's logits give its losses and, in
the same pass, its gradients, so nothing of their size survives and no matrix product is done twice.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from vlcore.ops import checks
from vlcore.ops.dispatch import AUTO, Kernel, apply, choose, define, once_differentiable

REDUCTIONS = ("mean", "sum", "none")
# Logits that are held at a time: 4 MiB of float32, which stay in a cache; but no fewer rows than a matrix product needs
# to be fast.
_CHUNK_LOGITS = 2**20
_CHUNK_ROWS = 128


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
        backend: "auto" or "torch".

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
            grads = [torch.mul(grad, scale, out=torch.empty_like(grad)) for grad in ctx.saved_tensors]
        else:
            _, *grads = linear_cross_entropy_forward(
                *ctx.saved_tensors, grad_loss.contiguous(), ctx.ignore_index, *ctx.needs, ctx.backend
            )
        grads = [grad if needed else None for grad, needed in zip(grads, ctx.needs, strict=True)]
        return *grads, None, None, None, None, None, None


# In order of preference; without backwards, as a forward gives the gradients.
KERNELS: dict[str, Kernel] = {}


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
