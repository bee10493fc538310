"""SAM's ViTDet, the high-resolution tower: window attention with a few global blocks, and two necks.

The second neck reads what the first global block gives; DeepSeek-VL adds it back behind the first (vision.py).
"""

import torch
from torch import Tensor, nn

from vlcore import ops
from vlcore.config import SamConfig
from vlcore.models.layers import (
    Conv2d,
    LayerNorm,
    Linear,
    Mlp,
    PatchEmbedding,
    is_plain,
    linear,
    normalized,
    run_block,
)

NECK_EPS = 1e-6  # of the public code, whatever the blocks' eps is


class Sam(nn.Module):
    """Attributes:
    activation_checkpointing: recompute the blocks' activations in the backward pass instead of keeping them.
    """

    def __init__(self, config: SamConfig):
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        self.patch_embed = PatchEmbedding(config.patch_size, config.hidden_size)
        self.pos_embed = nn.Parameter(torch.zeros(1, config.grid, config.grid, config.hidden_size))
        self.blocks = nn.ModuleList(SamBlock(config, i in config.global_layers) for i in range(config.num_layers))
        self.neck = Neck(config.hidden_size, config.neck_channels)
        self.skip_neck = Neck(config.hidden_size, config.neck_channels)

    def forward(self, pixels: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """pixels (I, 3, S, S) in [0, 1] -> detail and skip, both (I, neck_channels, grid, grid), computed in `dtype`.

        `detail` comes from the last block, `skip` from the first global one, each through a neck of its own.
        """
        x = self.patch_embed(normalized(pixels, self.config.mean, self.config.std).to(dtype))
        x = x + self.pos_embed.to(dtype)
        skip = x
        for i, block in enumerate(self.blocks):
            x = run_block(block, x, recompute=self.activation_checkpointing)
            if i == self.config.global_layers[0]:
                skip = x
        return self.neck(x), self.skip_neck(skip)


class SamBlock(nn.Module):
    def __init__(self, config: SamConfig, is_global: bool):
        super().__init__()
        self.norm1 = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.attn = SamAttention(config, None if is_global else config.window_size)
        self.norm2 = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = Mlp(config.hidden_size, config.intermediate_size)

    def forward(self, x: Tensor) -> Tensor:
        x = self.attn(self.norm1(x), x)
        return self.mlp(self.norm2(x), x)


class SamAttention(nn.Module):
    """Attention with decomposed relative positions: inside windows, or over the whole map where `window` is None."""

    def __init__(self, config: SamConfig, window: int | None):
        super().__init__()
        self.num_heads = config.num_heads
        self.window = window
        self.qkv = Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = Linear(config.hidden_size, config.hidden_size)
        num_offsets = 2 * (window or config.grid) - 1
        self.rel_pos_h = nn.Parameter(torch.zeros(num_offsets, config.hidden_size // config.num_heads))
        self.rel_pos_w = nn.Parameter(torch.zeros(num_offsets, config.hidden_size // config.num_heads))

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """x, residual (B, Y, X, C) -> (B, Y, X, C), the residual added."""
        heads = (3, self.num_heads, -1)
        rel_pos_h, rel_pos_w = self.rel_pos_h.to(x.dtype), self.rel_pos_w.to(x.dtype)
        qkv_BYX3HD = self.qkv(x).unflatten(-1, heads)
        if self.window:
            # The public model pads the normed map with zeros, so a padded position's q, k and v are the bias.
            padding = self.qkv.bias.to(x.dtype).view(heads)
            attended = ops.window_attention(qkv_BYX3HD, padding, rel_pos_h, rel_pos_w, self.window)
            return linear(self.proj, attended, residual=residual)
        grid = (x.shape[1], x.shape[2])
        q_BHTD, k_BHTD, v_BHTD = qkv_BYX3HD.flatten(1, 2).permute(2, 0, 3, 1, 4)
        attended_BHTD = ops.rel_pos_attention(q_BHTD, k_BHTD, v_BHTD, rel_pos_h, rel_pos_w, grid)
        return linear(self.proj, attended_BHTD.transpose(1, 2).flatten(2).view(x.shape), residual=residual)


class Neck(nn.Module):
    """Two convolutions without bias, each with a LayerNorm over channels behind it."""

    def __init__(self, in_channels: int, channels: int):
        super().__init__()
        self.conv1 = Conv2d(in_channels, channels, 1, bias=False)
        self.norm1 = LayerNorm(channels, NECK_EPS)
        self.conv2 = Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = LayerNorm(channels, NECK_EPS)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, Y, X, in_channels) -> (B, channels, Y, X)."""
        if is_plain(self.conv1):
            x = ops.linear(x, self.conv1.weight.flatten(1).to(x.dtype))
        else:
            x = self.conv1(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        x = self.norm1(x)
        x = self.conv2(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.norm2(x).permute(0, 3, 1, 2)
