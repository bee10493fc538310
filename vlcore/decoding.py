"""Decoding, one token a row and step: the cache of keys and values, and the step itself."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vlcore import ops
from vlcore.config import LlamaConfig
from vlcore.cuda_graph import CudaGraphs
from vlcore.models.deepseek_vl import DeepSeekVL
from vlcore.models.layers import is_plain
from vlcore.native import prefer_huge_pages
from vlcore.ops.decode_block import apply_weight


class KVCache:
    """Rotated keys, and values, of every layer and row: what `Llama` attends with in place of plain attention.

    `begin`, a forward over the prompts, then for each further token the model's `decode`, or a forward of (batch, 1),
    and `advance`.

    Attributes:
        keys, values: one (batch, capacity, num_kv_heads, head_dim) a layer.
        lengths: (batch,) int64, tokens in the cache of each row; one tensor for good, which `begin` and `advance` write
            to. Rows begin at slot 0, however long they are.
    """

    def __init__(self, config: LlamaConfig, batch: int, capacity: int, dtype: torch.dtype, device: torch.device | str):
        shape = (2, config.num_layers, batch, capacity, config.num_kv_heads, config.head_dim)
        # Zeros, since what is masked still meets the softmax's zero weights, and 0 * NaN is NaN.
        caches = prefer_huge_pages(torch.empty(shape, dtype=dtype, device=device)).zero_()
        # By index: torch lets nobody write to the views that unbinding a tensor gives.
        self.keys, self.values = ([caches[i, layer] for layer in range(config.num_layers)] for i in range(2))
        self.capacity = capacity
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=device)
        self._places: tuple[Tensor, Tensor] | None = None

    def begin(self, lengths: Sequence[int]) -> None:
        """Say how long the prompts are, before the forward that holds them: packed, or in rows of one length.

        Raises:
            ValueError: there are more or fewer than rows, or one does not fit.
        """
        if len(lengths) != len(self.lengths) or not 0 < min(lengths) <= max(lengths) <= self.capacity:
            raise ValueError(
                f"KVCache.begin: prompts of {list(lengths)} tokens do not fit {len(self.lengths)} rows of 1 to "
                f"{self.capacity}."
            )
        device = self.lengths.device
        with torch.inference_mode():
            self.lengths.copy_(torch.tensor(lengths))
        rows = torch.arange(len(lengths), device=device).repeat_interleave(self.lengths)
        self._places = rows, torch.cat([torch.arange(length, device=device) for length in lengths])

    def advance(self, rows: Tensor | int = 1) -> None:
        """Keep the token that the last forward wrote; with `rows` (batch,) bool only in those rows."""
        with torch.inference_mode():  # or a cache that was made in it could not be written to without
            self.lengths += rows

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, *, theta: float, cu_seqlens: Tensor | None
    ) -> Tensor:
        """Write k and v of a layer and attend: to the prompt itself in prefill, to the whole row with one token a row.

        Args:
            q, k, v: (B, T, Hq, D) and (B, T, Hkv, D), not rotated; B = 1 where `cu_seqlens` packs the prompts.
            positions: (B, T).

        Returns:
            (B, T, Hq, D).
        """
        if cu_seqlens is None and q.shape[1] == 1:
            return ops.decode_attention(q, k, v, self.keys[layer], self.values[layer], self.lengths, theta=theta)
        if self._places is None:
            raise ValueError("KVCache.attend: call begin with the prompts' lengths before the first forward.")
        q, k = (ops.apply_rope(x, positions, theta) for x in (q, k))
        for cache, fresh in ((self.keys[layer], k), (self.values[layer], v)):
            cache[self._places] = fresh.flatten(0, 1).to(cache.dtype)
        return ops.attention(q, k, v, causal=True, cu_seqlens=cu_seqlens)


def next_logits(model: DeepSeekVL, cache: KVCache) -> Callable[[Tensor], Tensor]:
    """A step: tokens (B,) int64, each row's newest, which the cache takes in -> logits (B, V) of those behind them.

    `KVCache.advance` keeps them there. The weights are those that the model has now, copied where they are of another
    dtype than it computes in; on a GPU a step is a CUDA graph, and they may not move meanwhile. Where layers are hooked
    or replaced, LoRA's among them, a step calls them all instead.
    """
    if not (model.language.is_plain() and is_plain(model.lm_head)):

        def forward(tokens: Tensor) -> Tensor:
            output = model(tokens[:, None], positions=cache.lengths[:, None], memory=cache, return_logits=False)
            return model.lm_head(output.hidden[:, 0])

        return forward
    operands, head = model.language.operands(model.compute_dtype), model.lm_head.operand(model.compute_dtype)

    def step(tokens: Tensor) -> Tensor:
        hidden = model.decode(tokens, operands, cache.keys, cache.values, cache.lengths)
        return apply_weight(hidden, head)

    return CudaGraphs(step)
