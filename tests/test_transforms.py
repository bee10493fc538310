"""Operators within torch.func's transforms, differentiated in batches and again, and on tensors without values."""

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from checkpoints import siglip_only
from conftest import DEVICE
from operators import random
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel

from vlcore import native, ops
from vlcore.config import preset
from vlcore.models import DeepSeekVL

POSITIONS, LABELS = torch.arange(300, device=DEVICE)[None], torch.arange(300, device=DEVICE)
QUANTIZED = ops.quantize_weight(random(24, 64), 8)
# As wide layers are initialised: sums of theirs are as large as what goes in, and differ as little in float32.
W, B, OUT = random(64, 64, scale=1 / 8), random(64), random(32, 128, scale=1 / 8)
ROWS = [random(7, 8), random(7, 8)]
CONVOLUTIONS = [random(4, 8, 3, 3), random(4, 4, 3, 3)]


def heads(x):
    return x.unflatten(-1, (4, 16))[None]


# Of x (rows, 64), at sizes of which torch and our kernels are taken.
FUNCTIONS = {
    "rms_norm": lambda x: ops.rms_norm(x, B),
    "add_rms_norm": lambda x: torch.stack(ops.add_rms_norm(x, x, B)),
    "layer_norm": lambda x: ops.layer_norm(x, B, B),
    "swiglu": lambda x: ops.swiglu(x, x.flip(0)),
    "linear": lambda x: ops.linear(x, W, B, activation="gelu"),
    "quantized_linear": lambda x: ops.quantized_linear(x, QUANTIZED),
    "apply_rope": lambda x: ops.apply_rope(heads(x), POSITIONS[:, : x.shape[0]]),
    "attention": lambda x: ops.attention(*[heads(x)] * 3, causal=True),
    "rope_attention": lambda x: ops.rope_attention(*[heads(x)] * 3, POSITIONS[:, : x.shape[0]]),
    "rel_pos_attention": lambda x: ops.rel_pos_attention(*[x[:8].view(1, 4, 16, 8)] * 3, *ROWS, (4, 4)),
    "window_attention": lambda x: ops.window_attention(x[:6].view(1, 4, 4, 3, 1, 8), None, *ROWS, 4),
    "downsample_features": lambda x: ops.downsample_features(x[:8].view(1, 8, 8, 8), None, None, *CONVOLUTIONS, 16),
    "hybrid_adaptor": lambda x: ops.hybrid_adaptor(x, x, W, B, W, B, OUT, B[:32]),
    "linear_cross_entropy": lambda x: ops.linear_cross_entropy(x, W.repeat(60, 1), LABELS[: x.shape[0]]),
}
SIZES = [9, 300]


def summed(name):
    return lambda x: FUNCTIONS[name](x).square().sum()


def gradient(name, x):
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(summed(name)(leaf), leaf)[0]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_transforms_work_at_any_size(name, size):
    x, y = random(2, size, 64)
    torch.testing.assert_close(torch.func.grad(summed(name))(x), gradient(name, x), rtol=1e-3, atol=1e-3)
    each = torch.vmap(FUNCTIONS[name])(torch.stack((x, y)))
    torch.testing.assert_close(each, torch.stack([FUNCTIONS[name](z) for z in (x, y)]), rtol=1e-4, atol=1e-4)
    grads = torch.vmap(torch.func.grad(summed(name)))(torch.stack((x, y)))
    torch.testing.assert_close(grads, torch.stack([gradient(name, z) for z in (x, y)]), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_dtype_that_torch_takes_by_default_does_not_matter(name, default):
    x = random(300, 64)
    wanted, before = (FUNCTIONS[name](x), gradient(name, x)), torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        found = FUNCTIONS[name](x), gradient(name, x)
    finally:
        torch.set_default_dtype(before)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_forward_mode_keeps_its_tangent(name):
    x, tangent = random(2, 300, 64)
    _, wanted = torch.func.jvp(FUNCTIONS[name], (x,), (tangent,))
    with forward_ad.dual_level():
        got = forward_ad.unpack_dual(FUNCTIONS[name](forward_ad.make_dual(x, tangent))).tangent
    torch.testing.assert_close(got, wanted)
    assert got.any()


@pytest.mark.parametrize("name", ["rms_norm", "swiglu"])
def test_a_kernel_asked_for_by_name_is_refused_within_a_transform(name):
    x, weight = random(3, 8), random(8)

    def call(x, backend="cpp"):
        return ops.rms_norm(x, weight, backend=backend) if name == "rms_norm" else ops.swiglu(x, x, backend=backend)

    within = "cannot run on 'cpp' within a transform of torch.func or a forward-mode derivative: backend=\"torch\" can"
    with pytest.raises(ValueError, match=within):
        torch.func.grad(lambda x: call(x).sum())(x)
    with pytest.raises(ValueError, match=within):
        torch.vmap(call)(x)
    torch.testing.assert_close(torch.vmap(lambda x: call(x, "torch"))(x), call(x, "torch"))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_batch_of_incoming_gradients_is_one_after_another(name, size):
    x = random(size, 64).requires_grad_()
    y = FUNCTIONS[name](x)
    grads = torch.randn(3, *y.shape, device=y.device)
    wanted = torch.stack([torch.autograd.grad(y, x, grad, retain_graph=True)[0] for grad in grads])
    (got,) = torch.autograd.grad(y, x, grads, is_grads_batched=True)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_a_jacobian_may_be_vectorised():
    x, weight = random(4, 8), random(8)
    one, all_at_once = (
        torch.autograd.functional.jacobian(lambda x: ops.rms_norm(x, weight), x, vectorize=vectorize)
        for vectorize in (False, True)
    )
    torch.testing.assert_close(all_at_once, one)


def test_what_can_be_differentiated_again_is_named():
    x, weight = random(4, 8).requires_grad_(), random(8)
    losses = {
        'backend="torch"': lambda: ops.rms_norm(x, weight).sum(),
        "F.cross_entropy of F.linear": lambda: ops.linear_cross_entropy(x, random(9, 8), LABELS[:4]),
        "F.linear of weight.dequantize": lambda: ops.quantized_linear(x, ops.quantize_weight(random(9, 8), 8)).sum(),
    }
    if native.cpp is None and DEVICE == "cpu":
        del losses['backend="torch"']
    for instead, loss in losses.items():
        with pytest.raises(RuntimeError, match=f"create_graph=True asks for more: {instead}"):
            torch.autograd.grad(loss(), x, create_graph=True)
    (grad,) = torch.autograd.grad(ops.rms_norm(x, weight, backend="torch").square().sum(), x, create_graph=True)
    assert torch.autograd.grad(grad.sum(), x)[0].any()


@pytest.mark.parametrize("operator", [ops.attention, ops.rope_attention])
@pytest.mark.parametrize("bounds", [None, [0, 3, 3, 4, 9]])
def test_attention_can_be_differentiated_again(operator, bounds):
    q, (k, v) = random(1, 9, 4, 8).double().requires_grad_(), random(2, 1, 9, 2, 8).double()
    cu_seqlens = None if bounds is None else torch.tensor(bounds, dtype=torch.int32, device=DEVICE)
    places = () if operator is ops.attention else (POSITIONS[:, :9],)

    def attend(q):
        return operator(q, k, v, *places, causal=True, cu_seqlens=cu_seqlens, backend="torch")

    with sdpa_kernel(SDPBackend.MATH):
        assert torch.autograd.gradgradcheck(attend, q)
        (grad,) = torch.autograd.grad(attend(q).square().sum(), q, create_graph=True)
        (wanted,) = torch.autograd.grad(grad.square().sum(), q)
    q = q.detach()
    found = torch.func.grad(lambda q: torch.func.grad(lambda q: attend(q).square().sum())(q).square().sum())(q)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(torch.vmap(attend)(q[None])[0], attend(q))


def valueless(device):
    """Calls that look at values where there are some, and the shape of what they give."""
    q, ids = torch.randn(1, 8, 2, 16, device=device), torch.zeros(1, 8, dtype=torch.long, device=device)
    bounds, lengths = (
        torch.zeros(2, dtype=torch.int32, device=device),
        torch.zeros(1, dtype=torch.int32, device=device),
    )
    caches, token = torch.zeros(2, 1, 8, 2, 16, device=device), torch.randn(1, 1, 2, 16, device=device)
    hidden, head = torch.randn(8, 16, device=device), torch.randn(10, 16, device=device)
    return [
        (lambda: ops.linear_cross_entropy(hidden, head, ids[0], reduction="none"), (8,)),
        (lambda: ops.decode_attention(token, token, token, *caches, lengths), (1, 1, 2, 16)),
        *[
            (lambda backend=backend: ops.attention(q, q, q, cu_seqlens=bounds, backend=backend), q.shape)
            for backend in ("auto", "torch")
        ],
        (lambda: ops.rope_attention(q, q, q, ids, cu_seqlens=bounds, backend="torch"), q.shape),
    ]


@pytest.mark.parametrize("call", range(5))
def test_values_are_not_read_of_tensors_without_any(call):
    function, shape = valueless("meta")[call]
    assert function().shape == shape
    with FakeTensorMode():
        function, shape = valueless(DEVICE)[call]
        assert function().shape == shape


@pytest.mark.parametrize("mode", ["fake", "symbolic"])
def test_a_loss_is_traced(mode):
    given = random(4, 64), random(10, 64), LABELS[:4]
    graph = make_fx(lambda *given: ops.linear_cross_entropy(*given), tracing_mode=mode)(*given)
    torch.testing.assert_close(graph(*given), ops.linear_cross_entropy(*given))


def test_the_model_runs_without_values():
    with FakeTensorMode():
        model = DeepSeekVL(siglip_only(preset("tiny")))
        ids = torch.zeros(1, 40, dtype=torch.long)
        output = model(ids, torch.rand(1, 3, model.config.image_size, model.config.image_size), ids)
        assert output.loss.shape == () and output.hidden.shape[:2] == (1, 40)
        output.loss.backward()
