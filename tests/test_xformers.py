"""rope_attention through xformers, in whose place there is a package of its interface on a CPU."""

import sys
from dataclasses import replace
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE
from operators import assert_matches, assert_well_formed
from test_rope_attention import bounds, inputs, reference, through_op

from vlcore import ops
from vlcore.ops.rope_attention import KERNELS


def test_says_why_xformers_cannot_run(monkeypatch):
    monkeypatch.setitem(sys.modules, "xformers", None)
    empty = (x if x.dtype == torch.int64 else x.double() for x in inputs(batch=0))
    elsewhere = "" if DEVICE == "cuda" else "xformers attends on a GPU only; "
    reasons = f"is not installed; {elsewhere}xformers computes in no float64; xformers takes no empty"
    with pytest.raises(ValueError, match=f"rope_attention cannot run on 'xformers' .*: xformers {reasons} tensors"):
        ops.rope_attention(*empty, backend="xformers")


class Bias:
    """What xformers' biases hide, as the dense mask of what they show."""

    def __init__(self, shown):
        self.shown = shown


class BlockDiagonal(Bias):
    @classmethod
    def from_seqlens(cls, lengths):
        assert all(lengths)
        blocks = torch.block_diag(*(torch.ones(length, length) for length in lengths)).bool()
        return cls(lambda queries, keys: blocks)

    def make_causal(self):
        return Bias(lambda queries, keys: self.shown(queries, keys).tril())


def corner(bottom_right):
    return lambda: Bias(lambda i, j: torch.ones(i, j, dtype=torch.bool).tril(j - i if bottom_right else 0))


@pytest.fixture
def xformers(monkeypatch):
    """A package by that name whose attention is torch's; the kernel that asks for it runs on a CPU."""

    def attention(query, key, value, attn_bias=None, scale=None):
        assert query.shape[2:] == key.shape[2:] == value.shape[2:]
        # Heads may be groups of heads, (B, T, groups, heads, D).
        heads = [x.flatten(2, -2).transpose(1, 2) for x in (query, key, value)]
        mask = attn_bias and attn_bias.shown(query.shape[1], key.shape[1])
        out = F.scaled_dot_product_attention(*heads, attn_mask=mask, scale=scale)
        return out.transpose(1, 2).reshape(query.shape)

    biases = SimpleNamespace(
        BlockDiagonalMask=BlockDiagonal,
        LowerTriangularMask=corner(bottom_right=False),
        LowerTriangularFromBottomRightMask=corner(bottom_right=True),
    )
    package, package_ops = ModuleType("xformers"), ModuleType("xformers.ops")
    package.__spec__ = ModuleSpec("xformers", None)
    package_ops.fmha = SimpleNamespace(memory_efficient_attention=attention, attn_bias=biases)
    monkeypatch.setitem(sys.modules, "xformers", package)
    monkeypatch.setitem(sys.modules, "xformers.ops", package_ops)
    monkeypatch.setitem(KERNELS, "xformers", replace(KERNELS["xformers"], refusals=lambda *arguments: []))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("sizes", "offsets"),
    [({}, None), ({"key_heads": 4}, None), ({"queries": 3}, None), ({"batch": 1}, (0, 0, 3, 7))],
)
def test_xformers_is_given_what_it_needs(xformers, sizes, offsets, causal):
    given, cu_seqlens = inputs(**sizes), None if offsets is None else bounds(*offsets)
    assert_matches(through_op("xformers", causal, cu_seqlens), reference(causal, cu_seqlens), *given)
    (out, lse) = assert_well_formed("rope_attention_forward", *given, cu_seqlens, 1e4, causal, 0.5, "xformers")
    assert out.is_contiguous() and not lse.numel()
