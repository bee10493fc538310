from dataclasses import replace

import pytest
import torch
from conftest import DEVICE

from vlcore import cuda_graph, ops
from vlcore.config import LlamaConfig, preset
from vlcore.decoding import KVCache, next_logits
from vlcore.models import DeepSeekVL, init_weights, quantize

SMALL = LlamaConfig(num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, hidden_size=64)


@pytest.mark.parametrize("lengths", [[5], [1], [3, 7, 1], [4, 4]])
def test_the_cache_attends_like_the_whole_sequence(lengths):
    steps, total = 3, sum(lengths)
    generator = torch.Generator().manual_seed(0)
    rows = [
        [torch.randn(1, length + steps, heads, 16, generator=generator) for heads in (4, 2, 2)] for length in lengths
    ]
    expected = [ops.rope_attention(*row, torch.arange(row[0].shape[1])[None], theta=5e3) for row in rows]
    cache = KVCache(SMALL, len(lengths), max(lengths) + steps, torch.float32, "cpu")
    cache.begin(lengths)
    packed = [torch.cat([row[i][:, :length] for row, length in zip(rows, lengths, strict=True)], 1) for i in range(3)]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    for layer in (0, 1):
        out = cache.attend(layer, *packed, positions, theta=5e3, cu_seqlens=cu_seqlens)
    assert out.shape[1] == total
    for row, part in enumerate(out.split(lengths, 1)):
        torch.testing.assert_close(part, expected[row][:, : lengths[row]])
    for step in range(steps):
        places = [length + step for length in lengths]
        token = [torch.cat([row[i][:, place, None] for row, place in zip(rows, places, strict=True)]) for i in range(3)]
        for layer in (0, 1):
            out = cache.attend(layer, *token, cache.lengths[:, None], theta=5e3, cu_seqlens=None)
        for row, place in enumerate(places):
            torch.testing.assert_close(out[row, 0], expected[row][0, place])
        cache.advance()


def test_the_cache_takes_rows_of_one_length():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 5, heads, 16, generator=generator) for heads in (4, 2, 2))
    positions = torch.arange(5).expand(2, 5)
    cache = KVCache(SMALL, 2, 8, torch.float32, "cpu")
    with pytest.raises(ValueError, match="call begin with the prompts' lengths before the first forward"):
        cache.attend(0, q, k, v, positions, theta=1e4, cu_seqlens=None)
    cache.begin([5, 5])
    out = cache.attend(0, q, k, v, positions, theta=1e4, cu_seqlens=None)
    torch.testing.assert_close(out, ops.rope_attention(q, k, v, positions))
    torch.testing.assert_close(cache.keys[0][:, :5], ops.apply_rope(k, positions))
    torch.testing.assert_close(cache.values[0][:, :5], v)


@pytest.mark.parametrize("lengths", [[1], [1, 9], [0, 3], [1, 1, 1]])
def test_prompts_that_the_cache_cannot_hold(lengths):
    with pytest.raises(ValueError, match=r"KVCache.begin: prompts of \[.*\] tokens do not fit 2 rows of 1 to 8"):
        KVCache(SMALL, 2, 8, torch.float32, "cpu").begin(lengths)


PROMPT, STEPS = 5, 4


@pytest.fixture
def model():
    # Heads of a size that every kernel takes.
    language = replace(preset("tiny").language, num_heads=2, num_kv_heads=2, head_dim=64)
    model = DeepSeekVL(replace(preset("tiny"), language=language))
    init_weights(model, seed=0)
    return model.eval().to(DEVICE)


@pytest.fixture
def ids(model):
    # None of them the image's placeholder.
    return torch.arange(2 * (PROMPT + STEPS), device=DEVICE).view(2, -1) % model.config.image_token_id


@torch.inference_mode()
def decoded(model, ids):
    """The logits behind each token that follows the prompt, (2, STEPS, V)."""
    cache = KVCache(model.config.language, 2, PROMPT + STEPS, model.compute_dtype, DEVICE)
    cache.begin([PROMPT, PROMPT])
    model(ids[:, :PROMPT], positions=torch.arange(PROMPT, device=DEVICE).expand(2, -1), memory=cache)
    step = next_logits(model, cache)
    logits = []
    for token in ids[:, PROMPT:].unbind(1):
        logits.append(step(token))
        cache.advance()
    assert cache.lengths.tolist() == [PROMPT + STEPS] * 2
    return torch.stack(logits, 1)


def test_steps_give_the_logits_of_the_whole_sequence(model, ids):
    torch.testing.assert_close(decoded(model, ids), model(ids).logits[:, PROMPT:], rtol=1e-4, atol=1e-4)


def test_all_steps_but_the_first_are_one_graph(model, ids, graphs):
    logits = decoded(model, ids)
    assert [len(launches) for launches in graphs] == [STEPS - 1]
    torch.testing.assert_close(logits, model(ids).logits[:, PROMPT:], rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(DEVICE == "cpu", reason="there is no GPU")
@pytest.mark.parametrize("bits", [None, 8, 4])
def test_a_graph_gives_the_logits_of_kernels_launched_one_by_one(model, ids, bits, monkeypatch):
    model = model.bfloat16()
    if bits:
        quantize(model, bits)
    logits = decoded(model, ids)
    monkeypatch.setattr(cuda_graph, "can_be_captured", lambda *tensors: False)
    assert torch.equal(logits, decoded(model, ids))
