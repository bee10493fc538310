"""The hybrid vision encoder: SAM for detail, SigLIP for meaning, both brought to SigLIP's grid of tokens."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from vlcore import ops
from vlcore.config import SamConfig, VLConfig
from vlcore.models.layers import Conv2d, are_plain, is_frozen
from vlcore.models.sam import Sam
from vlcore.models.siglip import Siglip
from vlcore.ops.downsample_features import resized


class TowerFeatures(NamedTuple):
    """What the towers give for I images, before anything that the first two training stages train.

    Attributes:
        low: SigLIP's tokens, (I, num_image_tokens, C).
        detail, skip: SAM's two maps, (I, neck_channels, grid, grid); None without SAM.
    """

    low: Tensor
    detail: Tensor | None = None
    skip: Tensor | None = None


class Vision(nn.Module):
    """The towers, and the convolutions that bring SAM's map to SigLIP's grid; `sam` is None for SigLIP alone."""

    def __init__(self, config: VLConfig):
        super().__init__()
        self.siglip = Siglip(config.siglip)
        self.sam = Sam(config.sam) if config.sam else None
        self.downsample = Downsample(config.sam, config.siglip.grid) if config.sam else None

    def towers(self, pixels: Tensor, dtype: torch.dtype) -> TowerFeatures:
        """pixels (I, 3, S, S) in [0, 1] -> the towers' features in `dtype`; a frozen tower keeps no graph."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not is_frozen(self.siglip)):
            low = self.siglip(pixels, dtype)
        if self.sam is None:
            return TowerFeatures(low)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not is_frozen(self.sam)):
            return TowerFeatures(low, *self.sam(pixels, dtype))

    def forward(self, features: TowerFeatures) -> tuple[Tensor, Tensor | None]:
        """The towers' features -> low (I, T, C_low) and high (I, T, C_high), T = num_image_tokens; high may be None."""
        if self.downsample is None:
            return features.low, None
        return features.low, self.downsample(features.detail, features.skip)


class Downsample(nn.Module):
    """Interpolate to four times SigLIP's grid, then two stride-2 convolutions: 64 -> 96 -> 48 -> 24 at full size.

    The second branch, times `alpha`, is added before the interpolation, not behind the convolutions as in the public
    code: all of it is linear and has no bias, so the result is the same for half of the work.
    """

    def __init__(self, config: SamConfig, grid: int):
        super().__init__()
        channels = config.neck_channels
        self.size = 4 * grid
        self.conv1 = Conv2d(channels, 2 * channels, 3, stride=2, padding=1, bias=False)
        self.conv2 = Conv2d(2 * channels, 4 * channels, 3, stride=2, padding=1, bias=False)
        self.alpha = nn.Parameter(torch.zeros(1))

    def forward(self, detail: Tensor, skip: Tensor) -> Tensor:
        """detail, skip (I, C, Y, X) -> (I, grid * grid, 4 C), row-major."""
        if not are_plain(self.conv1, self.conv2):
            return self.conv2(self.conv1(resized(detail, skip, self.alpha, self.size))).flatten(2).transpose(1, 2)
        conv1, conv2 = self.conv1.weight.to(detail.dtype), self.conv2.weight.to(detail.dtype)
        return ops.downsample_features(detail, skip, self.alpha, conv1, conv2, self.size)
