"""Several sequences in one row: where each begins, what each token predicts, and the way there and back."""

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100


def pack(attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Where the real tokens of a padded batch are.

    Args:
        attention_mask: (B, T), non-zero at real tokens.

    Returns:
        real: (num_real,) int64, their places in the flattened batch.
        cu_seqlens: (num_sequences + 1,) int32; a row without real tokens is no sequence.
    """
    is_real = attention_mask != 0
    lengths = is_real.sum(1)
    cu_seqlens = F.pad(lengths[lengths > 0].cumsum(0), (1, 0)).to(torch.int32)
    return is_real.flatten().nonzero().squeeze(1), cu_seqlens


def unpack(packed: Tensor, real: Tensor, shape: torch.Size) -> Tensor:
    """packed (num_real, N) -> (B, T, N) with zeros at the padding."""
    flat = packed.new_zeros(shape.numel(), packed.shape[1])
    return flat.index_copy(0, real, packed).view(*shape, packed.shape[1])


def restarting_positions(input_ids: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """(B, T) int64: each sequence counts from 0; rows are sequences, or cu_seqlens gives those of the only row."""
    index = torch.arange(input_ids.shape[1], device=input_ids.device)
    if cu_seqlens is None:
        return index.expand(input_ids.shape)
    starts = cu_seqlens[torch.bucketize(index, cu_seqlens[1:], right=True)]
    return (index - starts)[None]


def shifted_labels(labels: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """labels (B, T) -> (B, T) with the label of t + 1 at t; the last token of a sequence predicts nothing."""
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
    if cu_seqlens is None:
        return targets
    return targets.index_fill(1, cu_seqlens[1:].long() - 1, IGNORED)
