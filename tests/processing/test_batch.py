import pytest
import torch
from PIL import Image

from vlcore.processing import IGNORE_INDEX, Encoded, collate, pack

RED = Image.new("RGB", (20, 10), "red")


@pytest.fixture
def samples(processor):
    question = {"role": "user", "content": [{"type": "image", "image": RED}, {"type": "text", "text": "What is it?"}]}
    return [
        processor.encode_conversation([question, {"role": "assistant", "content": "Red."}], supervise=True),
        processor.encode_document(["The cat sat on the mat."]),
        processor.encode_document(["图 ", RED, " is red ", RED]),
    ]


def test_right_padding_needs_no_mask(processor, samples):
    batch = collate(samples, processor, sample_ids=["a", "b", "c"])
    longest = max(map(len, samples))
    assert batch.input_ids.shape == batch.labels.shape == (3, longest)
    assert batch.attention_mask is None and batch.positions is None and batch.cu_seqlens is None
    for row, sample in enumerate(samples):
        assert torch.equal(batch.input_ids[row, : len(sample)], sample.input_ids)
        assert torch.equal(batch.labels[row, : len(sample)], sample.labels)
        assert (batch.input_ids[row, len(sample) :] == processor.control.eos).all()
        assert (batch.labels[row, len(sample) :] == IGNORE_INDEX).all()
    assert batch.sample_ids == ("a", "b", "c") and batch.lengths == tuple(map(len, samples))
    assert batch.num_tokens == sum(map(len, samples)) and batch.num_images == 3
    assert batch.num_supervised == sum(int((sample.labels != IGNORE_INDEX).sum()) for sample in samples)
    assert batch.pixels.shape == (3, 3, 160, 160) and torch.equal(batch.pixels[0], processor.pixels([RED])[0])


def test_left_padding_has_a_mask_and_positions(processor, samples):
    batch = collate(samples, processor, side="left", pad_id=0)
    for row, sample in enumerate(samples):
        start = batch.input_ids.shape[1] - len(sample)
        assert torch.equal(batch.input_ids[row, start:], sample.input_ids)
        assert (batch.input_ids[row, :start] == 0).all()
        assert batch.attention_mask[row].tolist() == [False] * start + [True] * len(sample)
        assert batch.positions[row].tolist() == [0] * start + list(range(len(sample)))


def test_packing(processor, samples):
    batch = pack(samples, processor, sample_ids=["a", "b", "c"], length=1000)
    assert torch.equal(batch.input_ids[0], torch.cat([sample.input_ids for sample in samples]))
    assert torch.equal(batch.labels[0], torch.cat([sample.labels for sample in samples]))
    assert batch.positions.tolist() == [[i for sample in samples for i in range(len(sample))]]
    a, b, c = map(len, samples)
    assert batch.cu_seqlens.tolist() == [0, a, a + b, a + b + c] and batch.cu_seqlens.dtype == torch.int32
    assert batch.num_tokens == a + b + c and batch.num_images == 3 and batch.attention_mask is None


def test_packing_to_a_fixed_length(processor, samples):
    total = sum(map(len, samples))
    batch = pack(samples, processor, length=total + 5, fill=True)
    assert batch.input_ids.shape == (1, total + 5) and batch.cu_seqlens.tolist()[-2:] == [total, total + 5]
    assert batch.labels[0, total:].tolist() == [IGNORE_INDEX] * 5 and batch.positions[0, total:].tolist() == [*range(5)]
    assert (batch.num_tokens, batch.lengths) == (total, tuple(map(len, samples)))
    assert pack(samples, processor, length=total, fill=True).cu_seqlens.tolist()[-1] == total


def test_first_tokens_are_predicted_by_nothing(processor):
    ids = torch.tensor([5, 6, 7])
    samples = [Encoded(ids, ids, []), Encoded(ids, ids, [])]
    assert pack(samples, processor).num_supervised == collate(samples, processor).num_supervised == 4
    assert samples[0].labels.tolist() == [5, 6, 7]


def test_batches_without_images_have_no_pixels(processor, samples):
    batch = collate(samples[1:2], processor)
    assert batch.pixels is None and batch.num_images == 0


def test_to_a_device(processor, samples):
    batch = pack(samples, processor, sample_ids="abc").to("meta")
    tensors = (batch.input_ids, batch.labels, batch.pixels, batch.positions, batch.cu_seqlens)
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert batch.attention_mask is None and batch.sample_ids == ("a", "b", "c") and batch.num_tokens > 0


@pytest.mark.parametrize("make", [collate, pack])
def test_samples_that_do_not_fit(processor, samples, make):
    with pytest.raises(ValueError, match=rf"{make.__name__}: there are no samples"):
        make([], processor)
    with pytest.raises(ValueError, match=rf"{make.__name__}: sample 'b' has {len(samples[1])} tokens; the length is 5"):
        make(samples[1:2], processor, length=5, sample_ids=["b"])
    with pytest.raises(ValueError, match="2 sample_ids do not name 3 samples"):
        make(samples, processor, sample_ids=["a", "b"])
    broken = Encoded(samples[0].input_ids, samples[0].labels, [RED, RED])
    with pytest.raises(
        ValueError, match=r"sample 1: Encoded: 16 image placeholders \(id 3\) do not match 2 images of 16"
    ):
        make([samples[1], broken], processor)


def test_arguments_that_cannot_be(processor, samples):
    with pytest.raises(ValueError, match="side is 'up'; it must be 'left' or 'right'"):
        collate(samples, processor, side="up")
    total = sum(map(len, samples))
    with pytest.raises(ValueError, match=f"3 samples have {total} tokens; the row's length is {total - 1}"):
        pack(samples, processor, length=total - 1)
    with pytest.raises(ValueError, match="fill=True needs a length"):
        pack(samples, processor, fill=True)


@pytest.mark.parametrize(
    "ids, labels, message",
    [
        (torch.zeros(3).long(), torch.zeros(4).long(), r"input_ids \(3,\) torch.int64 and labels \(4,\) torch.int64"),
        (torch.zeros(1, 3).long(), torch.zeros(1, 3).long(), r"input_ids \(1, 3\)"),
        (torch.zeros(3), torch.zeros(3).long(), r"input_ids \(3,\) torch.float32"),
        (torch.zeros(0).long(), torch.zeros(0).long(), "it has no tokens"),
    ],
)
def test_malformed_samples(ids, labels, message):
    with pytest.raises(ValueError, match=message):
        Encoded(ids, labels, [])
