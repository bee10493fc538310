"""Batches out of a mixture: replaced bad samples, packing, workers, augmentation."""

import os
import subprocess
import sys
import time
from functools import partial
from multiprocessing import active_children
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageOps
from toy_data import Listed, captions, instructions, mixture, square, texts

from vlcore.data import BadSample, Encoder, Entry, Loader, Mixture, Overlong, Sample, Sampler

PLACEHOLDER = 3
TESTS = Path(__file__).parent.parent


def encoder(processor, **settings):
    return Encoder(processor=processor, **{"sequence_length": 128, **settings})


def loader(processor, mix, *, steps=4, samples=6, sequence_length=128, micro_batch_size=4, workers=0, **settings):
    sampler = Sampler(mix, steps=steps, samples_per_step=samples, seed=5)
    return Loader(
        sampler,
        encoder(processor, sequence_length=sequence_length),
        micro_batch_size=micro_batch_size,
        num_workers=workers,
        **settings,
    )


def of(*sources):
    return Mixture(entries=tuple(Entry(source=source) for source in sources))


def same(one, two):
    assert (one.step, one.is_last, one.samples, one.rejections) == (two.step, two.is_last, two.samples, two.rejections)
    for a, b in zip(one.batches, two.batches, strict=True):
        assert a.sample_ids == b.sample_ids
        torch.testing.assert_close(a.input_ids, b.input_ids, rtol=0, atol=0)
        torch.testing.assert_close(a.labels, b.labels, rtol=0, atol=0)
        if a.pixels is not None:
            torch.testing.assert_close(a.pixels, b.pixels, rtol=0, atol=0)


def test_a_step_comes_in_micro_batches(processor):
    portions = list(loader(processor, of(captions())).portions())
    assert [(p.step, p.is_last, len(p.batches[0].input_ids)) for p in portions[:4]] == [
        (0, False, 4),
        (0, True, 2),
        (1, False, 4),
        (1, True, 2),
    ]
    assert len(portions) == 8
    batch = portions[0].batches[0]
    assert batch.pixels.shape == (4, 3, 160, 160)
    assert batch.attention_mask is None and batch.cu_seqlens is None
    assert portions[0].samples == {"captions": 4} and portions[0].tokens == {"captions": batch.num_tokens}
    assert all(name.startswith("captions/captions-") for name in batch.sample_ids)


def shifted(image: Image.Image, generator) -> Image.Image:
    return ImageOps.expand(image, int(generator.integers(1, 9)))


@pytest.mark.parametrize("packing", [False, True])
def test_workers_and_the_starting_point_change_nothing(processor, packing):
    entries = (Entry(source=captions(), augment=shifted), Entry(source=texts()))
    broken = Entry(source=Listed("broken", "text", [None, *texts("broken", 3).samples]))
    make = partial(loader, processor, Mixture(entries=(*entries, broken)), packing=packing)
    whole = list(make().portions())
    assert any(p.rejections for p in whole)
    with_workers = list(make(workers=2).portions())
    resumed = list(make(workers=1).portions(2))
    for one, two in zip(whole, with_workers, strict=True):
        same(one, two)
    for one, two in zip(whole[-len(resumed) :], resumed, strict=True):
        same(one, two)
    assert resumed[0].step == 2


def test_loading_leaves_torchs_generator_alone(processor):
    before = torch.get_rng_state()
    list(loader(processor, of(texts()), workers=1, steps=1).portions())
    assert torch.equal(before, torch.get_rng_state())


def test_a_portion_is_pinned_with_every_tensor_of_its_batches(processor, monkeypatch):
    portion = next(loader(processor, of(captions()), steps=1).portions())
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor + 1)
    pinned = portion.pin_memory()
    assert (pinned.samples, pinned.step, pinned.is_last) == (portion.samples, portion.step, portion.is_last)
    (before,), (after,) = portion.batches, pinned.batches
    assert after.sample_ids == before.sample_ids and after.positions is None
    for name in ("input_ids", "labels", "pixels"):
        assert torch.equal(getattr(after, name), getattr(before, name) + 1)


def test_packing_fills_rows_up_to_the_budget_and_parts_samples(processor):
    mix = of(texts(length=30))
    portions = list(
        loader(processor, mix, packing=True, micro_batch_size=2, samples=9, samples_per_sequence=3).portions()
    )
    assert [len(p.batches) >= 1 for p in portions] == [True] * 8
    for batch in (batch for portion in portions for batch in portion.batches):
        assert batch.input_ids.shape[0] == 1 and batch.num_tokens == batch.input_ids.shape[1] <= 256
        starts = batch.cu_seqlens[:-1].long()
        assert (batch.input_ids[0, starts] == 1).all()  # BOS
        assert (batch.positions[0, starts] == 0).all()
    assert sum(len(b.sample_ids) for p in portions for b in p.batches) == 4 * 9
    assert sum(p.samples.total() for p in portions) == 4 * 9


def test_bad_samples_are_replaced_by_good_ones_of_the_same_source_and_named(processor):
    source = Listed("half", "text", [None, *texts("half", 8).samples[1:]])
    portions = list(loader(processor, of(source), steps=8).portions())
    assert all(len(b.sample_ids) == b.input_ids.shape[0] for p in portions for b in p.batches)
    assert sum(p.samples["half"] for p in portions) == 48
    rejected = {r for p in portions for r in p.rejections}
    assert {(r.source, r.sample_id, r.reason) for r in rejected} == {("half", "half-0", "it is broken")}


def test_a_source_without_good_samples_is_a_failure_that_says_so(processor):
    portion = next(loader(processor, of(Listed("ruin", "text", [None] * 9))).portions())
    assert portion.batches == []
    assert "20 samples in a row drawn from 'ruin' are bad; of the last one, 'ruin-" in portion.failure
    assert "it is broken" in portion.failure


def text_sample(text, **keys):
    return Sample(id="s", modality="text", document=[text], **keys)


def test_documents_learn_their_text_and_not_their_images(processor):
    encoded, cut = encoder(processor)(captions()[0])
    is_image = encoded.input_ids == PLACEHOLDER
    assert is_image.sum() == 16 and cut == 0
    assert (encoded.labels[is_image] == -100).all() and encoded.labels[0] == -100
    assert torch.equal(encoded.labels[~is_image][1:], encoded.input_ids[~is_image][1:])


def test_conversations_learn_answers_or_all_text(processor):
    sample = instructions()[0]
    answers, _ = encoder(processor, supervise="answers")(sample)
    everything, _ = encoder(processor, supervise="text")(sample)
    answer = sample.conversation[1]["content"]
    learned = answers.labels[answers.labels != -100]
    assert processor.decode(learned) == f" {answer}" and learned[-1] == 2
    assert torch.equal(answers.input_ids, everything.input_ids)
    is_image = everything.input_ids == PLACEHOLDER
    assert ((everything.labels == -100) == is_image).sum() == len(is_image) - 1  # BOS


def test_overlong_documents_are_skipped_or_cut(processor):
    sample = text_sample("a b c d e f g h")
    length = len(processor.encode_document(["a b c d e f g h"]))
    with pytest.raises(BadSample, match=f"has {length} tokens, over the sequence length of 6"):
        encoder(processor, sequence_length=6)(sample)
    encoded, cut = encoder(processor, sequence_length=6, overlong="truncate")(sample)
    assert (len(encoded), cut) == (6, length - 6)
    with pytest.raises(BadSample, match="over the sequence length of 6"):
        encoder(processor, sequence_length=6, overlong="truncate")(captions()[0])
    with pytest.raises(BadSample, match="over the sequence length of 6"):
        encoder(processor, sequence_length=6, overlong="truncate")(instructions()[0])


def chat(*turns, modality="text"):
    """A conversation of the users' turns given, each answered."""
    answer = {"role": "assistant", "content": "a cat sat under three trees"}
    return Sample(
        id="s",
        modality=modality,
        conversation=[m for turn in turns for m in ({"role": "user", "content": turn}, answer)],
    )


@pytest.mark.parametrize("supervise", ["answers", "text"])
def test_an_overlong_conversation_keeps_the_whole_turns_that_fit(processor, supervise):
    pictures = [[{"type": "image", "image": square(i)}, {"type": "text", "text": "What is this?"}] for i in range(3)]
    whole, short = chat(*pictures, modality="multimodal"), chat(*pictures[:2], modality="multimodal")
    plain = encoder(processor, sequence_length=400, supervise=supervise)
    expected, everything = plain(short)[0], plain(whole)[0]
    for room in (len(expected), len(expected) + 1, len(everything) - 1):
        cutting = encoder(processor, sequence_length=room, supervise=supervise, overlong="truncate")
        encoded, cut = cutting(whole)
        assert torch.equal(encoded.input_ids, expected.input_ids) and torch.equal(encoded.labels, expected.labels)
        assert len(encoded.images) == 2 and cut == len(everything) - len(expected)


def test_a_conversation_without_an_answer_or_an_image_that_fits_is_overlong(processor):
    late = chat("hi", [{"type": "image", "image": square(0)}], modality="multimodal")
    first = len(encoder(processor)(chat("hi"))[0])
    for sample, room in ((chat("hi", "and?"), first - 1), (late, first + 3)):
        with pytest.raises(Overlong, match=f"over the sequence length of {room}"):
            encoder(processor, sequence_length=room, overlong="truncate")(sample)
    encoded, _ = encoder(processor, sequence_length=first, overlong="truncate")(chat("hi", "and?"))
    assert len(encoded) == first


def test_a_document_of_whose_text_nothing_fits_is_overlong(processor):
    sample = Sample(id="s", modality="multimodal", document=[square(0), square(1), "a b c"])
    with pytest.raises(Overlong, match="over the sequence length of 33"):
        encoder(processor, sequence_length=33, overlong="truncate")(sample)
    encoded, _ = encoder(processor, sequence_length=34, overlong="truncate")(sample)
    assert len(encoded) == 34


def test_overlong_samples_are_counted_apart_and_patience_with_them_is_longer(processor):
    short, long = texts("mixed", 1).samples, texts("mixed", 30, length=300).samples
    portions = list(loader(processor, of(Listed("mixed", "text", short + long)), steps=2).portions())
    assert all(portion.failure is None for portion in portions)
    assert max(portion.overlong_samples for portion in portions) > 20
    assert all(portion.overlong_samples == len(portion.rejections) for portion in portions)
    hopeless = next(loader(processor, of(Listed("long", "text", long)), steps=1).portions())
    assert "200 samples in a row drawn from 'long' are too long; of the last one, 'mixed-" in hopeless.failure


USER = {"role": "user", "content": "And now?"}


@pytest.mark.parametrize(
    "sample, settings, reason",
    [
        (text_sample("words"), {"supervise": "answers"}, "it is a document, but only answers are supervised"),
        (Sample(id="s", modality="text", document=[square(0), "x"]), {}, "has 1 images, but its source is text"),
        (Sample(id="s", modality="multimodal", document=["x"]), {}, "has 0 images, but its source is multimodal"),
        (Sample(id="s", modality="multimodal", document=[b"no image", "x"]), {}, "image"),
        (Sample(id="s", modality="multimodal", document=[b"", "x"]), {}, "empty"),
        (
            Sample(id="s", modality="text", conversation=[{"role": "user", "content": "x"}]),
            {"supervise": "answers"},
            r"all \d+ labels are masked",
        ),
        (Sample(id="s", modality="text", conversation=[{"role": "user"}]), {}, "content"),
        (Sample(id="s", modality="text", conversation=[*chat("x").conversation, USER]), {}, "last turn is no answer"),
        (Sample(id="s", modality="text", conversation=[USER, {"role": "assistant", "content": " "}]), {}, "no answer"),
    ],
)
def test_what_cannot_be_learned_says_why(processor, sample, settings, reason):
    with pytest.raises(BadSample, match=reason) as caught:
        encoder(processor, **settings)(sample)
    assert caught.value.sample_id == "s"


def test_truncated_and_missing_image_files_are_named(processor, tmp_path):
    square(0).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:60])
    for name in ("cut.png", "gone.png"):
        sample = Sample(id="s", modality="multimodal", document=[tmp_path / name, "x"])
        with pytest.raises(BadSample, match=name):
            encoder(processor)(sample)


def test_a_sample_is_one_thing():
    with pytest.raises(ValueError, match="'s' must be either a document or a conversation"):
        Sample(id="s", modality="text")


def failing(image, generator):
    if generator.random() < 0.3:
        raise KeyError("low")
    return image


@pytest.mark.parametrize("workers", [0, 1])
def test_a_sample_at_which_augmentation_fails_is_bad(processor, workers):
    mix = Mixture(entries=(Entry(source=captions(), augment=failing),))
    portions = list(loader(processor, mix, workers=workers, steps=8).portions())
    assert sum(portion.samples["captions"] for portion in portions) == 48
    rejections = [rejection for portion in portions for rejection in portion.rejections]
    assert {(r.source, r.reason) for r in rejections} == {("captions", "its augmentation failed: KeyError: 'low'")}
    assert all(rejection.sample_id.startswith("captions-") for rejection in rejections)


@pytest.mark.parametrize(
    "change, shown",
    [
        (lambda image: image.convert("L"), "<PIL.Image.Image image mode=L"),
        (lambda image: image.crop((0, 0, 0, 5)), "<PIL.Image.Image image mode=RGB size=0x5"),
        (lambda image: None, "None"),
    ],
)
def test_augmentation_that_makes_no_image_is_named(processor, change, shown):
    with pytest.raises(BadSample, match=f"its augmentation returned {shown}.*, which is no RGB image with pixels"):
        encoder(processor)(captions()[0], change)


class Failing(Listed):
    def __getitem__(self, index):
        raise ValueError("a bug")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_source_that_fails_is_no_bad_sample(processor, workers):
    portions = loader(processor, of(Failing("mine", "text", [None] * 3)), workers=workers, steps=1).portions()
    with pytest.raises(RuntimeError, match=r"The source 'mine' failed at \[\d\]: ValueError: a bug"):
        next(portions)


class Slowing(Listed):
    read = 0

    def __getitem__(self, index):
        self.read += 1
        if self.read > 1:
            time.sleep(60)
        return super().__getitem__(index)


def test_a_worker_is_not_waited_for_when_nobody_reads_on(processor):
    source, others = Slowing("slow", "text", texts().samples), {*active_children()}
    portions = loader(processor, of(source), samples=1, workers=1).portions()
    next(portions)
    [worker] = {*active_children()} - others
    begin = time.monotonic()
    portions.close()
    assert time.monotonic() - begin < 30
    # Its sample would take it a minute; torch 2.11 does not wait for what it ends.
    worker.join(20)
    assert not worker.is_alive()


RAISES = """
import torch
from small_tokenizer import small_tokenizer
from test_loader import loader, of
from toy_data import texts

from vlcore import Processor
from vlcore.config import preset

config = preset("tiny")
portions = loader(Processor(small_tokenizer(config), config), of(texts()), workers=2).portions()
next(portions)
raise MemoryError("of the user's")
"""


def test_a_program_that_fails_ends_its_workers():
    """A traceback keeps the portions until Python ends, which ends the workers and waits for them."""
    paths = os.pathsep.join([*map(str, (TESTS, TESTS / "data")), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", RAISES],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1 and done.stderr.endswith("MemoryError: of the user's\n")


def test_augmentation_changes_images_the_same_way_each_time(processor):
    plain = list(loader(processor, mixture(captions=1), steps=1).portions())
    changed = [
        list(loader(processor, Mixture(entries=(Entry(source=captions(), augment=shifted),)), steps=1).portions())
        for _ in range(2)
    ]
    same(changed[0][0], changed[1][0])
    assert not torch.equal(plain[0].batches[0].pixels, changed[0][0].batches[0].pixels)
