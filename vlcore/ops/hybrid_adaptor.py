"""The hybrid adaptor: Linear(GELU(concat(Linear(high), Linear(low)))), high first, GELU with the exact erf."""

import torch
import torch.nn.functional as F
from torch import Tensor

from vlcore import native
from vlcore.kernels import launch
from vlcore.ops import autocast, checks, products
from vlcore.ops.dispatch import AUTO, TORCH, Kernel, apply, choose, define, gradients, once_differentiable
from vlcore.ops.linear import linear_backward, linear_forward, num_rows


def hybrid_adaptor_reference(
    high: Tensor,
    low: Tensor,
    high_weight: Tensor,
    high_bias: Tensor,
    low_weight: Tensor,
    low_bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
) -> Tensor:
    """The definition, which every kernel is tested against."""
    return F.linear(F.gelu(_project_up(high, low, high_weight, high_bias, low_weight, low_bias)), out_weight, out_bias)


def _project_up(high, low, high_weight, high_bias, low_weight, low_bias) -> Tensor:
    return torch.cat((F.linear(high, high_weight, high_bias), F.linear(low, low_weight, low_bias)), -1)


def hybrid_adaptor(
    high: Tensor,
    low: Tensor,
    high_weight: Tensor,
    high_bias: Tensor,
    low_weight: Tensor,
    low_bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    *,
    backend: str = AUTO,
) -> Tensor:
    """Join the tokens of the two vision towers and bring them to the language model's width (arXiv 2403.05525, 3.1).

    Args:
        high: (..., T, Ch), the high-resolution tower's; float32, float16 or bfloat16, float64 on "torch".
        low: (..., T, Cl), the low-resolution tower's.
        high_weight, high_bias: (Dh, Ch), (Dh,); low_weight, low_bias: (Dl, Cl), (Dl,).
        out_weight, out_bias: (D, Dh + Dl), (D,). All are of high's dtype.
        backend: "auto", "torch", "triton" or "cpp".

    Returns:
        (..., T, D), of high's dtype. Under torch.autocast all are cast to its dtype.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or a backend that cannot run them.
    """
    arguments = (high, low, high_weight, high_bias, low_weight, low_bias, out_weight, out_bias)
    if autocast.is_on(high):
        return autocast.run(hybrid_adaptor, autocast.low(high), *arguments, backend=backend)
    _check(*arguments)
    backend = choose("hybrid_adaptor", KERNELS, backend, *arguments)
    if backend == TORCH:
        return hybrid_adaptor_reference(*arguments)
    return apply(HybridAdaptor, *arguments, backend)


def _check(high, low, high_weight, high_bias, low_weight, low_bias, out_weight, out_bias) -> None:
    weights = {"high_weight": high_weight, "low_weight": low_weight, "out_weight": out_weight}
    biases = {"high_bias": high_bias, "low_bias": low_bias, "out_bias": out_bias}
    checks.alike("hybrid_adaptor", high=high, low=low, **weights, **biases)
    checks.present("hybrid_adaptor", "low", low)
    for name, weight in weights.items():
        checks.rank("hybrid_adaptor", name, weight, "out in")
    checks.shape("hybrid_adaptor", "low", low, (*high.shape[:-1], *low.shape[-1:]), "high", high)
    for name, weight, x in (("high", high_weight, high), ("low", low_weight, low)):
        checks.shape("hybrid_adaptor", f"{name}_weight", weight, (weight.shape[0], x.shape[-1]), name, x)
    joined = high_weight.shape[0] + low_weight.shape[0]
    if out_weight.shape[1] != joined:
        given = f"out_weight is {tuple(out_weight.shape)}"
        raise ValueError(f"hybrid_adaptor: {given}; the two projections are {joined} wide together.")
    for (name, bias), (weight_name, weight) in zip(biases.items(), weights.items(), strict=True):
        checks.shape("hybrid_adaptor", name, bias, weight.shape[:1], weight_name, weight)


class HybridAdaptor(torch.autograd.Function):
    """`hybrid_adaptor` through its torch ops; hidden is what goes into the GELU, (..., T, Dh + Dl)."""

    @staticmethod
    def forward(ctx, *arguments):
        *inputs, backend = arguments
        inputs = [tensor.contiguous() for tensor in inputs]
        out, hidden = hybrid_adaptor_forward(*inputs, backend)
        high, low, high_weight, _, low_weight, _, out_weight, _ = inputs
        ctx.save_for_backward(high, low, high_weight, low_weight, out_weight, hidden)
        ctx.backend = backend
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        grads = hybrid_adaptor_backward(grad_out.contiguous(), *ctx.saved_tensors, ctx.backend)
        return *grads, None


def _cpp_refusals(high: Tensor, *rest: Tensor) -> list[str]:
    return native.cpp_refusals(high)


def _cpp_worthwhile(high: Tensor, *rest: Tensor) -> bool:
    out_weight = rest[-2]
    return products.ours_are_faster(high.dtype, num_rows(high), *out_weight.shape)


def _cpp_forward(high, low, high_weight, high_bias, low_weight, low_bias, out_weight, out_bias):
    hidden = high.new_empty(*high.shape[:-1], out_weight.shape[1])
    # Each projection is written into its half.
    split = high_weight.shape[0]
    for x, weight, bias, half in (
        (high, high_weight, high_bias, hidden[..., :split]),
        (low, low_weight, low_bias, hidden[..., split:]),
    ):
        sizes = (num_rows(x), *weight.shape, hidden.shape[-1])
        native.run_cpp("linear_blocked_forward", x.dtype, x, weight, bias, None, half, *sizes, False)
    return linear_forward(F.gelu(hidden), out_weight, out_bias, None, None, "cpp"), hidden


def _cpp_backward(grad_out, high, low, high_weight, low_weight, out_weight, hidden):
    grad_activated, *grad_out_layer = _cpp_layer_backward(grad_out, F.gelu(hidden), out_weight)
    grad_hidden = torch.ops.aten.gelu_backward(grad_activated, hidden)
    grad_high_half, grad_low_half = grad_hidden.split((high_weight.shape[0], low_weight.shape[0]), -1)
    grad_high, *grad_high_layer = _cpp_layer_backward(grad_high_half.contiguous(), high, high_weight)
    grad_low, *grad_low_layer = _cpp_layer_backward(grad_low_half.contiguous(), low, low_weight)
    return grad_high, grad_low, *grad_high_layer, *grad_low_layer, *grad_out_layer


def _cpp_layer_backward(grad_y: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of a linear layer's input, weight and bias."""
    grad_bias = grad_y.reshape(num_rows(grad_y), grad_y.shape[-1]).sum(0)
    return *linear_backward(grad_y, x, weight, True, True, "cpp"), grad_bias


# In order of preference.
KERNELS = {
    "triton": Kernel(
        native.triton("hybrid_adaptor", "forward"),
        native.triton("hybrid_adaptor", "backward"),
        launch.dot_refusals,
        launch.worthwhile,
    ),
    "cpp": Kernel(_cpp_forward, _cpp_backward, _cpp_refusals, _cpp_worthwhile),
}


def _torch_forward(high, low, high_weight, high_bias, low_weight, low_bias, out_weight, out_bias):
    hidden = _project_up(high, low, high_weight, high_bias, low_weight, low_bias)
    return F.linear(F.gelu(hidden), out_weight, out_bias), hidden


def _torch_backward(grad_out, high, low, high_weight, low_weight, out_weight, hidden):
    # No gradient depends on a bias but through hidden, which is at hand.
    zeros = [weight.new_zeros(weight.shape[0]) for weight in (high_weight, low_weight, out_weight)]
    grad_hidden, *grad_out_layer = gradients(
        lambda hidden, weight, bias: F.linear(F.gelu(hidden), weight, bias), (hidden, out_weight, zeros[2]), grad_out
    )
    inputs = (high, low, high_weight, zeros[0], low_weight, zeros[1])
    return *gradients(_project_up, inputs, grad_hidden), *grad_out_layer


def _fake_forward(high, low, high_weight, high_bias, low_weight, low_bias, out_weight, out_bias, backend):
    rows = high.shape[:-1]
    return high.new_empty(*rows, out_weight.shape[0]), high.new_empty(*rows, out_weight.shape[1])


def _fake_backward(grad_out, high, low, high_weight, low_weight, out_weight, hidden, backend):
    layers = ((torch.empty_like(w), w.new_empty(w.shape[0])) for w in (high_weight, low_weight, out_weight))
    return torch.empty_like(high), torch.empty_like(low), *(grad for layer in layers for grad in layer)


_LAYERS = "Tensor high_weight, Tensor high_bias, Tensor low_weight, Tensor low_bias, Tensor out_weight, Tensor out_bias"
hybrid_adaptor_forward = define(
    f"hybrid_adaptor_forward(Tensor high, Tensor low, {_LAYERS}, str backend) -> (Tensor out, Tensor hidden)",
    KERNELS,
    _torch_forward,
    fake=_fake_forward,
)
hybrid_adaptor_backward = define(
    "hybrid_adaptor_backward(Tensor grad_out, Tensor high, Tensor low, Tensor high_weight, Tensor low_weight,"
    " Tensor out_weight, Tensor hidden, str backend) -> (Tensor grad_high, Tensor grad_low, Tensor grad_high_weight,"
    " Tensor grad_high_bias, Tensor grad_low_weight, Tensor grad_low_bias, Tensor grad_out_weight,"
    " Tensor grad_out_bias)",
    KERNELS,
    _torch_backward,
    fake=_fake_backward,
)
