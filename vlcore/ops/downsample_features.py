"""SAM's features as tokens: conv2(conv1(bilinear(detail + alpha * skip, size))), both convolutions 3x3, stride 2.

Interpolation and bias-free convolutions are linear, so the two branches of the public code, D(I(a)) + alpha D(I(b)),
are exactly one pass over their sum.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from vlcore import native
from vlcore.kernels import launch
from vlcore.ops import autocast, checks
from vlcore.ops.dispatch import AUTO, TORCH, Kernel, apply, choose, define, gradients, once_differentiable


def downsample_features_reference(
    detail: Tensor,
    skip: Tensor | None,
    alpha: Tensor | None,
    conv1_weight: Tensor,
    conv2_weight: Tensor,
    size: int = 96,
) -> Tensor:
    """The definition, which every kernel is tested against."""
    return _through_convs(detail, skip, alpha, conv1_weight, conv2_weight, size)[0]


def resized(detail: Tensor, skip: Tensor | None, alpha: Tensor | None, size: int) -> Tensor:
    """What the convolutions read, (B, C, size, size)."""
    merged = detail.to(torch.promote_types(detail.dtype, torch.float32))
    if skip is not None and alpha is not None:
        merged = torch.addcmul(merged, skip.to(merged.dtype), alpha.to(merged.dtype))
    return F.interpolate(merged, size=(size, size), mode="bilinear", align_corners=False).to(detail.dtype)


def _through_convs(detail, skip, alpha, conv1_weight, conv2_weight, size) -> tuple[Tensor, Tensor]:
    hidden = F.conv2d(resized(detail, skip, alpha, size), conv1_weight, stride=2, padding=1)
    return F.conv2d(hidden, conv2_weight, stride=2, padding=1).flatten(2).transpose(1, 2), hidden


def downsample_features(
    detail: Tensor,
    skip: Tensor | None,
    alpha: Tensor | None,
    conv1_weight: Tensor,
    conv2_weight: Tensor,
    size: int = 96,
    *,
    backend: str = AUTO,
) -> Tensor:
    """Bring the high-resolution tower's features to the grid of the low-resolution one (arXiv 2403.05525, 3.1).

    Args:
        detail: (B, C, h, w) of the last block, float32, float16 or bfloat16; float64 on "torch".
        skip: (B, C, h, w) of the first global block, of detail's dtype; None leaves this branch out.
        alpha: one element, floating, scales `skip`; not read without it.
        conv1_weight: (C1, C, 3, 3), conv2_weight: (C2, C1, 3, 3), of detail's dtype; stride 2, padding 1, no bias.
        size: side of the square that the features are interpolated to, a multiple of 4: four times the grid.
        backend: "auto", "torch", "triton" or "cpp".

    Returns:
        (B, (size / 4)^2, C2), of detail's dtype, tokens row-major. The sum and the interpolation (bilinear,
        align_corners=False) are computed in float32 and rounded once. Under torch.autocast all but alpha are cast to
        its dtype.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or a backend that cannot run them.
    """
    if autocast.is_on(detail):

        def with_alpha(detail, skip, conv1_weight, conv2_weight):
            return downsample_features(detail, skip, alpha, conv1_weight, conv2_weight, size, backend=backend)

        return autocast.run(with_alpha, autocast.low(detail), detail, skip, conv1_weight, conv2_weight)
    _check(detail, skip, alpha, conv1_weight, conv2_weight, size)
    arguments = (detail, skip, None if skip is None else alpha, conv1_weight, conv2_weight, size)
    backend = choose("downsample_features", KERNELS, backend, *arguments)
    if backend == TORCH:
        return downsample_features_reference(*arguments)
    return apply(DownsampleFeatures, *arguments, backend)


def _check(detail, skip, alpha, conv1_weight, conv2_weight, size) -> None:
    checks.rank("downsample_features", "detail", detail, "B C h w")
    weights = {"conv1_weight": conv1_weight, "conv2_weight": conv2_weight}
    checks.alike("downsample_features", detail=detail, skip=skip, **weights)
    if skip is not None:
        checks.shape("downsample_features", "skip", skip, detail.shape, "detail", detail)
        if not isinstance(alpha, Tensor) or alpha.numel() != 1:
            given = tuple(alpha.shape) if isinstance(alpha, Tensor) else checks.kind(alpha)
            raise ValueError(f"downsample_features: alpha is {given}; skip needs one number to scale it.")
        checks.on_device("downsample_features", "alpha", alpha, "skip", skip)
    for name, weight in weights.items():
        checks.rank("downsample_features", name, weight, "out in 3 3")
    conv1_shape = (conv1_weight.shape[0], detail.shape[1], 3, 3)
    checks.shape("downsample_features", "conv1_weight", conv1_weight, conv1_shape, "detail", detail)
    conv2_shape = (conv2_weight.shape[0], conv1_weight.shape[0], 3, 3)
    checks.shape("downsample_features", "conv2_weight", conv2_weight, conv2_shape, "conv1_weight", conv1_weight)
    checks.whole("downsample_features", "size", size)
    if size < 4 or size % 4:
        raise ValueError(f"downsample_features: size {size} is not a multiple of 4, by which the convolutions divide.")


class DownsampleFeatures(torch.autograd.Function):
    """`downsample_features` through its torch ops; hidden is what conv1 gives, (B, C1, size / 2, size / 2)."""

    @staticmethod
    def forward(ctx, detail, skip, alpha, conv1_weight, conv2_weight, size, backend):
        maps = [
            None if tensor is None else tensor.contiguous(memory_format=_layout(backend)) for tensor in (detail, skip)
        ]
        alpha = None if skip is None else alpha.contiguous()
        # Triton's convolutions read weights channels-last too. Brought there once, they are kept so for the backward.
        layout = _layout(backend) if backend == "triton" else torch.contiguous_format
        weights = [weight.contiguous(memory_format=layout) for weight in (conv1_weight, conv2_weight)]
        inputs = [*maps, alpha, *weights]
        tokens, hidden = downsample_features_forward(*inputs, size, backend)
        ctx.save_for_backward(*inputs, hidden)
        ctx.numbers = (size, backend)
        return tokens

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_tokens):
        saved = ctx.saved_tensors  # read once: activation checkpointing gives them once
        grad_detail, grad_skip, grad_alpha, *grad_weights = downsample_features_backward(
            grad_tokens.contiguous(), *saved, *ctx.numbers
        )
        if saved[1] is None:
            grad_skip = grad_alpha = None
        return grad_detail, grad_skip, grad_alpha, *grad_weights, None, None


def _layout(backend: str) -> torch.memory_format:
    """How a backend has maps in memory. Those of the tower lie channels-last, which is how a kernel takes them."""
    return torch.contiguous_format if backend == TORCH else torch.channels_last


def _cpp_refusals(detail, skip, alpha, conv1_weight, conv2_weight, size) -> list[str]:
    return native.cpp_refusals(detail) + _pixel_refusals(detail)


def _triton_refusals(detail, skip, alpha, conv1_weight, conv2_weight, size) -> list[str]:
    return launch.dot_refusals(detail, conv1_weight, conv2_weight) + _pixel_refusals(detail)


def _pixel_refusals(detail: Tensor) -> list[str]:
    return ["there are no pixels to interpolate"] * (detail.shape[2] == 0 or detail.shape[3] == 0)


def _cpp_worthwhile(detail, skip, alpha, conv1_weight, conv2_weight, size) -> bool:
    # Of maps that do not lie channels-last, bringing them there costs what the one pass saves.
    return detail.stride(1) == 1


def merge_and_resize(detail, skip, alpha, size) -> Tensor:
    """The merged branches, (B, C, size, size) and channels-last in memory."""
    pixels = _pixels(detail)
    batch, height, width, channels = pixels.shape
    resized = pixels.new_empty(batch, size, size, channels)
    alpha = None if skip is None else alpha.float()
    skip = None if skip is None else _pixels(skip)
    sizes = (batch, height, width, channels, size)
    native.run_cpp("merge_and_resize_forward", pixels.dtype, pixels, skip, alpha, resized, *sizes)
    return resized.permute(0, 3, 1, 2)


def _pixels(x: Tensor) -> Tensor:
    """(B, C, h, w) as contiguous (B, h, w, C): free for what lies channels-last."""
    return x.permute(0, 2, 3, 1).contiguous()


def _conv_layout(backend: str, dtype: torch.dtype) -> torch.memory_format:
    """How convolutions have their maps: of float32 ones that lie channels-last, oneDNN errs up to five times as far,
    and takes up to twice as long for the gradient of a weight."""
    return torch.contiguous_format if backend == "cpp" and dtype == torch.float32 else _layout(backend)


def _cpp_forward(detail, skip, alpha, conv1_weight, conv2_weight, size):
    layout = _conv_layout("cpp", detail.dtype)
    resized = merge_and_resize(detail, skip, alpha, size).contiguous(memory_format=layout)
    hidden = _conv(resized, conv1_weight, layout)
    return _conv(hidden, conv2_weight, layout).flatten(2).transpose(1, 2).contiguous(), hidden


def _conv(x: Tensor, weight: Tensor, layout: torch.memory_format) -> Tensor:
    y = F.conv2d(x, weight.contiguous(memory_format=layout), stride=2, padding=1)
    return y.contiguous(memory_format=layout)


def _cpp_backward(grad_tokens, detail, skip, alpha, conv1_weight, conv2_weight, hidden, size):
    layout = _conv_layout("cpp", detail.dtype)
    grad_maps = grad_tokens.transpose(1, 2).unflatten(2, (size // 4, size // 4))
    grad_hidden, grad_conv2 = _conv_backward(grad_maps, hidden, conv2_weight, layout)
    resized = merge_and_resize(detail, skip, alpha, size)
    grad_resized, grad_conv1 = _conv_backward(grad_hidden, resized, conv1_weight, layout)
    return *merge_and_resize_backward(_pixels(grad_resized), detail, skip, alpha), grad_conv1, grad_conv2


def _conv_backward(grad_y: Tensor, x: Tensor, weight: Tensor, layout: torch.memory_format) -> tuple[Tensor, Tensor]:
    """The gradients of _conv: that of x, and that of the weight, contiguous."""
    grad_y, x, weight = (tensor.contiguous(memory_format=layout) for tensor in (grad_y, x, weight))
    strides, padding, dilation, output_padding, groups = (2, 2), (1, 1), (1, 1), (0, 0), 1
    geometry = (strides, padding, dilation, False, output_padding, groups)
    grads = torch.ops.aten.convolution_backward(grad_y, x, weight, None, *geometry, (True, True, False))
    return grads[0], grads[1].contiguous()


def merge_and_resize_backward(grad_resized, detail, skip, alpha) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of detail, skip and alpha from that of the resized map, (B, size, size, C)."""
    batch, channels, height, width = detail.shape
    sizes = (batch, height, width, channels, grad_resized.shape[1])
    grad_detail = torch.empty_like(detail, memory_format=torch.channels_last)
    skipped = (detail.new_empty(0), detail.new_empty(0))
    grads = skipped if skip is None else (torch.empty_like(grad_detail), torch.empty_like(alpha, dtype=torch.float32))
    branch = (None, None) if skip is None else (_pixels(skip), alpha.float())
    given = (grad_resized, *branch, grad_detail, *grads)
    native.run_cpp("merge_and_resize_backward", detail.dtype, *given, *sizes)
    return grad_detail, grads[0], grads[1] if skip is None else grads[1].to(alpha.dtype)


# In order of preference.
KERNELS = {
    "triton": Kernel(
        native.triton("downsample_features", "forward"),
        native.triton("downsample_features", "backward"),
        _triton_refusals,
        launch.worthwhile,
    ),
    "cpp": Kernel(_cpp_forward, _cpp_backward, _cpp_refusals, _cpp_worthwhile),
}


def _torch_forward(detail, skip, alpha, conv1_weight, conv2_weight, size):
    tokens, hidden = _through_convs(detail, skip, alpha, conv1_weight, conv2_weight, size)
    return tokens.contiguous(), hidden.contiguous()


def _torch_backward(grad_tokens, detail, skip, alpha, conv1_weight, conv2_weight, hidden, size):
    if skip is None:
        grad_detail, *grad_weights = gradients(
            lambda detail, *weights: downsample_features_reference(detail, None, None, *weights, size),
            (detail, conv1_weight, conv2_weight),
            grad_tokens,
        )
        return grad_detail, detail.new_empty(0), detail.new_empty(0), *grad_weights
    inputs = (detail, skip, alpha, conv1_weight, conv2_weight)
    return gradients(lambda *inputs: downsample_features_reference(*inputs, size), inputs, grad_tokens)


def _fake_forward(detail, skip, alpha, conv1_weight, conv2_weight, size, backend):
    batch, channels = detail.shape[0], conv2_weight.shape[0]
    hidden = torch.empty(
        (batch, conv1_weight.shape[0], size // 2, size // 2),
        dtype=detail.dtype,
        device=detail.device,
        memory_format=_conv_layout(backend, detail.dtype),
    )
    return detail.new_empty(batch, (size // 4) ** 2, channels), hidden


def _fake_backward(grad_tokens, detail, skip, alpha, conv1_weight, conv2_weight, hidden, size, backend):
    grad_detail = torch.empty_like(detail, memory_format=_layout(backend))
    skipped = (detail.new_empty(0), detail.new_empty(0))
    grad_skip, grad_alpha = skipped if skip is None else (torch.empty_like(grad_detail), torch.empty_like(alpha))
    grad_weights = torch.empty_like(conv1_weight), torch.empty_like(conv2_weight)
    return grad_detail, grad_skip, grad_alpha, *grad_weights


downsample_features_forward = define(
    "downsample_features_forward(Tensor detail, Tensor? skip, Tensor? alpha, Tensor conv1_weight,"
    " Tensor conv2_weight, SymInt size, str backend) -> (Tensor tokens, Tensor hidden)",
    KERNELS,
    _torch_forward,
    fake=_fake_forward,
)
# The gradients of skip and alpha are empty where they are None.
downsample_features_backward = define(
    "downsample_features_backward(Tensor grad_tokens, Tensor detail, Tensor? skip, Tensor? alpha,"
    " Tensor conv1_weight, Tensor conv2_weight, Tensor hidden, SymInt size, str backend)"
    " -> (Tensor grad_detail, Tensor grad_skip, Tensor grad_alpha, Tensor grad_conv1_weight,"
    " Tensor grad_conv2_weight)",
    KERNELS,
    _torch_backward,
    fake=_fake_backward,
)
