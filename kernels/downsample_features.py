"""SAM's features as tokens in Triton: the merged branches are interpolated, and pass two convolutions.

Maps are channels-last, as the tower gives them, and so are the weights: what lies so already is not copied. The table
says whether conv1 interpolates what it loads (INTERPOLATE), or reads a map that was interpolated before.
"""

from torch import Tensor

from . import launch
from .bilinear import resize, resize_backward
from .convolution import conv, input_gradient, weight_gradient
from .matrix_product import input_precision, operand_bits


def _settings(kernel: str, x: Tensor) -> dict[str, int]:
    sizes = {"bits": operand_bits(x.dtype, input_precision(x.dtype)), "batch": launch.next_power_of_2(x.shape[0])}
    return launch.settings("downsample_features", kernel, x.device, **sizes)


def _pixels(x: Tensor) -> Tensor:
    """(B, C, h, w) as contiguous (B, h, w, C), or weights alike."""
    return x.permute(0, 2, 3, 1).contiguous()


def forward(
    detail: Tensor,
    skip: Tensor | None,
    alpha: Tensor | None,
    conv1_weight: Tensor,
    conv2_weight: Tensor,
    size: int,
) -> tuple[Tensor, Tensor]:
    """detail, skip (B, C, h, w), alpha of one element, and the weights -> tokens (B, (size / 4)^2, C2) and hidden
    (B, C1, size / 2, size / 2), channels-last in memory."""
    detail, skip = _pixels(detail), None if skip is None else _pixels(skip)
    conv1, conv2 = _pixels(conv1_weight), _pixels(conv2_weight)
    settings = _settings("conv1", detail)
    if settings["INTERPOLATE"]:
        hidden = conv(detail, skip, alpha, conv1, size // 2, settings)
    else:
        resized = resize(detail, skip, alpha, size, _settings("resize", detail))
        hidden = conv(resized, None, None, conv1, size // 2, settings)
    tokens = conv(hidden, None, None, conv2, size // 4, _settings("conv2", hidden))
    return tokens.flatten(1, 2), hidden.permute(0, 3, 1, 2)


def backward(
    grad_tokens: Tensor,
    detail: Tensor,
    skip: Tensor | None,
    alpha: Tensor | None,
    conv1_weight: Tensor,
    conv2_weight: Tensor,
    hidden: Tensor,
    size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of detail, skip and alpha, the latter two empty without skip, and of both weights."""
    grad_y = grad_tokens.unflatten(1, (size // 4, size // 4))
    detail, skip, hidden = _pixels(detail), None if skip is None else _pixels(skip), _pixels(hidden)
    grad_hidden = input_gradient(grad_y, _pixels(conv2_weight), _settings("conv2_input_gradient", grad_y))
    grad_conv2 = weight_gradient(grad_y, hidden, _settings("conv2_weight_gradient", grad_y))
    grad_resized = input_gradient(grad_hidden, _pixels(conv1_weight), _settings("conv1_input_gradient", grad_y))
    resized = resize(detail, skip, alpha, size, _settings("resize", detail))
    grad_conv1 = weight_gradient(grad_hidden, resized, _settings("conv1_weight_gradient", grad_y))
    height, width = detail.shape[1:3]
    settings = _settings("resize_backward", detail)
    grad_detail, grad_skip, grad_alpha = resize_backward(grad_resized, skip, alpha, height, width, settings)
    if grad_skip is None or grad_alpha is None or alpha is None:
        skipped = detail.new_empty(0), detail.new_empty(0)
    else:
        skipped = grad_skip.permute(0, 3, 1, 2), grad_alpha.to(alpha.dtype).view(alpha.shape)
    grad_weights = _laid_out_as(conv1_weight, grad_conv1), _laid_out_as(conv2_weight, grad_conv2)
    return grad_detail.permute(0, 3, 1, 2), *skipped, *grad_weights


def _laid_out_as(weight: Tensor, grad: Tensor) -> Tensor:
    """grad (N, 3, 3, C) as (N, C, 3, 3), in memory as the weight is."""
    grad = grad.permute(0, 3, 1, 2)
    return grad.contiguous() if weight.is_contiguous() else grad
