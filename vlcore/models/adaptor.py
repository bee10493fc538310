"""The adaptor: the vision towers' tokens to the language model's width. The paper's, and those it is compared with.

The paper's section 4.3 compares the hybrid adaptor with "shared" and "separate" ones and leaves their inner sizes
open; ours end at the same width with two layers a token each, so that only the sharing differs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlcore import ops
from vlcore.config import VLConfig
from vlcore.models.layers import Linear, are_plain, linear


def make_adaptor(config: VLConfig) -> nn.Module:
    """The adaptor that `config.adaptor` names. Each is called as adaptor(low, high).

    Raises:
        ValueError: a "shared" adaptor for towers of different widths.
    """
    low_size, size = config.siglip.hidden_size, config.language.hidden_size
    if config.sam is None:
        return MlpAdaptor(low_size, size)
    high_size = config.sam.output_size
    if config.adaptor == "hybrid":
        return HybridAdaptor(high_size, low_size, size)
    if config.adaptor == "separate":
        return SeparateAdaptor(high_size, low_size, size)
    if high_size != low_size:
        raise ValueError(
            f"A 'shared' adaptor reads both towers' tokens with one MLP, so their widths must be equal: "
            f"SAM's {high_size} is not SigLIP's {low_size}."
        )
    return SharedAdaptor(low_size, size)


class HybridAdaptor(nn.Module):
    """A linear map for each tower, concatenated (high first), GELU, a linear map of the whole: the paper's."""

    def __init__(self, high_size: int, low_size: int, size: int):
        super().__init__()
        self.high = Linear(high_size, size // 2)
        self.low = Linear(low_size, size // 2)
        self.out = Linear(size, size)

    def forward(self, low: Tensor, high: Tensor) -> Tensor:
        """low (I, T, C_low), high (I, T, C_high) -> (I, T, D)."""
        maps = (self.high, self.low, self.out)
        if not are_plain(*maps):
            return self.out(F.gelu(torch.cat((self.high(high), self.low(low)), -1)))
        return ops.hybrid_adaptor(high, low, *(p.to(low.dtype) for m in maps for p in (m.weight, m.bias)))


class MlpAdaptor(nn.Module):
    """Linear, GELU, Linear."""

    def __init__(self, in_size: int, size: int):
        super().__init__()
        self.fc1 = Linear(in_size, size)
        self.fc2 = Linear(size, size)

    def forward(self, low: Tensor, high: None = None) -> Tensor:
        """low (I, T, C) -> (I, T, D)."""
        return self.fc2(linear(self.fc1, low, gelu=True))


class SharedAdaptor(nn.Module):
    """One MLP to half the width reads both towers' tokens; its two results are concatenated, high first."""

    def __init__(self, in_size: int, size: int):
        super().__init__()
        self.both = MlpAdaptor(in_size, size // 2)

    def forward(self, low: Tensor, high: Tensor) -> Tensor:
        """low, high (I, T, C) -> (I, T, D)."""
        return torch.cat((self.both(high), self.both(low)), -1)


class SeparateAdaptor(nn.Module):
    """An MLP to half the width for each tower; the two results are concatenated, high first."""

    def __init__(self, high_size: int, low_size: int, size: int):
        super().__init__()
        self.high = MlpAdaptor(high_size, size // 2)
        self.low = MlpAdaptor(low_size, size // 2)

    def forward(self, low: Tensor, high: Tensor) -> Tensor:
        """low (I, T, C_low), high (I, T, C_high) -> (I, T, D)."""
        return torch.cat((self.high(high), self.low(low)), -1)
