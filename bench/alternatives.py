"""What a user would run in an operator's place that takes more than a line of torch, or another package.

Nothing of it is needed: a bench takes what is installed, where it runs. They take the arguments of the operator's case.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

EPS = 1e-6


@dataclass(frozen=True)
class Alternative:
    """A peer that is not to be had everywhere.

    Attributes:
        call: called with the inputs; it imports the package itself.
        package: what has to be installed.
        devices: where it runs.
        compiles: whether it is nothing without torch.compile.
    """

    call: Callable[..., object]
    package: str = "torch"
    devices: tuple[str, ...] = ("cuda",)
    compiles: bool = False

    def __call__(self, *inputs: object) -> object:
        return self.call(*inputs)

    def is_to_be_had(self, device: str, compiled: bool) -> bool:
        return device in self.devices and compiled >= self.compiles and find_spec(self.package) is not None


def compiled(function: Callable) -> Callable:
    """torch.compile for the shapes at hand, when first called: preparing it takes seconds."""
    make = cache(partial(torch.compile, function, dynamic=False))
    return lambda *inputs: make()(*inputs)


def rel_pos_biases(q: Tensor, rel_pos_h: Tensor, rel_pos_w: Tensor) -> tuple[Tensor, Tensor]:
    """q (B, H, Y * X, D) -> its products with the tables' rows, (B, H, Y * X, Y) and (B, H, Y * X, X)."""
    by_row, by_col = (_by_offset(table) for table in (rel_pos_h, rel_pos_w))
    grid = q.unflatten(2, (by_row.shape[0], by_col.shape[0]))
    rel_h = torch.einsum("bhyxd,ykd->bhyxk", grid, by_row)
    rel_w = torch.einsum("bhyxd,xkd->bhyxk", grid, by_col)
    return rel_h.flatten(2, 3), rel_w.flatten(2, 3)


def _by_offset(table: Tensor) -> Tensor:
    side = (table.shape[0] + 1) // 2
    place = torch.arange(side, device=table.device)
    return table[place[:, None] - place + side - 1]


def sdpa_with_bias(q: Tensor, k: Tensor, v: Tensor, rel_pos_h: Tensor, rel_pos_w: Tensor) -> Tensor:
    """rel_pos_attention by SDPA, whose bias is held whole."""
    rel_h, rel_w = rel_pos_biases(q, rel_pos_h, rel_pos_w)
    return F.scaled_dot_product_attention(q, k, v, (rel_h[..., None] + rel_w[..., None, :]).flatten(3))


def flex_rel_pos(q: Tensor, k: Tensor, v: Tensor, rel_pos_h: Tensor, rel_pos_w: Tensor) -> Tensor:
    """rel_pos_attention by FlexAttention, which adds the bias to each score."""
    from torch.nn.attention.flex_attention import flex_attention

    rel_h, rel_w = rel_pos_biases(q, rel_pos_h, rel_pos_w)
    width = rel_w.shape[-1]

    def add_bias(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return score + rel_h[batch, head, query, key // width] + rel_w[batch, head, query, key % width]

    return flex_attention(q, k, v, score_mod=add_bias)


def llama_rotation(q: Tensor, k: Tensor, positions: Tensor, theta: float = 1e4) -> tuple[Tensor, Tensor]:
    """q, k (B, T, H, D) turned by transformers' function, at (B, H, T, D); its tables are made at each call."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    wide = torch.promote_types(q.dtype, torch.float32)
    exponents = torch.arange(0, q.shape[-1], 2, device=q.device, dtype=wide) / q.shape[-1]
    angles = (positions[..., None].to(wide) / theta**exponents).repeat(1, 1, 2)
    cos, sin = angles.cos().to(q.dtype), angles.sin().to(q.dtype)
    return apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), cos, sin)


def llama_attention(q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
    """rope_attention as transformers' LLaMA does it, by SDPA."""
    q, k = llama_rotation(q, k, positions)
    return F.scaled_dot_product_attention(q, k, v.transpose(1, 2), is_causal=True).transpose(1, 2)


def varlen_packed(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
    """rope_attention of packed sequences by torch's own FlashAttention."""
    from torch.nn.attention.varlen import varlen_attn

    q, k = (x[0].transpose(0, 1) for x in llama_rotation(q, k, positions))
    out = varlen_attn(q, k, v[0], cu_seqlens, cu_seqlens, longest, longest, window_size=(-1, 0))
    return cast(Tensor, out)[None]


def xformers_packed(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
    """rope_attention of packed sequences by xformers."""
    from xformers.ops import memory_efficient_attention
    from xformers.ops.fmha.attn_bias import BlockDiagonalCausalMask

    q, k = (x.transpose(1, 2) for x in llama_rotation(q, k, positions))
    return memory_efficient_attention(q, k, v, BlockDiagonalCausalMask.from_seqlens(cu_seqlens.diff().tolist()))


class FlexPacked:
    """rope_attention of packed sequences by FlexAttention; its mask of blocks, which all layers share, is made once."""

    def __init__(self, attend: Callable):
        self.attend = attend
        self.mask: object = None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
        if self.mask is None:
            self.mask = block_mask(cu_seqlens, q.shape[1])
        return self.attend(q, k, v, positions, self.mask)


def block_mask(cu_seqlens: Tensor, num_tokens: int) -> object:
    """Causal within each of the packed sequences."""
    from torch.nn.attention.flex_attention import create_block_mask

    sequence = torch.searchsorted(cu_seqlens, torch.arange(num_tokens, device=cu_seqlens.device), right=True)

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (sequence[query] == sequence[key]) & (query >= key)

    return create_block_mask(sees, None, None, num_tokens, num_tokens, device=cu_seqlens.device.type)


def flex_masked(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, mask: Any) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    q, k = llama_rotation(q, k, positions)
    return flex_attention(q, k, v.transpose(1, 2), block_mask=mask).transpose(1, 2)


def llama_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    return LlamaRMSNorm.forward(cast(Any, SimpleNamespace(weight=weight, variance_epsilon=EPS)), x)


def xformers_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from xformers.ops import memory_efficient_attention

    return memory_efficient_attention(q, k, v)


def by_cudnn(attend: Callable[..., object]) -> Alternative:
    """What attends by SDPA, by that of cuDNN, which torch need not take by itself, and which takes no float32."""

    def call(*inputs: object) -> object:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return attend(*inputs)

    return Alternative(call)


def liger(function: str, *constants: float) -> Alternative:
    """A function of Liger-Kernel: of the inputs, and of constants behind them."""

    def call(*inputs: Tensor) -> object:
        from liger_kernel.transformers import functional

        return getattr(functional, function)(*inputs, *constants)

    return Alternative(call, "liger_kernel")
