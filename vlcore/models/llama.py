"""LLaMA, the language model: pre-RMSNorm blocks of rotary causal attention and SwiGLU, without biases."""

from collections.abc import Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from vlcore import ops
from vlcore.config import LlamaConfig
from vlcore.models.layers import Embedding, Linear, RMSNorm, SideBySide, are_plain, run_block


class Memory(Protocol):
    """Keys and values from outside of the call, such as a KV cache: it attends in place of plain causal attention."""

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, *, theta: float, cu_seqlens: Tensor | None
    ) -> Tensor:
        """q (B, T, Hq, D), k and v (B, T, Hkv, D), none of them rotated, positions (B, T) -> (B, T, Hq, D)."""


class Llama(nn.Module):
    """Attributes:
    activation_checkpointing: recompute the layers' activations in the backward pass instead of keeping them.
    """

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(LlamaLayer(config, index) for index in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, embeddings: Tensor, positions: Tensor, *, cu_seqlens: Tensor | None = None, memory: Memory | None = None
    ) -> Tensor:
        """Run the layers and the final norm.

        Args:
            embeddings: (B, T, D).
            positions: (B, T) int, each token's place in its sequence.
            cu_seqlens: (num_sequences + 1,) int32, the borders of the sequences that B = 1 packs.
            memory: attends in place of plain causal attention within this call.

        Returns:
            (B, T, D) hidden states, of the dtype of `embeddings`.
        """
        x, residual = embeddings, None
        for layer in self.layers:
            arguments = (x, residual, positions, cu_seqlens, memory)
            x, residual = run_block(layer, *arguments, recompute=self.activation_checkpointing)
        return self.norm(x, residual)[0]

    def is_plain(self) -> bool:
        """Whether `decode`, which calls no layer, computes what `forward` does; see `layers.is_plain`."""
        return are_plain(self, self.norm, *(module for layer in self.layers for module in layer.modules()))

    def operands(self, dtype: torch.dtype) -> list[ops.BlockWeights]:
        """The layers' weights for `decode`, which takes a token each time: copies where they are of another dtype."""
        return [layer.operands(dtype) for layer in self.layers]  # type: ignore[operator, misc]

    def decode(
        self,
        embeddings: Tensor,
        operands: Sequence[ops.BlockWeights],
        key_caches: Sequence[Tensor],
        value_caches: Sequence[Tensor],
        lengths: Tensor,
    ) -> Tensor:
        """`forward` for one new token a row, behind what the caches hold, to which it is appended. Has no gradient.

        Args:
            embeddings: (B, 1, D).
            operands: what `operands` gives for their dtype.
            key_caches, value_caches: (B, S, Hkv, head_dim) of each layer; keys are rotated.
            lengths: (B,) int, tokens in the caches of each row, and the new one's position.

        Returns:
            (B, 1, D) hidden states, of the dtype of `embeddings`.
        """
        theta, eps = self.config.rope_theta, self.config.rms_norm_eps
        x, residual = embeddings, None
        for weights, key_cache, value_cache in zip(operands, key_caches, value_caches, strict=True):
            x, residual = ops.decode_block(x, residual, weights, key_cache, value_cache, lengths, theta=theta, eps=eps)
        return self.norm(x, residual)[0]


class LlamaLayer(nn.Module):
    """Attention, then the MLP, each reading the norm of the residual stream.

    A sublayer's result joins the stream in the norm that follows, which makes one pass of the sum and the norm.
    """

    def __init__(self, config: LlamaConfig, index: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = LlamaAttention(config, index)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = LlamaMlp(config.hidden_size, config.intermediate_size)

    def forward(
        self, x: Tensor, residual: Tensor | None, positions: Tensor, cu_seqlens: Tensor | None, memory: Memory | None
    ) -> tuple[Tensor, Tensor]:
        """x, residual (B, T, D), whose sum is the stream -> the same after this layer."""
        x, residual = self.input_layernorm(x, residual)
        x = self.self_attn(x, positions, cu_seqlens, memory)
        x, residual = self.post_attention_layernorm(x, residual)
        return self.mlp(x), residual

    def operands(self, dtype: torch.dtype) -> ops.BlockWeights:
        """The weights, as operators that compute in `dtype` take them."""
        attention, mlp = self.self_attn, self.mlp
        projections = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
        projections += [mlp.gate_proj, mlp.up_proj, mlp.down_proj]
        norms = (self.input_layernorm, self.post_attention_layernorm)
        return ops.BlockWeights(
            *(norm.weight.to(dtype) for norm in norms), *(projection.operand(dtype) for projection in projections)
        )


class LlamaAttention(SideBySide):
    """Grouped-query attention: num_heads query heads share num_kv_heads keys and values."""

    together = ("q_proj", "k_proj", "v_proj")

    def __init__(self, config: LlamaConfig, index: int):
        super().__init__()
        self.index = index
        self.head_dim = config.head_dim
        self.rope_theta = config.rope_theta
        query_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = Linear(config.hidden_size, query_size, bias=False)
        self.k_proj = Linear(config.hidden_size, kv_size, bias=False)
        self.v_proj = Linear(config.hidden_size, kv_size, bias=False)
        self.o_proj = Linear(query_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, positions: Tensor, cu_seqlens: Tensor | None, memory: Memory | None) -> Tensor:
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q_BTHD, k_BTHD, v_BTHD = (project(x).unflatten(-1, (-1, self.head_dim)) for project in projections)
        attend = ops.rope_attention if memory is None else partial(memory.attend, self.index)
        attended_BTHD = attend(q_BTHD, k_BTHD, v_BTHD, positions, theta=self.rope_theta, cu_seqlens=cu_seqlens)
        return self.o_proj(attended_BTHD.flatten(2))


class LlamaMlp(SideBySide):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    together = ("gate_proj", "up_proj")

    def __init__(self, size: int, hidden_size: int):
        super().__init__()
        self.gate_proj = Linear(size, hidden_size, bias=False)
        self.up_proj = Linear(size, hidden_size, bias=False)
        self.down_proj = Linear(hidden_size, size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(ops.swiglu(self.gate_proj(x), self.up_proj(x)))
