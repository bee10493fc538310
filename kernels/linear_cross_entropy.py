"""The head and its loss around torch's matrix products: Triton turns blocks of logits into softmax and gradients.

Logits stand as weight @ hidden^T has them, (words, rows): those of a block of the vocabulary are whole rows of memory.
They are computed once where the weight's gradient is wanted: until that is written, each word's row of it has room for
the logits of as many rows as hidden is wide. Those of other rows are computed again for the gradients, a block of the
vocabulary at a time.
"""

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import direct_launch, launch

# Words in a block of the vocabulary: so many that what its products read and write is little beside what they compute,
# and what the host has to do for it beside what the GPU has.
BLOCK_WORDS = 8192
# A block's logits take at most this share of what all of them would in float32, but for small vocabularies.
SHARE = 1 / 24
# Programs that scale a gradient: what fills a GPU.
SCALING_PROGRAMS = 1024
# Rows of the logits of a block start where 16 bytes may be read at once, however many rows there are.
ALIGNED = 16


@triton.jit
def _softmax_kernel(
    logits_ptr,
    label_ptr,
    largest_ptr,
    total_ptr,
    label_logit_ptr,
    first_word,
    num_words,
    num_rows,
    stride,
    segment_stride,
    SEGMENT: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """Of each row over a segment of the words: the largest logit, the sum of exp(logit - largest), and the logit of the
    label if it is there. A place of the tile has a maximum and a sum of its own, which cost one exp a logit."""
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    start = tl.program_id(1) * SEGMENT
    within = rows < num_rows
    largest = tl.full((BLOCK_WORDS, BLOCK_ROWS), -3.4e38, tl.float32)
    total = tl.zeros((BLOCK_WORDS, BLOCK_ROWS), tl.float32)
    for at in tl.static_range(0, SEGMENT, BLOCK_WORDS):
        words = start + at + tl.arange(0, BLOCK_WORDS)
        mask = (words < num_words)[:, None] & within[None, :]
        offsets = words.to(tl.int64)[:, None] * stride + rows[None, :]
        logits = tl.load(logits_ptr + offsets, mask=mask, other=float("-inf")).to(tl.float32)
        apart = logits - largest
        smaller = tl.exp(-tl.abs(apart))
        total = tl.where(apart > 0, total * smaller + 1.0, total + smaller)
        largest = tl.maximum(largest, logits)

    most = tl.max(largest, axis=0)
    segment = (first_word // SEGMENT + tl.program_id(1)).to(tl.int64) * segment_stride + rows
    tl.store(largest_ptr + segment, most, mask=within)
    tl.store(total_ptr + segment, tl.sum(total * tl.exp(largest - most[None, :]), axis=0), mask=within)

    word = tl.load(label_ptr + rows, mask=within, other=-1) - first_word
    here = (word >= start) & (word < tl.minimum(start + SEGMENT, num_words))
    label_logit = tl.load(logits_ptr + word.to(tl.int64) * stride + rows, mask=here, other=0.0)
    tl.store(label_logit_ptr + rows, label_logit.to(tl.float32), mask=here)


@triton.jit
def _loss_kernel(
    largest_ptr,
    total_ptr,
    label_logit_ptr,
    loss_ptr,
    row_largest_ptr,
    row_log_total_ptr,
    num_segments,
    num_rows,
    BLOCK_SEGMENTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """Of each row over all segments: the largest logit, the logarithm of the sum of exp(logit - largest), the loss."""
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    within = rows < num_rows
    largest = tl.full((BLOCK_SEGMENTS, BLOCK_ROWS), -3.4e38, tl.float32)
    total = tl.zeros((BLOCK_SEGMENTS, BLOCK_ROWS), tl.float32)
    for start in range(0, num_segments, BLOCK_SEGMENTS):
        segments = start + tl.arange(0, BLOCK_SEGMENTS)
        mask = (segments < num_segments)[:, None] & within[None, :]
        offsets = segments.to(tl.int64)[:, None] * num_rows + rows[None, :]
        most = tl.load(largest_ptr + offsets, mask=mask, other=-3.4e38)
        more = tl.load(total_ptr + offsets, mask=mask, other=0.0)
        before, largest = largest, tl.maximum(largest, most)
        total = total * tl.exp(before - largest) + more * tl.exp(most - largest)

    row_largest = tl.max(largest, axis=0)
    row_log_total = tl.log(tl.sum(total * tl.exp(largest - row_largest[None, :]), axis=0))
    label_logit = tl.load(label_logit_ptr + rows, mask=within, other=0.0)
    tl.store(row_largest_ptr + rows, row_largest, mask=within)
    tl.store(row_log_total_ptr + rows, row_log_total, mask=within)
    tl.store(loss_ptr + rows, row_largest - label_logit + row_log_total, mask=within)


@triton.jit
def _gradient_kernel(
    logits_ptr,
    label_ptr,
    row_largest_ptr,
    row_log_total_ptr,
    scale_ptr,
    grad_ptr,
    first_word,
    num_words,
    num_rows,
    stride,
    grad_stride,
    BLOCK_WORDS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """(softmax - onehot(label)) * scale; it may take the place of the logits."""
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    words = tl.program_id(1) * BLOCK_WORDS + tl.arange(0, BLOCK_WORDS)
    within = rows < num_rows
    mask = (words < num_words)[:, None] & within[None, :]
    far = words.to(tl.int64)[:, None]
    logits = tl.load(logits_ptr + far * stride + rows[None, :], mask=mask, other=0.0).to(tl.float32)
    largest = tl.load(row_largest_ptr + rows, mask=within, other=0.0)
    log_total = tl.load(row_log_total_ptr + rows, mask=within, other=0.0)
    word = (tl.load(label_ptr + rows, mask=within, other=-1) - first_word).to(tl.int32)
    grad = tl.exp(logits - largest[None, :] - log_total[None, :])
    grad -= (words[:, None] == word[None, :]).to(tl.float32)
    if scale_ptr is not None:
        grad *= tl.load(scale_ptr + rows, mask=within, other=0.0)[None, :]
    tl.store(grad_ptr + far * grad_stride + rows[None, :], grad, mask=mask)


@triton.jit
def _scale_kernel(x_ptr, factor_ptr, size, BLOCK: tl.constexpr):
    """x times a number; as that is 1 where a loss is the last of what is computed, x is left alone then."""
    factor = tl.load(factor_ptr).to(tl.float32)
    if factor != 1.0:
        for block in range(tl.program_id(0), tl.cdiv(size, BLOCK), tl.num_programs(0)):
            at = tl.cast(block, tl.int64) * BLOCK + tl.arange(0, BLOCK)
            x = tl.load(x_ptr + at, mask=at < size)
            tl.store(x_ptr + at, x.to(tl.float32) * factor, mask=at < size)


@torch.no_grad()
def forward(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    row_scale: Tensor | None,
    ignore_index: int,
    needs_hidden: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """hidden (R, D), weight (V, D), labels and row_scale (R,), contiguous -> losses (R,) float32 and the gradients of
    sum(row_scale * losses), empty where they are not needed."""
    supervised = (labels != ignore_index).nonzero()[:, 0]
    losses = hidden.new_zeros(labels.shape, dtype=torch.float32)
    grad_hidden = torch.zeros_like(hidden) if needs_hidden else hidden.new_empty(0)
    grad_weight = torch.empty_like(weight) if needs_weight else weight.new_empty(0)
    if not len(supervised):
        return losses, grad_hidden, grad_weight.zero_()
    x, label, scale = hidden, labels, row_scale
    if len(supervised) < len(labels):
        x, label, scale = x[supervised], label[supervised], None if scale is None else scale[supervised]
    if label.is_cuda:
        # As in torch's own, an error of the device's, which nobody waits for.
        known = ((label >= 0) & (label < len(weight))).all()
        torch._assert_async(known, "linear_cross_entropy: a label is neither in the vocabulary nor ignore_index.")

    kept = grad_weight[:, : len(x)] if needs_weight else None
    room = _room(x, weight)
    found, *softmax = _softmax(x, weight, label, kept, room)
    losses.index_copy_(0, supervised, found)
    if needs_hidden or needs_weight:
        sums = x.new_zeros(x.shape, dtype=torch.float32) if needs_hidden else None
        _write_gradients(x, weight, (label, *softmax, scale), kept, room, sums, grad_weight if needs_weight else None)
        if sums is not None:
            grad_hidden.index_copy_(0, supervised, sums.to(hidden.dtype))
    return losses, grad_hidden, grad_weight


def _room(x: Tensor, weight: Tensor) -> Tensor:
    """For the logits of a block, (words, rows). A block has whole segments."""
    segment = launch.settings("linear_cross_entropy", "softmax", x.device)["SEGMENT"]
    words = min(int(SHARE * len(weight) * 4 / x.element_size()), BLOCK_WORDS)
    words = max(words // segment, 1) * segment
    # In the interpreter, products are a CPU's: of bfloat16, torch 2.13's read a number more of an odd number of rows.
    made = x.new_empty if x.is_cuda else x.new_zeros
    return made(words, launch.ceil_div(len(x), ALIGNED) * ALIGNED)[:, : len(x)]


def _blocks(weight: Tensor, room: Tensor) -> Iterator[tuple[int, Tensor]]:
    for first in range(0, len(weight), len(room)):
        yield first, weight[first : first + len(room)]


def _softmax(x: Tensor, weight: Tensor, label: Tensor, kept: Tensor | None, room: Tensor) -> Tensor:
    """Of each row (3, R): the loss, the largest logit and the logarithm of the sum of exp(logit - largest). Leaves the
    logits of the first rows in `kept`, if that is given."""
    segment = launch.settings("linear_cross_entropy", "softmax", x.device)["SEGMENT"]
    partial = x.new_empty(2, launch.ceil_div(len(weight), segment), len(x), dtype=torch.float32)
    # A label that is no word would leave it so.
    label_logit = x.new_full(label.shape, torch.nan, dtype=torch.float32)
    split = 0
    if kept is not None:
        split = kept.shape[1]
        torch.mm(weight, x[:split].t(), out=kept)
        _reduce_block(kept, label, partial, label_logit, 0)
    if split < len(x):
        for first, block in _blocks(weight, room):
            logits = torch.mm(block, x[split:].t(), out=room[: len(block), split:])
            _reduce_block(logits, label[split:], partial[:, :, split:], label_logit[split:], first)

    found = x.new_empty(3, len(x), dtype=torch.float32)
    settings = launch.settings("linear_cross_entropy", "loss", x.device)
    grid = (launch.ceil_div(len(x), settings["BLOCK_ROWS"]),)
    tensors, sizes = (*partial, label_logit, *found), (partial.shape[1], len(x))
    direct_launch.run(_loss_kernel, grid, tensors, sizes, settings)
    return found


def _reduce_block(logits: Tensor, label: Tensor, partial: Tensor, label_logit: Tensor, first: int) -> None:
    """Writes what the segments of a block, from the word `first` on, are to the softmax."""
    num_words, num_rows = logits.shape
    settings = launch.settings("linear_cross_entropy", "softmax", logits.device)
    grid = launch.ceil_div(num_rows, settings["BLOCK_ROWS"]), launch.ceil_div(num_words, settings["SEGMENT"])
    sizes = first, num_words, num_rows, logits.stride(0), partial.stride(1)
    direct_launch.run(_softmax_kernel, grid, (logits, label, *partial, label_logit), sizes, settings)


def _write_gradients(
    x: Tensor,
    weight: Tensor,
    rows: Sequence[Tensor | None],
    kept: Tensor | None,
    room: Tensor,
    grad_x: Tensor | None,
    grad_weight: Tensor | None,
) -> None:
    """Adds x's gradient to grad_x, which is float32, and writes the weight's, each where it is given. `rows` are the
    rows' labels, largest logits, logarithms of sums, and scales if they have any."""
    split = 0 if kept is None else kept.shape[1]
    others = [None if tensor is None else tensor[split:] for tensor in rows]
    for first, block in _blocks(weight, room):
        grad_logits = room[: len(block)]
        if kept is not None:
            _differentiate_block(kept[first : first + len(block)], rows, grad_logits[:, :split], first)
        if split < len(x):
            logits = torch.mm(block, x[split:].t(), out=grad_logits[:, split:])
            _differentiate_block(logits, others, logits, first)
        if grad_weight is not None:
            torch.mm(grad_logits, x, out=grad_weight[first : first + len(block)])
        if grad_x is not None:
            _add_product(grad_logits.t(), block, grad_x)


def _differentiate_block(logits: Tensor, rows: Sequence[Tensor | None], grad_logits: Tensor, first: int) -> None:
    num_words, num_rows = logits.shape
    settings = launch.settings("linear_cross_entropy", "gradient", logits.device)
    grid = launch.ceil_div(num_rows, settings["BLOCK_ROWS"]), launch.ceil_div(num_words, settings["BLOCK_WORDS"])
    sizes = first, num_words, num_rows, logits.stride(0), grad_logits.stride(0)
    direct_launch.run(_gradient_kernel, grid, (logits, *rows, grad_logits), sizes, settings)


def _add_product(a: Tensor, b: Tensor, sums: Tensor) -> None:
    """sums += a @ b, in float32."""
    if a.dtype == sums.dtype:
        sums.addmm_(a, b)
    elif sums.is_cuda:
        torch.addmm(sums, a, b, out_dtype=torch.float32, out=sums)
    else:
        sums.addmm_(a.float(), b.float())


@torch.no_grad()
def scale(x: Tensor, factor: Tensor) -> Tensor:
    """x, which is contiguous, times a tensor of one number on its device, which the host need not know: in place."""
    settings = launch.settings("linear_cross_entropy", "scale", x.device)
    if x.numel():
        grid = (min(launch.ceil_div(x.numel(), settings["BLOCK"]), SCALING_PROGRAMS),)
        direct_launch.run(_scale_kernel, grid, (x, factor), (x.numel(),), settings)
    return x
