"""Kernels that take strides, on tensors whose numbers stand more than 2^31 elements apart: offsets are of 64 bits
wherever they can be that large."""

import mmap
import sys

import pytest
import torch
from conftest import DEVICE
from operators import random, skip_if_refused, values_and_gradients

from vlcore import ops
from vlcore.ops.apply_rope import KERNELS as APPLY_ROPE
from vlcore.ops.decode_attention import KERNELS as DECODE
from vlcore.ops.rel_pos_attention import KERNELS as REL_POS
from vlcore.ops.rope_attention import KERNELS as ROPE
from vlcore.ops.swiglu import KERNELS as SWIGLU
from vlcore.ops.window_attention import KERNELS as WINDOW

if sys.platform != "linux" or DEVICE != "cpu":
    pytest.skip("only Linux, and only of a CPU, gives memory that is not there", allow_module_level=True)

BACKENDS = ["triton", "cpp"]
# Twice this is beyond 2^31.
STRIDE = 2**30 + 2**29
# Of Linux; Python has a name for it since 3.13.
MAP_NORESERVE = 0x4000


def far_apart(tensor, dim):
    """The same values, with STRIDE between those of a dimension: only what is written to takes memory. An offset that
    wraps around finds zeros, which lie in front."""
    strides = [*tensor.stride()]
    strides[dim] = STRIDE
    front, size = (tensor.element_size() * count for count in (2**32, STRIDE * tensor.shape[dim]))
    memory = mmap.mmap(-1, front + size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
    place = torch.frombuffer(memory, dtype=tensor.dtype, offset=front)
    return place.as_strided(tensor.shape, strides).copy_(tensor)


def assert_distance_does_not_matter(function, dim, *given):
    far = tuple(far_apart(tensor, dim) for tensor in given)
    for got, wanted in zip(values_and_gradients(function, far), values_and_gradients(function, given), strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("backend", BACKENDS)
def test_swiglu(backend):
    given = random(3, 16), random(3, 16)
    skip_if_refused(SWIGLU, backend, *given)
    assert_distance_does_not_matter(lambda *halves: ops.swiglu(*halves, backend=backend), 0, *given)


@pytest.mark.parametrize("dim", [0, 2])
@pytest.mark.parametrize("backend", BACKENDS)
def test_rope_attention(backend, dim):
    given = [random(3, 5, 3, 16) for _ in range(3)]
    positions = torch.arange(5).expand(3, 5)
    skip_if_refused(ROPE, backend, *given, positions, 1e4, True, None, 0.25)
    assert_distance_does_not_matter(lambda *qkv: ops.rope_attention(*qkv, positions, backend=backend), dim, *given)


@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("backend", BACKENDS)
def test_apply_rope(backend, dim):
    x, positions = random(3, 3, 3, 16), torch.arange(3).expand(3, 3)
    skip_if_refused(APPLY_ROPE, backend, x, positions, 1e4)
    assert_distance_does_not_matter(lambda x: ops.apply_rope(x, positions, backend=backend), dim, x)


@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("backend", BACKENDS)
def test_rel_pos_attention(backend, dim):
    given, tables = [random(3, 3, 4, 16) for _ in range(3)], (random(3, 16), random(3, 16))
    skip_if_refused(REL_POS, backend, *given, *tables, (2, 2))
    assert_distance_does_not_matter(
        lambda *qkv: ops.rel_pos_attention(*qkv, *tables, (2, 2), backend=backend), dim, *given
    )


@pytest.mark.parametrize("dim", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("backend", BACKENDS)
def test_window_attention(backend, dim):
    shape = [1, 2, 2, 3, 1, 16]
    shape[dim] = 3
    qkv, tables = random(*shape), (random(3, 16), random(3, 16))
    skip_if_refused(WINDOW, backend, qkv, None, *tables, 2)
    assert_distance_does_not_matter(lambda qkv: ops.window_attention(qkv, None, *tables, 2, backend=backend), dim, qkv)


@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("backend", [*BACKENDS, "cuda"])
def test_decode_attention(backend, dim):
    q, k, v = (random(3, 1, 3, 64) for _ in range(3))
    caches, lengths = [random(3, 5, 3, 64) for _ in range(2)], torch.tensor([2, 3, 4])
    far = [far_apart(cache, dim) for cache in caches]
    skip_if_refused(DECODE, backend, q, k, v, *far, lengths, 1e4, 0.125)
    outs = [ops.decode_attention(q, k, v, *given, lengths, backend=backend) for given in (far, caches)]
    assert torch.equal(*outs) and all(map(torch.equal, far, caches))
