"""What the extension does besides kernels."""

import mmap
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from vlcore import native, ops

SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
SIZE = 64 * 2**20
needs_cpp = pytest.mark.skipif(native.cpp is None, reason="vlcore was built without its C++ extension")


def fresh() -> torch.Tensor:
    """Memory that the system has just given: an allocator could hand out what another tensor asked for and left."""
    return torch.frombuffer(mmap.mmap(-1, SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), dtype=torch.uint8)


def flags(tensor: torch.Tensor) -> list[str]:
    """What the system was told of the memory that the middle of a tensor lies in."""
    address, inside = tensor.data_ptr() + tensor.nbytes // 2, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if match := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(match[1], 16) <= address < int(match[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return line.split()[1:]
    raise AssertionError(f"{address:x} is not in /proc/self/smaps")


@needs_cpp
@pytest.mark.skipif(not SETTING.exists(), reason="this system has no transparent huge pages")
def test_the_system_is_asked_for_huge_pages():
    """Whether it has any to give depends on what else is in its memory."""
    plain, wanted = fresh(), fresh()
    native.prefer_huge_pages(wanted)
    assert "hg" in flags(wanted) and "hg" not in flags(plain)


@needs_cpp
@pytest.mark.skipif(not SETTING.exists(), reason="this system has no transparent huge pages")
def test_large_results_are_written_to_huge_pages():
    x = torch.ones(2049, 4096)
    for result in (ops.swiglu(x, x, backend="cpp"), ops.rms_norm(x, x[0], backend="cpp")):
        assert "hg" in flags(result)


def test_what_malloc_has_at_hand_is_written_to_as_it_is(monkeypatch):
    asked = []
    monkeypatch.setattr(native, "prefer_huge_pages", asked.append)
    small, large = torch.empty(2048, 4095), torch.empty(2048, 4096)
    assert native.fresh(small) is small and not asked
    native.fresh(large)
    assert asked == [large]


@pytest.mark.parametrize("size", [0, 1, 5000])
def test_memory_too_small_for_a_page_is_left_alone(size):
    tensor = torch.arange(size, dtype=torch.uint8)
    assert native.prefer_huge_pages(tensor) is tensor
    assert torch.equal(tensor, torch.arange(size, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("architectures", "capability", "runs"),
    [
        ("80;90a;100a", (8, 0), True),
        ("80;90a;100a", (8, 9), True),
        ("80;90a;100a", (9, 0), True),
        ("80;90a;100a", (7, 5), False),
        ("80;90a;100a", (10, 3), False),
        ("80;90a;100a", (12, 0), False),
        ("100", (10, 3), True),
        ("86", (8, 0), False),
    ],
)
def test_code_for_one_gpu_runs_on_those_after_it(architectures, capability, runs):
    assert native.has_code(architectures, capability) is runs


class OnGpu(torch.Tensor):
    """A tensor that says that a GPU holds it."""

    is_cuda = True
    device = torch.device("cuda", 0)


def test_says_why_no_cuda_kernel_runs(monkeypatch):
    monkeypatch.setattr(native, "cuda", None)
    without, on_cpu = "vlcore was built without its CUDA extension", "it runs on a GPU only"
    assert native.cuda_refusals(torch.zeros(1)) == [without, on_cpu]
    monkeypatch.setattr(native, "cuda", SimpleNamespace(architectures="80;90a"))
    only = "it computes in float32, bfloat16 and float16 only"
    assert native.cuda_refusals(torch.zeros(1).double()) == [on_cpu, only]
    x = torch.zeros(1).as_subclass(OnGpu)
    for capability, since, reasons in (
        ((9, 0), (9, 0), []),
        ((8, 6), (8, 0), []),
        ((8, 6), (9, 0), ["it needs compute capability 9.0, and this GPU has 8.6"]),
        ((12, 0), (9, 0), ["this build has code for 80;90a, and the GPU's is 12.0"]),
    ):
        monkeypatch.setattr(native, "_capability", lambda index, capability=capability: capability)
        assert native.cuda_refusals(x, since) == reasons


def test_tensors_for_cuda_kernels_begin_at_16_bytes():
    fitting, shifted = torch.arange(8.0), torch.arange(9.0)[1:]
    assert native.aligned(fitting) is fitting
    assert native.aligned(shifted).data_ptr() % 16 == 0 and torch.equal(native.aligned(shifted), shifted)
    assert torch.equal(native.aligned(torch.arange(8.0).view(2, 4).t()), torch.arange(8.0).view(2, 4).t())


LINEAR = dict(x=torch.zeros(64), values=torch.zeros(64), rows=1, inputs=64, groups=1, bits=8, dtype=0)
DECODE = dict(cache=torch.zeros(64), stride=64, heads=2, kv_heads=1, dim=64, length_bytes=8, dtype=0)


@pytest.mark.skipif(native.cuda is None, reason="vlcore was built without its CUDA extension")
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (dict(bits=3), "3 bits are neither 8 nor 4"),
        (dict(rows=17), "17 rows are more than 16"),
        (dict(inputs=72), "a row of 72 inputs is no multiple of 16 bytes"),
        (dict(inputs=48, bits=4), "a row of 48 inputs is no multiple of 16 bytes"),
        (dict(groups=4), "4 groups of 64 inputs are not of 32, 64 or 128"),
        (dict(x=torch.zeros(65)[1:]), "a tensor does not begin at a multiple of 16 bytes"),
        (dict(values=torch.zeros(65)[1:]), "a tensor does not begin at a multiple of 16 bytes"),
        (dict(dtype=3), "there is no dtype 3"),
    ],
)
def test_cuda_linear_layers_check_what_they_are_given(changed, message):
    """Before CUDA is called, which there need not be."""
    x, values, rows, inputs, groups, bits, dtype = {**LINEAR, **changed}.values()
    with pytest.raises(ValueError, match=message):
        native.cuda.quantized_linear_forward(x, values, None, None, None, rows, 4, inputs, groups, bits, (dtype, 0))


@pytest.mark.skipif(native.cuda is None, reason="vlcore was built without its CUDA extension")
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (dict(dim=32), "a head of 32 is neither 64 nor 128"),
        (dict(heads=3, kv_heads=2), "3 heads do not share 2"),
        (dict(kv_heads=0), "2 heads do not share 0"),
        (dict(length_bytes=2), "lengths of 2 bytes are neither int32 nor int64"),
        (dict(cache=torch.zeros(65)[1:]), "a tensor does not begin at a multiple of 16 bytes"),
        (dict(stride=66), "the tokens of a cache are not at multiples of 16 bytes"),
        (dict(dtype=3), "there is no dtype 3"),
    ],
)
def test_cuda_decode_attention_checks_what_it_is_given(changed, message):
    cache, stride, heads, kv_heads, dim, length_bytes, dtype = {**DECODE, **changed}.values()
    given = (None, None, None, cache, cache, None, None, 1, stride, stride, heads, kv_heads, dim, length_bytes)
    with pytest.raises(ValueError, match=message):
        native.cuda.decode_attention_forward(*given, 1e4, 1.0, (dtype, 0))


@pytest.mark.skipif(native.cuda is None, reason="vlcore was built without its CUDA extension")
def test_cuda_kernels_of_nothing_are_not_launched():
    x = torch.zeros(64)
    native.cuda.quantized_linear_forward(x, x, None, None, None, 0, 4, 64, 1, 8, (0, 0))
    native.cuda.decode_attention_forward(None, None, None, x, x, None, None, 0, 64, 64, 2, 1, 64, 8, 1e4, 1.0, (0, 0))
    assert native.cuda.architectures


LOOKS = {
    "two by three": (torch.zeros(2, 3),),
    "three by two": (torch.zeros(3, 2),),
    "six": (torch.zeros(6),),
    "none": (torch.zeros(0),),
    "a scalar": (torch.zeros(()),),
    "turned": (torch.zeros(3, 2).T,),
    "expanded": (torch.zeros(3).expand(2, 3),),
    "float16": (torch.zeros(2, 3).half(),),
    "bfloat16": (torch.zeros(2, 3).bfloat16(),),
    "int32": (torch.zeros(2, 3).int(),),
    "not aligned": (torch.zeros(7)[1:].view(2, 3),),
    "two tensors": (torch.zeros(2, 3), torch.zeros(2, 3)),
    "a tensor and nothing": (torch.zeros(2, 3), None),
    "nothing": (None,),
    "no argument": (),
    "true": (True,),
    "false": (False,),
    "one": (1,),
    "one as a float": (1.0,),
    "minus one": (-1,),
    "zero": (0.0,),
    "minus zero": (-0.0,),
    "a string": ("ab",),
    "two strings": ("a", "b"),
    "a string that might be two": ("aSb",),
    "no string": ("",),
}


@needs_cpp
def test_what_looks_different_has_another_signature():
    signatures = {name: native.signature(*arguments) for name, arguments in LOOKS.items()}
    assert all(isinstance(signature, bytes) for signature in signatures.values())
    assert len(set(signatures.values())) == len(LOOKS)


@needs_cpp
@pytest.mark.parametrize("shape", [(), (3,), (2, 0, 5), (1, 2, 3, 4, 5, 6, 7, 8)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool])
def test_what_looks_alike_has_the_same_signature(shape, dtype):
    first = torch.zeros(shape, dtype=dtype)
    second = torch.nn.Parameter(torch.ones(shape, dtype=dtype), requires_grad=dtype.is_floating_point)
    assert native.signature(first, 1.5, "auto") == native.signature(second, 1.5, "auto")


class Derived(torch.Tensor):
    pass


@needs_cpp
@pytest.mark.parametrize(
    "odd",
    [
        (1, 2),
        [1],
        2**63,
        torch.float32,
        torch.zeros(3, device="meta"),
        torch.eye(3).to_sparse(),
        torch.zeros(3).as_subclass(Derived),
        "a" * 5000,
        "\ud800",
    ],
    ids=lambda odd: type(odd).__name__,
)
def test_what_has_no_signature(odd):
    assert native.signature(torch.zeros(3), odd) is None


@needs_cpp
def test_a_tensor_of_a_transform_has_no_signature():
    found = []

    def function(x):
        found.append(native.signature(x))
        return x.sum()

    torch.func.grad(function)(torch.ones(3))
    torch.vmap(function)(torch.ones(2, 3))
    with torch._subclasses.FakeTensorMode():
        function(torch.ones(3))
    assert found == [None] * 3
