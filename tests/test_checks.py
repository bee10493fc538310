"""What operators are given that is no tensor, no number or holds nothing is named, and never a kernel's business."""

import dataclasses
import inspect
import itertools

import pytest
import torch
from conftest import DEVICE
from operators import here, random

from vlcore import ops

X, W, B, Q = random(4, 64), random(64), random(64), random(1, 8, 4, 16)
MAP, TABLE = random(1, 4, 4, 3, 2, 8), random(3, 8)
GRID, ROWS = random(1, 1, 16, 8), random(7, 8)
POSITIONS, LABELS = torch.zeros(1, 8, dtype=torch.long, device=DEVICE), torch.arange(4, device=DEVICE)
TOKEN, CACHE = random(1, 1, 4, 16), random(1, 8, 4, 16)
NUMBER = "it needs to be a number"

REFUSED = {
    "a weight is left out": (lambda: ops.rms_norm(X, None), "rms_norm: weight is None; it needs to be a tensor"),
    "a bias is left out": (lambda: ops.layer_norm(X, W, None), "layer_norm: bias is None; it needs to be a tensor"),
    "x is a list": (lambda: ops.rms_norm([1.0, 2.0], W), "rms_norm: x is a list; it needs to be a tensor"),
    "x is an array": (lambda: ops.swiglu(X.cpu().numpy(), X), "swiglu: gate is a ndarray; it needs to be a tensor"),
    "x is one number": (lambda: ops.rms_norm(W[0], W[0]), r"rms_norm: x is \(\); it needs to be \(..., N\)"),
    "norms of one number": (lambda: ops.layer_norm(W[0], W[0], W[0]), r"layer_norm: x is \(\); it needs"),
    "sums of one number": (lambda: ops.add_rms_norm(W[0], W[0], W[0]), r"add_rms_norm: x is \(\); it needs"),
    "eps is a text": (lambda: ops.rms_norm(X, W, "1e-6"), f"rms_norm: eps is '1e-6'; {NUMBER}"),
    "eps is None": (lambda: ops.layer_norm(X, W, B, None), f"layer_norm: eps is None; {NUMBER}"),
    "eps is True": (lambda: ops.add_rms_norm(X, X, W, True), f"add_rms_norm: eps is a bool; {NUMBER}"),
    "eps is a tensor": (lambda: ops.rms_norm(X, W, W[0]), rf"rms_norm: eps is a tensor \(\); {NUMBER}"),
    "theta is a text": (lambda: ops.apply_rope(Q, POSITIONS, "x"), f"apply_rope: theta is 'x'; {NUMBER}"),
    "scale is a text": (lambda: ops.attention(Q, Q, Q, scale="a"), f"attention: scale is 'a'; {NUMBER}"),
    "causal is a text": (
        lambda: ops.attention(Q, Q, Q, causal="no"),
        "attention: causal is 'no'; it needs to be True or False",
    ),
    "causal is a number": (
        lambda: ops.rope_attention(Q, Q, Q, POSITIONS, causal=1),
        "rope_attention: causal is a int; it needs to be True or False",
    ),
    "bounds are a list": (
        lambda: ops.attention(Q, Q, Q, cu_seqlens=[0, 8]),
        "attention: cu_seqlens is a list; it needs to be a tensor",
    ),
    "positions are a list": (
        lambda: ops.rope_attention(Q, Q, Q, [0, 1]),
        "rope_attention: positions is a list; it needs to be a tensor",
    ),
    "heads hold nothing": (
        lambda: ops.attention(*[Q[..., :0]] * 3),
        r"attention: q is \(1, 8, 4, 0\); heads need to hold something",
    ),
    "windows of empty heads": (
        lambda: ops.window_attention(MAP[..., :0], None, TABLE[:, :0], TABLE[:, :0], 2),
        "window_attention: qkv is .*; heads need to hold something",
    ),
    "a grid of empty heads": (
        lambda: ops.rel_pos_attention(*[GRID[..., :0]] * 3, ROWS[:, :0], ROWS[:, :0], (4, 4)),
        "rel_pos_attention: q is .*; heads need to hold something",
    ),
    "a window is no whole number": (
        lambda: ops.window_attention(MAP, None, TABLE, TABLE, 2.0),
        "window_attention: window is a float; it needs to be a whole number",
    ),
    "a grid is one number": (
        lambda: ops.rel_pos_attention(GRID, GRID, GRID, ROWS, ROWS, 4),
        "rel_pos_attention: grid is 4; it needs to be two whole numbers",
    ),
    "a grid's side is no whole number": (
        lambda: ops.rel_pos_attention(GRID, GRID, GRID, ROWS, ROWS, (4, 4.0)),
        "rel_pos_attention: grid's X is a float; it needs to be a whole number",
    ),
    "a table is left out": (
        lambda: ops.rel_pos_attention(GRID, GRID, GRID, ROWS, None, (4, 4)),
        "rel_pos_attention: rel_pos_w is None; it needs to be a tensor",
    ),
    "a size is no whole number": (
        lambda: ops.downsample_features(random(1, 4, 8, 8), None, None, random(8, 4, 3, 3), random(8, 8, 3, 3), 16.0),
        "downsample_features: size is a float; it needs to be a whole number",
    ),
    "ignored is None": (
        lambda: ops.linear_cross_entropy(X, random(10, 64), LABELS, ignore_index=None),
        "linear_cross_entropy: ignore_index is None; it needs to be a whole number",
    ),
    "labels are a list": (
        lambda: ops.linear_cross_entropy(X, random(10, 64), [0, 1, 2, 3]),
        "linear_cross_entropy: labels is a list; it needs to be a tensor",
    ),
    "a weight is not quantised": (
        lambda: ops.quantized_linear(X, random(8, 64)),
        "quantized_linear: weight is a Tensor; quantize_weight makes",
    ),
    "lengths are a list": (
        lambda: ops.decode_attention(TOKEN, TOKEN, TOKEN, CACHE, CACHE.clone(), [1]),
        "decode_attention: lengths is a list; it needs to be a tensor",
    ),
}

WEIGHT = ops.quantize_weight(random(5, 64), 8)
BLOCK = [*[random(16)] * 2, *[random(64, 16)] * 3, random(16, 64), *[random(24, 16)] * 2, random(16, 24)]
# What operators are given that is no number, and at which places there may be None.
GIVEN = {
    "rms_norm": ((X, W), ()),
    "add_rms_norm": ((X, X, W), ()),
    "layer_norm": ((X, W, B), ()),
    "swiglu": ((X, X), ()),
    "attention": ((Q, Q, Q), ()),
    "apply_rope": ((Q, POSITIONS), ()),
    "rope_attention": ((Q, Q, Q, POSITIONS), ()),
    "decode_attention": ((TOKEN, TOKEN, TOKEN, CACHE, CACHE.clone(), LABELS[:1]), ()),
    "decode_block": (
        (TOKEN[:, :, 0], TOKEN[:, :, 0], ops.BlockWeights(*BLOCK), CACHE, CACHE.clone(), LABELS[:1]),
        (1,),
    ),
    "rel_pos_attention": ((GRID, GRID, GRID, ROWS, ROWS, (4, 4)), ()),
    "window_attention": ((MAP, MAP[0, 0, 0], TABLE, TABLE, 2), (1,)),
    "downsample_features": ((*[random(1, 4, 8, 8)] * 2, random(1), random(8, 4, 3, 3), random(8, 8, 3, 3)), (1,)),
    "hybrid_adaptor": ((X, X, *[random(3, 64), random(3)] * 2, random(2, 6), random(2)), ()),
    "linear": ((X, random(5, 64), random(5)), (2,)),
    "linear_cross_entropy": ((X, random(10, 64), LABELS), ()),
    "quantized_linear": ((X, WEIGHT, random(5)), (2,)),
}


@pytest.mark.parametrize("casts", [False, True])
@pytest.mark.parametrize("name", GIVEN)
def test_what_is_wrong_is_named(name, casts):
    (given, optional), operator = GIVEN[name], getattr(ops, name)
    parameters = list(inspect.signature(operator).parameters)
    with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=casts):
        operator(*given)
        for place, wrong in itertools.product(range(len(given)), (None, "x", [1.0])):
            if wrong is not None or place not in optional:
                with pytest.raises(ValueError, match=rf"^{name}: {parameters[place]} is "):
                    operator(*given[:place], wrong, *given[place + 1 :])


def test_a_weight_of_a_block_is_named():
    x, _, weights, *caches, lengths = GIVEN["decode_block"][0]
    for name, wrong in itertools.product(weights._fields, (None, "x", [1.0])):
        with pytest.raises(ValueError, match=f"^decode_block: {name} is .*; it needs to be a tensor"):
            ops.decode_block(x, None, weights._replace(**{name: wrong}), *caches, lengths)


def test_what_stands_in_a_quantised_weight_is_named():
    for name in ("values", "scales"):
        with pytest.raises(ValueError, match=f"^QuantizedWeight: {name} is None; it needs to be a tensor"):
            dataclasses.replace(WEIGHT, **{name: None})


@pytest.mark.parametrize("given", REFUSED)
def test_what_is_no_tensor_or_number_is_named(given):
    call, message = REFUSED[given]
    for _ in range(2):  # what is refused is not remembered
        with pytest.raises(ValueError, match=message):
            call()


def test_numbers_may_be_whole():
    assert torch.equal(ops.rms_norm(X, W, 1), ops.rms_norm(X, W, 1.0))
    assert torch.equal(ops.apply_rope(Q, here(POSITIONS), 10), ops.apply_rope(Q, here(POSITIONS), 10.0))
