"""SigLIP, the low-resolution tower: a pre-LN vision transformer without a class token; every token is kept.

Source: timm's vit_large_patch16_siglip_384, whose attention pooling DeepSeek-VL does not apply.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlcore import ops
from vlcore.config import SiglipConfig
from vlcore.models.layers import LayerNorm, Linear, Mlp, PatchEmbedding, linear, normalized, run_block


class Siglip(nn.Module):
    """Attributes:
    activation_checkpointing: recompute the blocks' activations in the backward pass instead of keeping them.
    """

    def __init__(self, config: SiglipConfig):
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        self.patch_embed = PatchEmbedding(config.patch_size, config.hidden_size)
        self.pos_embed = nn.Parameter(torch.zeros(1, config.num_tokens, config.hidden_size))
        self.blocks = nn.ModuleList(SiglipBlock(config) for _ in range(config.num_layers))
        self.norm = LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, pixels: Tensor, dtype: torch.dtype) -> Tensor:
        """pixels (I, 3, S, S) in [0, 1] at any S -> (I, num_tokens, hidden_size), computed in `dtype`.

        The public model brings the padded high-resolution image to this tower's size by antialiased bilinear
        resizing, in float32, before it normalises.
        """
        size = self.config.image_size
        if pixels.shape[-1] != size:
            pixels = F.interpolate(pixels.float(), (size, size), mode="bilinear", antialias=True, align_corners=False)
        pixels = normalized(pixels, self.config.mean, self.config.std).to(dtype)
        x = self.patch_embed(pixels).flatten(1, 2) + self.pos_embed.to(dtype)
        for block in self.blocks:
            x = run_block(block, x, recompute=self.activation_checkpointing)
        return self.norm(x)


class SiglipBlock(nn.Module):
    def __init__(self, config: SiglipConfig):
        super().__init__()
        self.norm1 = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.attn = SiglipAttention(config)
        self.norm2 = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = Mlp(config.hidden_size, config.intermediate_size)

    def forward(self, x: Tensor) -> Tensor:
        x = self.attn(self.norm1(x), x)
        return self.mlp(self.norm2(x), x)


class SiglipAttention(nn.Module):
    """Every token attends to every token."""

    def __init__(self, config: SiglipConfig):
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """x, residual (I, T, C) -> (I, T, C), the residual added."""
        q_BTHD, k_BTHD, v_BTHD = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        return linear(self.proj, ops.attention(q_BTHD, k_BTHD, v_BTHD).flatten(2), residual=residual)
