"""The whole model: embedding of images, padded and packed batches, the loss, parts, precision, and every error."""

import dataclasses
import re

import pytest
import torch
from public_models import example_inputs, make_telling

from vlcore.config import preset
from vlcore.models import DeepSeekVL, init_weights


@pytest.fixture
def model():
    model = DeepSeekVL(preset("tiny")).eval()
    make_telling(model)
    return model


def batch_of(config, lengths, seed=0):
    """One sequence of text for each length, the first with an image in it: their ids, and the pixels."""
    ids, pixels = example_inputs(config, 1, 4, seed)
    generator = torch.Generator().manual_seed(seed)
    texts = [torch.randint(4, config.language.vocab_size, (1, length), generator=generator) for length in lengths]
    return [ids, *texts], pixels


def pad(sequences, side, value):
    longest = max(ids.shape[1] for ids in sequences)
    rows = []
    for ids in sequences:
        padding = torch.full((1, longest - ids.shape[1]), value)
        rows.append(torch.cat((padding, ids) if side == "left" else (ids, padding), 1))
    return torch.cat(rows)


@torch.no_grad()
def test_image_tokens_stand_at_the_placeholders_in_reading_order(model):
    config = model.config
    ids, pixels = example_inputs(config, 3)
    ids = ids.view(-1)[: ids.numel() // 2 * 2].view(2, -1)  # the second image's placeholders go on in the second row
    embeddings = model.embed(ids, pixels)
    features = model.encode_images(pixels)
    is_image = ids == config.image_token_id
    torch.testing.assert_close(embeddings[is_image], features.flatten(0, 1))
    assert torch.equal(embeddings[~is_image], model.language.embed_tokens(ids[~is_image]))
    torch.testing.assert_close(model.embed(ids, image_features=features), embeddings)


@torch.no_grad()
def test_text_alone_needs_no_image(model):
    ids = torch.randint(4, 512, (2, 7))
    assert torch.equal(model.embed(ids), model.language.embed_tokens(ids))
    no_pixels = torch.empty(0, 3, 160, 160)
    assert torch.equal(model.embed(ids, no_pixels), model.language.embed_tokens(ids))


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_equals_its_sequences_alone(model, side):
    sequences, pixels = batch_of(model.config, [9, 31])
    ids, labels = pad(sequences, side, 2), pad(sequences, side, -100)
    mask = labels != -100
    labels = torch.where(ids == model.config.image_token_id, -100, labels)
    output = model(ids, pixels, labels, attention_mask=mask.int(), return_logits=True, loss_reduction="sum")
    losses = []
    for row, sequence in enumerate(sequences):
        alone_labels = torch.where(sequence == model.config.image_token_id, -100, sequence)
        images = pixels if row == 0 else None
        alone = model(sequence, images, alone_labels, return_logits=True, loss_reduction="sum")
        losses.append(alone.loss)
        torch.testing.assert_close(output.hidden[row][mask[row]], alone.hidden[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(output.logits[row][mask[row]], alone.logits[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(output.loss, sum(losses), rtol=1e-5, atol=1e-4)
    assert not output.hidden[~mask].any() and not output.logits[~mask].any()


def test_packed_sequences_lose_what_they_lose_alone(model):
    sequences, pixels = batch_of(model.config, [9, 1, 31])
    lengths = torch.tensor([ids.shape[1] for ids in sequences])
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    ids = torch.cat(sequences, 1)
    labels = torch.where(ids == model.config.image_token_id, -100, ids)
    packed = model(ids, pixels, labels, cu_seqlens=cu_seqlens, loss_reduction="sum").loss
    alone = 0.0
    for row, sequence in enumerate(sequences):
        images = pixels if row == 0 else None
        row_labels = torch.where(sequence == model.config.image_token_id, -100, sequence)
        alone = alone + model(sequence, images, row_labels, loss_reduction="sum").loss
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-4)
    supervised = int((labels != -100).sum()) - len(sequences)  # the first id of a sequence is predicted by nothing
    mean = model(ids, pixels, labels, cu_seqlens=cu_seqlens).loss
    # The first sequence begins with text, and the id behind its image is predicted by an image token.
    torch.testing.assert_close(mean, packed / supervised)


@torch.no_grad()
def test_positions_may_be_given(model):
    ids = torch.randint(4, 512, (1, 12))
    positions = torch.arange(12)[None]
    assert torch.equal(model(ids, positions=positions).hidden, model(ids).hidden)
    stretched = model(ids, positions=3 * positions).hidden
    assert not torch.allclose(stretched, model(ids).hidden, atol=1e-2)
    moved = model(ids, positions=positions + 100).hidden  # rotary positions are relative
    torch.testing.assert_close(moved, model(ids).hidden, rtol=1e-3, atol=1e-3)
    padded = torch.cat((torch.full((1, 3), 2), ids), 1)
    mask = torch.ones_like(padded).index_fill(1, torch.arange(3), 0)
    given = torch.cat((torch.zeros(1, 3, dtype=torch.long), 3 * positions), 1)
    masked = model(padded, attention_mask=mask, positions=given).hidden
    torch.testing.assert_close(masked[:, 3:], stretched, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_logits_come_when_asked_or_in_eval_without_labels(model):
    ids = torch.randint(4, 512, (1, 5))
    assert model(ids).logits.shape == (1, 5, 512) and model(ids).loss is None
    assert model(ids, return_logits=False).logits is None
    assert model(ids, labels=ids).logits is None
    assert model(ids, labels=ids, return_logits=True).logits is not None
    assert model.train()(ids).logits is None


class RecordingMemory:
    """Attends as the model does without a memory, and keeps what it was given."""

    def __init__(self):
        self.calls = []

    def attend(self, layer, q, k, v, positions, *, theta, cu_seqlens):
        from vlcore import ops

        self.calls.append((layer, tuple(q.shape), tuple(k.shape), theta))
        return ops.rope_attention(q, k, v, positions, theta=theta, cu_seqlens=cu_seqlens)


@torch.no_grad()
def test_a_memory_attends_in_place_of_the_model(model):
    ids, memory = torch.randint(4, 512, (1, 5)), RecordingMemory()
    positions = torch.arange(5)[None]
    torch.testing.assert_close(model(ids, positions=positions, memory=memory).hidden, model(ids).hidden)
    assert memory.calls == [(layer, (1, 5, 4, 16), (1, 5, 2, 16), 1e4) for layer in range(2)]
    # A decoding step takes any id for text, even the placeholder's.
    step = model(torch.tensor([[3]]), positions=torch.tensor([[5]]), memory=memory)
    assert step.hidden.shape == (1, 1, 64)


@torch.no_grad()
def test_computes_in_the_dtype_asked_for_whatever_the_weights_are(model):
    ids, pixels = example_inputs(model.config, 1)
    exact = model(ids, pixels).logits
    assert model.compute_dtype == torch.float32
    model.compute_dtype = torch.bfloat16
    mixed = model(ids, pixels)
    assert mixed.logits.dtype == mixed.hidden.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert (mixed.logits - exact).norm() / exact.norm() < 0.2
    model.compute_dtype = None
    assert model.to(torch.bfloat16).compute_dtype == torch.bfloat16
    assert model(ids, pixels).logits.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["tiny", "deepseek_vl_1_3b", "deepseek_vl_7b"])
def test_every_parameter_is_in_exactly_one_part(name):
    with torch.device("meta"):
        model = DeepSeekVL(preset(name))
    parts = model.parts()
    assert set(parts) == {"sam", "siglip", "adaptor", "language"}
    identities = [id(parameter) for part in parts.values() for parameter in part]
    assert sorted(identities) == sorted(id(parameter) for parameter in model.parameters())
    assert any(parameter is model.lm_head.weight for parameter in parts["language"])
    if model.vision.sam:
        assert any(parameter is model.vision.downsample.alpha for parameter in parts["adaptor"])
        assert any(parameter is model.vision.sam.skip_neck.conv1.weight for parameter in parts["sam"])


def test_a_tied_head_is_the_embeddings_weight():
    config = preset("tiny")
    config = dataclasses.replace(config, language=dataclasses.replace(config.language, tie_embeddings=True))
    model = DeepSeekVL(config)
    assert model.lm_head.weight is model.language.embed_tokens.weight
    assert sum(part.numel() for part in model.parts()["language"]) == sum(
        p.numel() for p in model.language.parameters()
    )


def test_initial_weights_depend_on_the_seed_alone():
    first, second, third = (DeepSeekVL(preset("tiny")) for _ in range(3))
    for model, seed in ((first, 1), (second, 1), (third, 2)):
        init_weights(model, seed)
    for (name, a), b, c in zip(first.named_parameters(), second.parameters(), third.parameters(), strict=True):
        assert torch.equal(a, b), name
        assert a.ndim == 1 or not torch.equal(a, c), name
    assert first.vision.downsample.alpha == 0
    assert first.language.layers[0].self_attn.q_proj.weight.std().item() == pytest.approx(0.0791, rel=0.1)
    assert first.language.layers[0].self_attn.o_proj.weight.std().item() == pytest.approx(0.0395, rel=0.1)
    assert first.vision.sam.blocks[0].attn.rel_pos_h.std() > 0


def test_placeholders_and_images_must_match(model):
    ids, pixels = example_inputs(model.config, 2)
    with pytest.raises(ValueError, match=r"hold 32 image placeholders \(id 3\), but 1 images need 16, 16 each"):
        model(ids, pixels[:1])
    with pytest.raises(ValueError, match="hold 32 image placeholders .* but 0 images need 0"):
        model(ids)
    with pytest.raises(ValueError, match="hold 31 image placeholders .* but 2 images need 32"):
        model(ids.masked_fill(torch.arange(ids.shape[1]) == 12, 5), pixels)
    for shape in ((2, 15, 64), (2, 16, 65), (32, 64)):
        given = re.escape(f"image_features are {shape}; this model needs (num_images, 16, 64)")
        with pytest.raises(ValueError, match=given):
            model(ids, image_features=torch.zeros(shape))
    with pytest.raises(ValueError, match="not both"):
        model(ids, pixels, image_features=model.encode_images(pixels))


@pytest.mark.parametrize("pixels", [torch.zeros(1, 3, 64, 64), torch.zeros(1, 3, 160, 160, dtype=torch.uint8)])
def test_pixels_are_floats_of_the_models_size(model, pixels):
    with pytest.raises(ValueError, match=r"this model reads \(num_images, 3, 160, 160\) of float"):
        model.encode_images(pixels)


def test_a_mean_over_no_labels_is_an_error(model):
    ids = torch.randint(4, 512, (1, 5))
    with pytest.raises(ValueError, match="All 5 labels are masked"):
        model(ids, labels=torch.full_like(ids, -100))
    with pytest.raises(ValueError, match="All 5 labels are masked"):  # the first id is predicted by nothing
        model(ids, labels=torch.full_like(ids, -100).index_fill(1, torch.tensor(0), 7))
    assert model(ids, labels=torch.full_like(ids, -100), loss_reduction="sum").loss == 0


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("name", ["labels", "positions"])
def test_labels_and_positions_have_the_shape_of_the_ids(model, name, masked):
    ids = torch.randint(4, 512, (2, 6))
    mask = torch.ones_like(ids) if masked else None
    for shape in ((3, 4), (2, 5), (6,)):
        given = re.escape(f"{name} is {shape}; input_ids (2, 6) need the same shape")
        with pytest.raises(ValueError, match=given):
            model(ids, attention_mask=mask, **{name: torch.ones(shape, dtype=torch.long)})


def test_an_attention_mask_has_the_shape_of_the_ids_and_stands_alone(model):
    ids = torch.randint(4, 512, (2, 5))
    with pytest.raises(ValueError, match=r"attention_mask is \(2, 4\); input_ids \(2, 5\)"):
        model(ids, attention_mask=torch.ones(2, 4))
    with pytest.raises(ValueError, match="neither cu_seqlens nor a memory"):
        model(ids, attention_mask=torch.ones(2, 5), cu_seqlens=torch.tensor([0, 5], dtype=torch.int32))
    with pytest.raises(ValueError, match="a memory needs positions"):
        model(ids, memory=RecordingMemory())


@pytest.mark.parametrize("ids", [torch.zeros(4, dtype=torch.long), torch.zeros(1, 4), torch.zeros(1, 1, 4).int()])
def test_ids_are_rows_of_integers(ids):
    model = DeepSeekVL(preset("tiny"))
    with pytest.raises(ValueError, match=r"input_ids are \(.*\) torch.\w+; they need to be \(B, T\) integers"):
        model(ids)
