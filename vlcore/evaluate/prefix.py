"""A prompt's keys and values, computed once and attended to by every answer that may follow it."""

import torch
from torch import Tensor

from vlcore import ops


class PrefixRecorder:
    """The memory of a forward over prompts of one length: attends within them and keeps each layer's keys and values.

    Attributes:
        layers: by layer, un-rotated k and v (B, P, Hkv, D).
    """

    def __init__(self) -> None:
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, *, theta: float, cu_seqlens: Tensor | None
    ) -> Tensor:
        """q (B, P, Hq, D), k, v (B, P, Hkv, D), positions (B, P) -> (B, P, Hq, D)."""
        self.layers[layer] = (k, v)
        return ops.rope_attention(q, k, v, positions, theta=theta, cu_seqlens=cu_seqlens)


class SharedPrefix:
    """The memory of a forward over answers, each of which sees one of the recorded prompts before itself.

    Args:
        recorder: after the forward over the prompts.
        prompts: (B,) int64, the prompt of each answer.
    """

    def __init__(self, recorder: PrefixRecorder, prompts: Tensor):
        self.recorder, self.prompts = recorder, prompts

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, *, theta: float, cu_seqlens: Tensor | None
    ) -> Tensor:
        """q (B, T, Hq, D), k, v (B, T, Hkv, D), positions (B, T) counted on from the prompts -> (B, T, Hq, D)."""
        before_k, before_v = (tensor.index_select(0, self.prompts) for tensor in self.recorder.layers[layer])
        before = torch.arange(before_k.shape[1], device=positions.device, dtype=positions.dtype)
        return ops.rope_attention(
            q,
            torch.cat([before_k, k], 1),
            torch.cat([before_v, v], 1),
            torch.cat([before.expand(len(positions), -1), positions], 1),
            theta=theta,
            cu_seqlens=cu_seqlens,
        )
