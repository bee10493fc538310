"""Layers that compute in the dtype of what they are fed, whatever dtype their own weights are kept in.

A model with float32 weights computes in bfloat16 when its input is bfloat16: mixed precision without autocast, and the
gradients arrive in float32.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vlcore import ops
from vlcore.ops.decode_block import side_by_side

Output = TypeVar("Output")


class Linear(nn.Linear):
    """x (..., in_features) -> (..., out_features), of x's dtype."""

    def operand(self, dtype: torch.dtype) -> Tensor:
        """The weight, as operators that compute in `dtype` take it."""
        return self.weight.to(dtype)

    def stored(self) -> tuple[Tensor, ...]:
        """What the weight is held in, of as many rows."""
        return (self.weight,)

    def forward(self, x: Tensor, *, residual: Tensor | None = None, activation: str | None = None) -> Tensor:
        """activation(linear(x)) + residual."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return ops.linear(x, self.weight.to(x.dtype), bias, residual=residual, activation=activation)


def is_plain(module: nn.Module) -> bool:
    """Whether a call of a layer does what its class here says and no more, so that its weights may be computed with in
    another way: it is none that somebody has put in its place, such as LoRA's, and nothing is hooked to it."""
    hooks = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
    known = type(module).forward.__module__.startswith(__package__) and "forward" not in module.__dict__
    return known and not any(hooks)


def are_plain(*modules: nn.Module) -> bool:
    """Whether `is_plain` is true of all."""
    return all(map(is_plain, modules))


def linear(layer: nn.Module, x: Tensor, *, residual: Tensor | None = None, gelu: bool = False) -> Tensor:
    """gelu(layer(x)) + residual: as one operator where the layer is plain."""
    if is_plain(layer):
        return layer(x, residual=residual, activation="gelu" if gelu else None)
    y = layer(x)
    y = F.gelu(y) if gelu else y
    return y if residual is None else y + residual


class Conv2d(nn.Conv2d):
    """x (B, in_channels, Y, X) -> (B, out_channels, Y', X'), of x's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.conv2d(x, self.weight.to(x.dtype), bias, self.stride, self.padding)


class Embedding(nn.Embedding):
    """ids (...) -> (..., embedding_dim), of the dtype asked for."""

    def forward(self, ids: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return F.embedding(ids, self.weight).to(dtype or self.weight.dtype)


class LayerNorm(nn.LayerNorm):
    """LayerNorm over the last dimension, statistics in float32; x (..., N) -> (..., N), of x's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        return ops.layer_norm(x, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class RMSNorm(nn.Module):
    """The norm of a residual stream: adds what the last sublayer gave to the stream, and normalises the sum."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x, residual (..., N) -> (norm(x + residual), x + residual), of x's dtype; no residual counts as zero."""
        # Under autocast a sublayer's result is narrower than the stream.
        weight = self.weight.to(x.dtype if residual is None else residual.dtype)
        if residual is None:
            return ops.rms_norm(x, weight, self.eps), x
        return ops.add_rms_norm(x, residual, weight, self.eps)


class Mlp(nn.Module):
    """The vision towers' feed-forward: Linear, exact (erf) GELU, Linear."""

    def __init__(self, size: int, hidden_size: int):
        super().__init__()
        self.fc1 = Linear(size, hidden_size)
        self.fc2 = Linear(hidden_size, size)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """x, residual (..., size) -> (..., size), the residual added."""
        return linear(self.fc2, linear(self.fc1, x, gelu=True), residual=residual)


class PatchEmbedding(Conv2d):
    """Non-overlapping patches through one linear map: pixels (B, 3, S, S) -> (B, S / patch, S / patch, size)."""

    def __init__(self, patch_size: int, size: int):
        super().__init__(3, size, patch_size, stride=patch_size)

    def forward(self, pixels: Tensor) -> Tensor:
        return super().forward(pixels).permute(0, 2, 3, 1)


def normalized(pixels: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """(pixels - mean) / std for each of the three channels of (B, 3, Y, X), in float32 at least."""
    pixels = pixels.to(torch.promote_types(pixels.dtype, torch.float32))
    # By numbers: a tensor of them would be copied to a GPU each time, which waits, and which no CUDA graph holds.
    return torch.stack([(x - mean[i]) / std[i] for i, x in enumerate(pixels.unbind(1))], 1)


class SideBySide(nn.Module):
    """A module with layers that read the same, plain or quantised: on a GPU their weights are neighbours in memory,
    where decoding reads them as one (ops.decode_block).

    Attributes:
        together: the names of those layers.
    """

    together: tuple[str, ...]

    def lay_side_by_side(self) -> None:
        """Move them there, if they are not; a module that is moved sees to it itself."""
        layers = [getattr(self, name) for name in self.together]
        if not all(hasattr(layer, "stored") for layer in layers):
            return  # somebody has put layers of their own in their place
        for tensors in zip(*(layer.stored() for layer in layers), strict=False):
            # What is sharded, say, is not plainly in memory.
            if all(tensor.is_cuda and type(tensor.data) is Tensor for tensor in tensors):
                move_side_by_side(tensors)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self.lay_side_by_side()
        return self


def lay_side_by_side(model: nn.Module) -> None:
    """All that are to be so in a model whose weights are new."""
    for module in model.modules():
        if isinstance(module, SideBySide):
            module.lay_side_by_side()


def move_side_by_side(tensors: Sequence[Tensor]) -> None:
    """Of one dtype and as wide each; nothing is moved that is there already, or that is not alike."""
    kinds = {(tensor.dtype, tensor.shape[1:]) for tensor in tensors}
    if len(kinds) == 1 and side_by_side(tensors) is None:
        joined = torch.cat([tensor.detach() for tensor in tensors])
        for tensor, part in zip(tensors, joined.split([len(tensor) for tensor in tensors]), strict=True):
            tensor.data = part


def run_block(block: Callable[..., Output], *arguments, recompute: bool) -> Output:
    """block(*arguments); with `recompute`, what it computes inside is dropped and computed again for the gradients."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(block, *arguments, use_reentrant=False)
    return block(*arguments)


def is_frozen(module: nn.Module) -> bool:
    """Whether no parameter of `module` is trained, so that it needs no graph."""
    return not any(parameter.requires_grad for parameter in module.parameters())
