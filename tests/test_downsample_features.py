import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE
from operators import (
    DTYPES,
    amid_nan,
    assert_compiles,
    assert_gradcheck,
    assert_matches,
    assert_strides_do_not_matter,
    assert_well_formed,
    here,
    random,
    skip_if_refused,
)

from vlcore import native, ops
from vlcore.kernels import launch
from vlcore.ops.downsample_features import (
    KERNELS,
    DownsampleFeatures,
    downsample_features_reference,
    merge_and_resize,
    merge_and_resize_backward,
)

BACKENDS = [*KERNELS, "torch"]


def inputs(batch=2, channels=(4, 6, 5), grid=(6, 6), skip=True, dtype=torch.float32):
    first, second, third = channels
    detail = random(batch, first, *grid, dtype=dtype)
    branch = (random(batch, first, *grid, dtype=dtype), random(1, dtype=dtype)) if skip else (None, None)
    return detail, *branch, random(second, first, 3, 3, dtype=dtype), random(third, second, 3, 3, dtype=dtype)


def through_op(backend, size=8):
    return lambda *given: DownsampleFeatures.apply(*given, size, backend)


def reference(size=8):
    return lambda *given: downsample_features_reference(*given, size)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize(
    ("sizes", "size"),
    [({}, 8), ({}, 4), ({"grid": (1, 1), "channels": (1, 1, 1), "batch": 1}, 4), ({"grid": (9, 5)}, 12)],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_matches_the_reference(backend, sizes, size, skip, dtype):
    given = inputs(**sizes, skip=skip, dtype=dtype)
    skip_if_refused(KERNELS, backend, *given, size)
    assert_matches(through_op(backend, size), reference(size), *given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("level", range(native.level + 1))
def test_every_level_of_instructions(monkeypatch, level, dtype):
    monkeypatch.setattr(native, "level", level)
    # Channels of no, one and several vectors; maps that grow, shrink to where pixels are left out, and stay.
    for channels, grid, size, skip in ((3, (5, 7), 12, True), (37, (19, 3), 8, True), (256, (8, 8), 8, False)):
        given = inputs(batch=1, channels=(channels, 5, 3), grid=grid, skip=skip, dtype=dtype)
        skip_if_refused(KERNELS, "cpp", *given, size)
        assert_matches(through_op("cpp", size), reference(size), *given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", KERNELS)
def test_the_map_of_the_model(backend, dtype):
    """Sums of alpha's gradient over a million products."""
    given = inputs(batch=1, channels=(256, 4, 4), grid=(64, 64), dtype=dtype)
    skip_if_refused_or_slow(backend, *given, 96)
    assert_matches(through_op(backend, 96), reference(96), *given)


def skip_if_refused_or_slow(backend, *given):
    skip_if_refused(KERNELS, backend, *given)
    if backend == "triton" and launch.INTERPRETED:
        pytest.skip("there is no GPU, and Triton's interpreter takes minutes")


@pytest.mark.parametrize(("choices", "skip"), [({}, True), ({"INTERPOLATE": 1, "SPLITS": 3}, True), ({}, False)])
def test_tiles_of_triton(monkeypatch, choices, skip):
    """Several of rows, columns and steps, none of which is full; nothing beyond the tensors is read; and what a launch
    table may choose."""
    written = launch.settings
    monkeypatch.setattr(
        launch, "settings", lambda *given, **sizes: {k: choices.get(k, v) for k, v in written(*given, **sizes).items()}
    )
    given = inputs(batch=1, channels=(35, 66, 5), grid=(7, 5), skip=skip)
    skip_if_refused(KERNELS, "triton", *given, 20)
    # Without the gradient of alpha: it is a single number, and how near torch comes to that is a matter of chance.
    detail, branch, alpha, *weights = (pixels_amid_nan(x) for x in given)

    def with_alpha(function):
        return lambda detail, branch, *weights: function(detail, branch, alpha, *weights)

    assert_matches(with_alpha(through_op("triton", 20)), with_alpha(reference(20)), detail, branch, *weights)


def pixels_amid_nan(x):
    return x if x is None or x.ndim < 4 else amid_nan(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


@pytest.mark.parametrize(("grid", "size"), [((16, 16), 24), ((1, 37), 8), ((19, 3), 8)])
def test_interpolation_in_triton(grid, size):
    """Maps that grow as the model's do, and that shrink to where pixels are left out."""
    given = inputs(batch=1, channels=(3, 1, 1), grid=grid)
    skip_if_refused(KERNELS, "triton", *given, size)
    assert_matches(through_op("triton", size), reference(size), *given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", KERNELS)
def test_long_sums_keep_their_accuracy(backend, dtype):
    """Of the convolutions, over 9 * 256 products."""
    given = inputs(channels=(256, 256, 7), grid=(7, 5), dtype=dtype)
    skip_if_refused_or_slow(backend, *given, 20)
    assert_matches(through_op(backend, 20), reference(20), *given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_neither_threads_nor_addresses_matter(dtype):
    """To what is not torch's convolutions, whose sums depend on its threads."""
    detail, skip, alpha, *_ = given = inputs(channels=(133, 1, 1), grid=(9, 7), dtype=dtype)
    skip_if_refused(KERNELS, "cpp", *given, 16)
    grad = random(2, 16, 16, 133, dtype=dtype)
    threads = torch.get_num_threads()
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(_around_the_convolutions(detail, skip, alpha, grad))
    torch.set_num_threads(threads)
    moved = [torch.empty(t.numel() + 1, dtype=dtype)[1:].view(t.shape).copy_(t) for t in (detail, skip, alpha, grad)]
    results.append(_around_the_convolutions(*moved))
    channels_last = [tensor.contiguous(memory_format=torch.channels_last) for tensor in (detail, skip)]
    results.append(_around_the_convolutions(*channels_last, alpha, grad))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def _around_the_convolutions(detail, skip, alpha, grad):
    return merge_and_resize(detail, skip, alpha, 16), *merge_and_resize_backward(grad, detail, skip, alpha)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_batch_may_be_empty(backend):
    given = inputs(batch=0)
    skip_if_refused(KERNELS, backend, *given, 8)
    assert_matches(through_op(backend), reference(), *given)


def test_equals_two_branches_that_are_added_at_the_end():
    detail, skip, alpha, conv1, conv2 = (tensor.double() for tensor in inputs(grid=(64, 64)))

    def tokens(features):
        resized = F.interpolate(features, size=(96, 96), mode="bilinear", align_corners=False)
        maps = F.conv2d(F.conv2d(resized, conv1, stride=2, padding=1), conv2, stride=2, padding=1)
        return torch.stack([maps[:, :, y, x] for y in range(24) for x in range(24)], 1)

    merged = ops.downsample_features(detail, skip, alpha, conv1, conv2)
    assert merged.shape == (2, 576, 5)
    torch.testing.assert_close(merged, tokens(detail) + alpha * tokens(skip))
    torch.testing.assert_close(ops.downsample_features(detail, None, None, conv1, conv2), tokens(detail))


@pytest.mark.parametrize("shape", [(), (1,)])
def test_alpha_may_be_wider_than_the_features(shape):
    detail, skip, _, *weights = inputs(dtype=torch.bfloat16)
    alpha = torch.full(shape, 0.37, device=DEVICE, requires_grad=True)
    out = ops.downsample_features(detail, skip, alpha, *weights, size=8)
    (grad,) = torch.autograd.grad(out.sum(), alpha)
    assert out.dtype == torch.bfloat16 and grad.dtype == torch.float32 and grad.shape == shape


@pytest.mark.parametrize("backend", BACKENDS)
def test_takes_what_is_not_contiguous(backend):
    given = inputs()
    skip_if_refused(KERNELS, backend, *given, 8)
    assert_strides_do_not_matter(through_op(backend), *given)
    assert_strides_do_not_matter(lambda *given: ops.downsample_features(*given, 8), *given)
    # As a tower that works channels-last gives them.
    channels_last = given[0].contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(through_op(backend)(channels_last, *given[1:]), through_op(backend)(*given))


@pytest.mark.parametrize("skip", [True, False])
def test_reference_gradient(skip):
    assert_gradcheck(reference(4), *inputs(batch=1, channels=(2, 2, 1), grid=(3, 2), skip=skip))


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_is_a_well_formed_torch_operator(backend, skip):
    given = inputs(skip=skip)
    skip_if_refused(KERNELS, backend, *given, 8)
    tokens, hidden = assert_well_formed("downsample_features_forward", *given, 8, backend)
    assert_well_formed("downsample_features_backward", torch.ones_like(tokens), *given, hidden, 8, backend)


def test_compiles_without_graph_breaks():
    given = inputs()
    other = (*(random(3, 4, 6, 6) for _ in range(2)), *given[2:])
    assert_compiles(lambda *given: ops.downsample_features(*given, 8), given, other)
    assert_compiles(through_op("torch"), given, other)


@pytest.mark.parametrize(
    ("changed", "value", "message"),
    [
        (0, torch.zeros(4, 6, 6), r"detail is \(4, 6, 6\); it needs to be \(B, C, h, w\)"),
        (1, torch.zeros(2, 4, 3, 3), r"skip is \(2, 4, 3, 3\); detail \(2, 4, 6, 6\) needs"),
        (1, torch.zeros(2, 4, 6, 6).half(), "skip is torch.float16 and detail torch.float32"),
        (2, None, "alpha is None; skip needs one number to scale it"),
        (2, torch.zeros(2), r"alpha is \(2,\); skip needs one number"),
        (2, torch.zeros(1).to("meta"), f"alpha is on meta and skip on {DEVICE}"),
        (3, torch.zeros(6, 4), r"conv1_weight is \(6, 4\); it needs to be \(out, in, 3, 3\)"),
        (3, torch.zeros(6, 5, 3, 3), r"conv1_weight is \(6, 5, 3, 3\); detail .* needs \(6, 4, 3, 3\)"),
        (4, torch.zeros(5, 4, 3, 3), r"conv2_weight is \(5, 4, 3, 3\); conv1_weight .* needs \(5, 6, 3, 3\)"),
    ],
)
def test_refuses_what_does_not_fit(changed, value, message):
    given = list(inputs())
    given[changed] = here(value)
    with pytest.raises(ValueError, match=f"downsample_features: {message}"):
        ops.downsample_features(*given, 8)


def test_says_why_a_backend_cannot_run():
    with pytest.raises(
        ValueError, match="downsample_features cannot run on 'cpp' .*there are no pixels to interpolate"
    ):
        ops.downsample_features(*inputs(grid=(0, 5)), 8, backend="cpp")


@pytest.mark.parametrize("size", [0, 6, -4])
def test_refuses_a_size_that_the_convolutions_do_not_divide(size):
    with pytest.raises(ValueError, match=f"size {size} is not a multiple of 4"):
        ops.downsample_features(*inputs(), size)
