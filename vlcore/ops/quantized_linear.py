"""A linear layer whose weight is stored in 8 or 4 bits: weight = scale * integer, one scale a row or a group."""

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from vlcore import native
from vlcore.kernels import launch
from vlcore.ops import autocast, checks, products
from vlcore.ops.dispatch import (
    AUTO,
    TORCH,
    Kernel,
    apply,
    choose,
    define,
    is_transformed,
    known,
    needs_gradient,
    once_differentiable,
    remembered,
)
from vlcore.ops.linear import MAX_ROWS, linear_forward, num_rows

GROUP_SIZES = (32, 64, 128)


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A weight (N, K) in symmetric integers; `quantize_weight` makes it.

    Attributes:
        values: 8 bits: (N, K) int8 in -127..127. 4 bits: (N, ceil(K / 2)) uint8, two a byte, the even column in the
            low half, each -7..7 stored plus 8.
        scales: (N, 1) float32, or (N, K / group_size).
        bits: 8 or 4.
        group_size: inputs that share a scale; None: the whole row does.
        shape: (N, K).

    Raises:
        ValueError: the tensors are not what bits, group_size and shape need. Kernels read them without another look.
    """

    values: Tensor
    scales: Tensor
    bits: int
    group_size: int | None
    shape: tuple[int, int]

    def __post_init__(self):
        _check_weight(self.values, self.scales, self.bits, self.group_size, *self.shape)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight (N, K) that is stood for, computed in float32 (float64 for float64) and rounded to `dtype`."""
        return _dequantize(self.values, self.scales, self.bits, self.shape[1], dtype)


@remembered
def _check_weight(values, scales, bits, group_size, num_outputs, num_inputs) -> str:
    group_size = num_inputs if group_size is None else group_size
    if bits not in (8, 4):
        raise ValueError(f"QuantizedWeight: {bits} bits are neither 8 nor 4.")
    if group_size < 1 or num_inputs % group_size:
        raise ValueError(f"QuantizedWeight: groups of {group_size} do not divide the {num_inputs} inputs of a row.")
    width, integers = (num_inputs, torch.int8) if bits == 8 else ((num_inputs + 1) // 2, torch.uint8)
    for name, tensor, shape, dtype in (
        ("values", values, (num_outputs, width), integers),
        ("scales", scales, (num_outputs, num_inputs // group_size), torch.float32),
    ):
        checks.present("QuantizedWeight", name, tensor)
        if tensor.shape != shape or tensor.dtype != dtype:
            needed = f"{bits} bits of {(num_outputs, num_inputs)} in groups of {group_size} need {shape} {dtype}"
            raise ValueError(f"QuantizedWeight: {name} are {tuple(tensor.shape)} {tensor.dtype}; {needed}.")
    checks.on_device("QuantizedWeight", "scales", scales, "values", values)
    return "fits"


def quantize_weight(weight: Tensor, bits: int, group_size: int | None = None) -> QuantizedWeight:
    """Round a weight to symmetric integers, the largest magnitude of each row or group to the largest integer.

    Args:
        weight: (N, K), floating and finite, K > 0.
        bits: 8 or 4.
        group_size: 32, 64 or 128 neighbouring inputs share a scale, and it divides K; None: a row shares one.

    Raises:
        ValueError: bits, group size or shape as above are not kept, or the weight is not finite.
    """
    checks.rank("quantize_weight", "weight", weight, "N K")
    checks.alike("quantize_weight", weight=weight)
    if not weight.shape[1]:
        raise ValueError(f"quantize_weight: the weight {tuple(weight.shape)} has no inputs to find a scale of.")
    if bits not in (8, 4):
        raise ValueError(f"quantize_weight: {bits} bits are neither 8 nor 4.")
    if group_size is not None and (group_size not in GROUP_SIZES or weight.shape[1] % group_size):
        fitting = f"one of {GROUP_SIZES} that divides the input's {weight.shape[1]}"
        raise ValueError(f"quantize_weight: group_size {group_size} is not {fitting}.")
    if not weight.isfinite().all():
        raise ValueError(f"quantize_weight: the weight {tuple(weight.shape)} holds values that are not finite.")
    largest = 2 ** (bits - 1) - 1
    num_groups = 1 if group_size is None else weight.shape[1] // group_size
    groups = weight.detach().float().unflatten(1, (num_groups, -1))
    scales = groups.abs().amax(-1) / largest
    steps = torch.where(scales == 0, 1.0, scales)[..., None]
    integers = (groups / steps).round().clamp(-largest, largest).flatten(1)
    values = integers.to(torch.int8) if bits == 8 else _pack(integers)
    return QuantizedWeight(values, scales, bits, group_size, (weight.shape[0], weight.shape[1]))


def _pack(integers: Tensor) -> Tensor:
    """(N, K) in -7..7 -> (N, ceil(K / 2)) uint8."""
    shifted = F.pad(integers, (0, integers.shape[1] % 2)).add(8).to(torch.uint8)
    return shifted[:, 0::2] | shifted[:, 1::2] << 4


def _unpack(values: Tensor, num_inputs: int) -> Tensor:
    """(N, ceil(K / 2)) uint8 -> (N, K) int8 in -7..7."""
    halves = torch.stack((values & 15, values >> 4), -1).flatten(1)
    return halves[:, :num_inputs].to(torch.int8) - 8


def _dequantize(values: Tensor, scales: Tensor, bits: int, num_inputs: int, dtype: torch.dtype) -> Tensor:
    wide = torch.promote_types(dtype, torch.float32)
    integers = values if bits == 8 else _unpack(values, num_inputs)
    groups = integers.to(wide).unflatten(1, (scales.shape[1], -1))
    return (groups * scales.to(wide)[..., None]).flatten(1).to(dtype)


def quantized_linear_reference(x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None) -> Tensor:
    """The definition, which every kernel is tested against."""
    return F.linear(x, weight.dequantize(x.dtype), bias)


def quantized_linear(x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None, *, backend: str = AUTO) -> Tensor:
    """x @ weight^T + bias with a weight of integers. x and bias have gradients; the weight has none.

    Args:
        x: (..., K), float32, float16 or bfloat16; float64 on "torch".
        weight: of shape (N, K), on x's device.
        bias: (N,), of x's dtype, or None.
        backend: "auto", "torch", "cuda", which takes up to 16 rows, "triton", which dequantises the weight, into memory
            of its own, for more than 512 rows and for gradients, or "cpp", which multiplies up to 16 rows by the
            integers themselves, where the machine multiplies bytes, and dequantises the weight for more.

    Returns:
        (..., N), of x's dtype. Under torch.autocast x and bias are cast to its dtype.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or a backend that cannot run them.
    """
    if not isinstance(weight, QuantizedWeight):
        raise ValueError(f"quantized_linear: weight is a {type(weight).__name__}; quantize_weight makes what it takes.")
    if autocast.is_on(x):
        return autocast.run(quantized_linear, autocast.low(x), x, weight, bias, backend=backend)
    arguments = (x, weight.values, weight.scales, bias, weight.bits)
    backend = _chosen(*arguments, *weight.shape, backend, needs_gradient(x, bias))
    if is_transformed():
        return quantized_linear_reference(x, weight, bias)
    return apply(QuantizedLinear, *arguments, backend)


@remembered
def _chosen(x, values, scales, bias, bits, num_outputs, num_inputs, backend, records) -> str:
    checks.alike("quantized_linear", x=x, bias=bias)
    shape = num_outputs, num_inputs
    if x.ndim == 0 or x.shape[-1] != num_inputs:
        raise ValueError(f"quantized_linear: x is {tuple(x.shape)}; weight {shape} needs (..., {num_inputs}).")
    checks.on_device("quantized_linear", "weight", values, "x", x)
    if bias is not None and bias.shape != (num_outputs,):
        needed = f"weight {shape} needs ({num_outputs},)"
        raise ValueError(f"quantized_linear: bias is {tuple(bias.shape)}; {needed}.")
    return choose("quantized_linear", KERNELS, backend, x, values, scales, bias, bits)


class QuantizedLinear(torch.autograd.Function):
    """`quantized_linear` through its torch ops; only the integers are kept for the backward."""

    @staticmethod
    def forward(ctx, x, values, scales, bias, bits, backend):
        x, bias = x.contiguous(), None if bias is None else bias.contiguous()
        ctx.save_for_backward(values, scales)
        ctx.numbers = (x.shape[-1], bits, backend)
        return quantized_linear_forward(x, values, scales, bias, bits, backend)

    @staticmethod
    @partial(once_differentiable, instead="F.linear of weight.dequantize()")
    def backward(ctx, grad_y):
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = quantized_linear_backward(grad_y.contiguous(), *ctx.saved_tensors, *ctx.numbers)
        if ctx.needs_input_grad[3]:
            grad_bias = grad_y.sum_to_size(grad_y.shape[-1:])
        return grad_x, None, None, grad_bias, None, None


def _torch_forward(x, values, scales, bias, bits):
    return F.linear(x, _dequantize(values, scales, bits, x.shape[-1], x.dtype), bias)


def _torch_backward(grad_y, values, scales, num_inputs, bits):
    return grad_y @ _dequantize(values, scales, bits, num_inputs, grad_y.dtype)


def group_refusals(num_inputs: int, num_groups: int) -> list[str]:
    """Why no kernel can run scales of that many groups."""
    fits = num_groups == 1 or num_inputs in [size * num_groups for size in GROUP_SIZES]
    return [f"{num_groups} groups of {num_inputs} inputs are not of one of {GROUP_SIZES}"] * (not fits)


def _cuda_refusals(x: Tensor, values: Tensor, scales: Tensor, bias: Tensor | None, bits: int) -> list[str]:
    if reasons := native.cuda_refusals(x):
        return reasons
    reasons = group_refusals(x.shape[-1], scales.shape[1])
    if not known(num_rows(x) <= MAX_ROWS):
        reasons.append(f"it takes up to {MAX_ROWS} rows, and these are {num_rows(x)}")
    if x.shape[-1] % (128 // bits):
        reasons.append(f"{x.shape[-1]} inputs of {bits} bits are no multiple of 16 bytes")
    return reasons


def _cuda_worthwhile(x: Tensor, values: Tensor, scales: Tensor, bias: Tensor | None, bits: int) -> bool:
    return not needs_gradient(x, bias)


def _cuda_forward(x: Tensor, values: Tensor, scales: Tensor, bias: Tensor | None, bits: int) -> Tensor:
    y = x.new_empty(*x.shape[:-1], values.shape[0])
    given = (native.aligned(x), native.aligned(values), scales.contiguous(), bias, y)
    sizes = (num_rows(x), values.shape[0], x.shape[-1], scales.shape[1], bits)
    native.run_cuda("quantized_linear_forward", x, *given, *sizes)
    return y


def _triton_refusals(x: Tensor, values: Tensor, scales: Tensor, bias: Tensor | None, bits: int) -> list[str]:
    return launch.dot_refusals(x) + group_refusals(x.shape[-1], scales.shape[1])


def _cpp_refusals(x: Tensor, values: Tensor, scales: Tensor, bias: Tensor | None, bits: int) -> list[str]:
    return native.cpp_refusals(x) + group_refusals(x.shape[-1], scales.shape[1])


def _cpp_forward(x: Tensor, values: Tensor, scales: Tensor, bias: Tensor | None, bits: int) -> Tensor:
    if num_rows(x) > MAX_ROWS:
        weight = _cpp_dequantize(values, scales, bits, x.shape[-1], x.dtype)
        ours = products.ours_are_faster(x.dtype, num_rows(x), *weight.shape)
        return linear_forward(x, weight, bias, None, None, "cpp" if ours else TORCH)
    y = x.new_empty(*x.shape[:-1], values.shape[0])
    given = (x, values.contiguous(), scales.contiguous(), bias, y)
    sizes = (num_rows(x), values.shape[0], x.shape[-1], scales.shape[1], bits)
    native.run_cpp("quantized_linear_forward", x.dtype, *given, *sizes)
    return y


def _cpp_backward(grad_y: Tensor, values: Tensor, scales: Tensor, num_inputs: int, bits: int) -> Tensor:
    return grad_y @ _cpp_dequantize(values, scales, bits, num_inputs, grad_y.dtype)


def _cpp_dequantize(values: Tensor, scales: Tensor, bits: int, num_inputs: int, dtype: torch.dtype) -> Tensor:
    weight = torch.empty(values.shape[0], num_inputs, dtype=dtype)
    given = (values.contiguous(), scales.contiguous(), weight)
    native.run_cpp("dequantize", dtype, *given, *weight.shape, scales.shape[1], bits)
    return weight


# In order of preference.
KERNELS = {
    # Few rows; their gradient is torch's.
    "cuda": Kernel(_cuda_forward, _torch_backward, _cuda_refusals, _cuda_worthwhile),
    "triton": Kernel(
        native.triton("quantized_linear", "forward"),
        native.triton("quantized_linear", "backward"),
        _triton_refusals,
        launch.worthwhile,
    ),
    "cpp": Kernel(_cpp_forward, _cpp_backward, _cpp_refusals),
}

quantized_linear_forward = define(
    "quantized_linear_forward(Tensor x, Tensor values, Tensor scales, Tensor? bias, int bits, str backend) -> Tensor",
    KERNELS,
    _torch_forward,
    fake=lambda x, values, *rest: x.new_empty(*x.shape[:-1], values.shape[0]),
)
quantized_linear_backward = define(
    "quantized_linear_backward(Tensor grad_y, Tensor values, Tensor scales, SymInt num_inputs, int bits, str backend)"
    " -> Tensor",
    KERNELS,
    _torch_backward,
    fake=lambda grad_y, values, scales, num_inputs, *rest: grad_y.new_empty(*grad_y.shape[:-1], num_inputs),
)
