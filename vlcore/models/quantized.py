"""A model whose language part holds its weights in 8 or 4 bits: for decoding, which is the reading of weights."""

import torch
from torch import Tensor, nn

from vlcore import ops
from vlcore.models.deepseek_vl import DeepSeekVL, unwrapped
from vlcore.models.layers import Linear, lay_side_by_side
from vlcore.native import prefer_huge_pages


class QuantizedLinear(nn.Module):
    """A Linear whose weight is integers: x (..., in_features) -> (..., out_features), of x's dtype.

    The integers and scales are buffers: they move with the module, have no gradient and keep their dtypes.
    """

    values: Tensor
    scales: Tensor

    def __init__(self, weight: ops.QuantizedWeight):
        super().__init__()
        self.bits, self.group_size, self.shape = weight.bits, weight.group_size, weight.shape
        self.register_buffer("values", prefer_huge_pages(torch.empty_like(weight.values)).copy_(weight.values))
        self.register_buffer("scales", weight.scales)

    def operand(self, dtype: torch.dtype) -> ops.QuantizedWeight:
        """The weight, as operators take it; they compute in any dtype with it."""
        return ops.QuantizedWeight(self.values, self.scales, self.bits, self.group_size, self.shape)

    def stored(self) -> tuple[Tensor, ...]:
        return self.values, self.scales

    def forward(self, x: Tensor) -> Tensor:
        return ops.quantized_linear(x, self.operand(x.dtype))

    def _apply(self, fn, recurse=True):
        # model.to(bfloat16) is about weights: a scale is float32 whatever the model computes in.
        scales = self.scales
        super()._apply(fn, recurse)
        if self.scales.dtype != scales.dtype:
            self.scales = scales.to(self.scales.device)
        return self

    def extra_repr(self) -> str:
        return f"in_features={self.shape[1]}, out_features={self.shape[0]}, bits={self.bits}"


def quantize(model: DeepSeekVL, bits: int = 8, group_size: int | None = None, *, lm_head: bool = True) -> None:
    """Replace the language model's linear layers, in place, by ones of integers; embeddings and vision stay.

    A weight of 16 bits then takes a half or a quarter of its memory, and 4 bytes more for each row or group. Weights
    are replaced one after another, so that the peak is the model and some float32 copies of its largest weight. There
    is no way back, nor a layout on disk: quantise what `from_pretrained` gives.

    Args:
        model: whose weights are finite, torch.compile's wrapper or not. It computes in the dtype that it did.
        bits: 8 or 4.
        group_size: 32, 64 or 128 neighbouring inputs share a scale; None: all of a row do.
        lm_head: quantise the head too. One that shares the embedding's weight gets a weight of its own.

    Raises:
        ValueError: another module than a DeepSeekVL, one that is quantised already, or bits and group_size are not as
            above or do not fit its layers; the model is as it was.
    """
    model = unwrapped("quantize", model)
    if first := quantized_name(model):
        raise ValueError(f"quantize: the model is quantised already: {first} holds integers.")
    if bits not in (8, 4):
        raise ValueError(f"quantize: {bits} bits are neither 8 nor 4.")
    prefixes = ("language.", "lm_head") if lm_head else ("language.",)
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, Linear) and name.startswith(prefixes)
    }
    for name, layer in layers.items():
        if group_size is not None and (group_size not in ops.GROUP_SIZES or layer.in_features % group_size):
            fitting = f"one of {ops.GROUP_SIZES} that divides the {layer.in_features} inputs of {name}"
            raise ValueError(f"quantize: group_size {group_size} is not {fitting}.")
        if not layer.weight.isfinite().all():
            raise ValueError(f"quantize: the weight of {name} holds values that are not finite.")
    for name in list(layers):
        replacement = QuantizedLinear(ops.quantize_weight(layers.pop(name).weight, bits, group_size))
        model.set_submodule(name, replacement)
        replacement.train(model.training)
    lay_side_by_side(model)


def quantized_name(model: nn.Module) -> str | None:
    """The first layer of a model that `quantize` has replaced, None where there is none."""
    return next((name for name, module in model.named_modules() if isinstance(module, QuantizedLinear)), None)
