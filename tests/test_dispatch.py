import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from vlcore import native, ops
from vlcore.ops import dispatch
from vlcore.ops.dispatch import Kernel, choose, define, gradients
from vlcore.ops.rms_norm import RMSNorm
from vlcore.ops.swiglu import SwiGLU


def kernel(name, refusal=None, worthwhile=True):
    return Kernel(name, name, lambda *arguments: [refusal] if refusal else [], lambda *arguments: worthwhile)


KERNELS = {
    "interpreted": kernel("a", worthwhile=False),
    "distant": kernel("b", refusal="it runs on Mars"),
    "near": kernel("c"),
    "last": kernel("d"),
}


def test_auto_takes_the_first_that_can_and_is_worth_it():
    assert choose("op", KERNELS, "auto", torch.zeros(1)) == "near"
    assert choose("op", {"distant": KERNELS["distant"]}, "auto", torch.zeros(1)) == "torch"
    assert choose("op", {}, "auto", torch.zeros(1)) == "torch"


def test_a_backend_that_is_asked_for_runs_or_raises():
    assert choose("op", KERNELS, "interpreted", torch.zeros(1)) == "interpreted"
    assert choose("op", KERNELS, "torch", torch.zeros(1)) == "torch"
    given = r"\(2, 3\) torch.float16 on cpu, 14: it runs on Mars\."
    with pytest.raises(ValueError, match=rf"op cannot run on 'distant' with {given}"):
        choose("op", KERNELS, "distant", torch.zeros(2, 3).half(), None, 14)
    with pytest.raises(ValueError, match=r"op has no backend 'cpq'; it has \['interpreted', .*'torch'\]"):
        choose("op", KERNELS, "cpq", torch.zeros(1))


def test_what_looks_alike_is_decided_once():
    if native.signature() is None:
        pytest.skip("this build cannot tell what tensors look like")
    asked = []

    @dispatch.remembered
    def decide(x, bias, backend):
        asked.append(x.shape)
        if x.ndim != 2:
            raise ValueError(f"x is {tuple(x.shape)}")
        return backend

    kinds = [
        (torch.zeros(3, 16), None, "near"),
        (torch.zeros(3, 16), None, "last"),
        (torch.zeros(3, 16), torch.zeros(3), "near"),
        (torch.zeros(16, 3).T, None, "near"),
        (torch.zeros(3, 16).half(), None, "near"),
    ]
    for _ in range(3):
        assert [decide(*kind) for kind in kinds] == [kind[2] for kind in kinds]
    assert len(asked) == len(kinds)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"x is \(3,\)"):
            decide(torch.zeros(3), None, "near")
    assert len(asked) == len(kinds) + 2
    native.Kinds.forget()
    decide(*kinds[0])
    assert len(asked) == len(kinds) + 3


@pytest.mark.filterwarnings("ignore")  # torch.jit is deprecated, and says so
def test_what_torch_jit_traces_is_the_same_each_time():
    """It runs twice, and what is decided must not be missing from the second graph."""
    x, weight = torch.randn(3, 64), torch.randn(64, 64)
    quantized, rows, positions = ops.quantize_weight(weight, 8), torch.randn(64), torch.arange(3)[None]
    functions = [
        lambda x: ops.rms_norm(x, rows),
        lambda x: ops.linear(x, weight),
        lambda x: ops.quantized_linear(x, quantized),
        lambda x: ops.rope_attention(*[x.view(1, 3, 4, 16)] * 3, positions),
    ]
    for function in functions:
        assert torch.equal(torch.jit.trace(function, (x,))(x), function(x))


def test_no_more_decisions_are_kept_than_is_allowed(monkeypatch):
    monkeypatch.setattr(dispatch, "MAX_KNOWN", 3)
    decide = dispatch.remembered(lambda x: f"{x.numel()}")
    for size in [*range(10)] * 2:
        assert decide(torch.zeros(size)) == f"{size}"
        assert len(native.Kinds._all[-1]) <= 3


@pytest.mark.parametrize("name", ["linear", "quantized_linear"])
def test_what_is_recorded_is_another_kind(name, monkeypatch):
    """Where a kernel is worth it only without a gradient, or only with one."""
    weight = torch.randn(64, 64)
    given = ops.quantize_weight(weight, 8) if name == "quantized_linear" else weight
    records, module = [], sys.modules[f"vlcore.ops.{name}"]

    def worthwhile(x, *others):
        records.append(torch.is_grad_enabled() and x.requires_grad)
        return False

    kernels = {name: replace(kernel, worthwhile=worthwhile) for name, kernel in list(module.KERNELS.items())[:1]}
    monkeypatch.setattr(module, "KERNELS", kernels)
    for requires_grad in (False, True, False):
        getattr(ops, name)(torch.randn(3, 64, requires_grad=requires_grad), given)
    assert records == ([False, True] if native.signature() is not None else [False, True, False])


def test_gradients_are_those_of_autograd_also_where_it_is_switched_off():
    x, unused, grad = torch.randn(3), torch.randn(2), torch.randn(3)
    for guard in (torch.no_grad, torch._C._AutoDispatchBelowAutograd):
        with guard():
            grad_x, grad_unused = gradients(lambda x, unused: x**3, (x, unused), grad)
        torch.testing.assert_close(grad_x, 3 * x**2 * grad)
        assert not grad_unused.any() and not x.requires_grad


def test_torch_operators_work_inside_a_dispatch_mode():
    from torch.utils.flop_counter import FlopCounterMode

    x, weight = torch.randn(5, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
    with FlopCounterMode(display=False):
        ops.linear_cross_entropy(x, weight, torch.arange(5)).backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("function", [SwiGLU, RMSNorm])
def test_a_second_derivative_is_refused(function):
    x, weight = torch.randn(8, requires_grad=True), torch.randn(8)
    arguments = (x, weight, "torch") if function is SwiGLU else (x, weight, 1e-6, "torch")
    with pytest.raises(RuntimeError, match=f"{function.__name__} can be differentiated once, and create_graph=True"):
        torch.autograd.grad(function.apply(*arguments).sum(), x, create_graph=True)


def test_no_operator_has_a_second_derivative():
    functions = [f for f in torch.autograd.Function.__subclasses__() if f.__module__.startswith("vlcore.ops")]
    assert len(functions) > 5
    assert all(function.backward.__code__ is SwiGLU.backward.__code__ for function in functions)


class OnGpu(torch.Tensor):
    """A tensor that says that a GPU holds it."""

    is_cuda = True


def test_kernels_run_on_the_device_of_their_tensors(monkeypatch):
    inside, seen = [], []

    @contextmanager
    def device_of(tensor):
        inside.append(tensor)
        yield
        inside.pop()

    def forward(x):
        seen.append(len(inside))
        return x.clone()

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    kernels = {"near": Kernel(forward, None, lambda *arguments: [])}
    op = define("guarded_forward(Tensor x, str backend) -> Tensor", kernels, torch.clone, lambda x, backend: x.clone())
    with torch.no_grad():
        for current in (0, -1):  # a tensor that no GPU holds says that it is on -1
            monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda current=current: current, raising=False)
            op(torch.zeros(1).as_subclass(OnGpu), "near")
        op(torch.zeros(1), "near")
    assert seen == [1, 0, 0]


class Seen(TorchDispatchMode):
    """Keeps the names of the operators that torch sees."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names = {*getattr(self, "names", ()), str(function)}
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("requires_grad", [False, True])
def test_torch_sees_the_operators_wherever_it_looks(requires_grad):
    x, weight = torch.randn(3, 8, requires_grad=requires_grad), torch.randn(8)
    backend = "torch" if native.cpp is None else "cpp"

    def norm(x):
        return dispatch.apply(RMSNorm, x, weight, 1e-6, backend)

    wanted = norm(x)
    with Seen() as seen:
        assert torch.equal(norm(x), wanted)
    assert "vlcore.rms_norm_forward.default" in seen.names
    with torch.profiler.profile() as profile:
        norm(x)
    assert any(event.key == "vlcore::rms_norm_forward" for event in profile.key_averages())
    graph = make_fx(norm)(x.detach())
    assert any("rms_norm_forward" in str(node.target) for node in graph.graph.nodes)


def test_a_transform_that_no_operator_knows_is_refused_by_torch():
    weight = torch.randn(8)
    with pytest.raises(RuntimeError, match="functorch transforms.* setup_context"):
        torch.func.grad(lambda x: dispatch.apply(RMSNorm, x, weight, 1e-6, "torch").sum())(torch.randn(3, 8))


def test_what_is_on_meta_is_not_computed():
    def fail(x):
        raise AssertionError("it runs")

    kernels = {"near": Kernel(fail, None, lambda *arguments: [])}
    op = define("shapes_forward(Tensor x, str backend) -> Tensor", kernels, fail, lambda x, backend: x.clone())
    assert op(torch.zeros(2, device="meta"), "near").shape == (2,)
    with pytest.raises(AssertionError, match="it runs"):
        op(torch.zeros(2), "near")


def test_triton_is_neither_needed_nor_imported_on_a_cpu():
    program = """
import sys
sys.modules["triton"] = None  # importing it raises
import torch
from vlcore import ops
x, weight = torch.randn(2, 4), torch.ones(4)
assert ops.rms_norm(x, weight).shape == x.shape
"""
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("name", ["rms_norm", "add_rms_norm", "layer_norm"])
def test_nothing_changes_where_nothing_is_differentiated(name):
    function, (x, residual) = getattr(ops, name), torch.randn(2, 3, 8, requires_grad=True)
    weight, bias = torch.randn(2, 8, requires_grad=True)
    given = {"rms_norm": (x, weight), "add_rms_norm": (x, residual, weight), "layer_norm": (x, weight, bias)}[name]
    wanted = function(*given)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for guard in (torch.no_grad, torch.inference_mode):
        for variant in (function, compiled):
            with guard():
                got = variant(*given)
            pairs = zip(*(y if isinstance(y, tuple) else (y,) for y in (got, wanted)), strict=True)
            assert all(torch.equal(a, b) and not a.requires_grad for a, b in pairs)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_a_forward_keeps_only_what_a_backward_will_ask_for(requires_grad, monkeypatch):
    given = torch.randn(3, 8), torch.randn(8, requires_grad=requires_grad), torch.randn(8)
    kept = []

    def forward(x, weight, bias, eps, keep):
        kept.append(keep)
        return x.clone(), torch.zeros(3, 2) if keep else None

    module = sys.modules["vlcore.ops.layer_norm"]
    monkeypatch.setitem(module.KERNELS, "near", Kernel(forward, None, lambda *arguments: []))
    ops.layer_norm(*given, backend="near")
    with torch.no_grad():
        ops.layer_norm(*given, backend="near")
    with Seen():
        ops.layer_norm(*given, backend="near")
    assert kept == [requires_grad, False, requires_grad]
