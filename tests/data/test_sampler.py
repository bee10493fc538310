"""The draws of a stage: exact shares, every sample once an epoch, the same for any rank, worker or starting point."""

from collections import Counter

import numpy as np
import pytest
from toy_data import Listed, captions, mixture, texts

from vlcore.data import Entry, Mixture, Sampler
from vlcore.data.sampler import text_share


def sampler(mix=None, **settings):
    return Sampler(mix or mixture(captions=3, articles=7), **{"steps": 50, "samples_per_step": 8, **settings})


def all_draws(sampler):
    return [draw for step in range(sampler.steps) for draw in sampler.draws(step)]


def test_a_step_is_a_function_of_seed_stage_and_step():
    assert all_draws(sampler(seed=3)) == all_draws(sampler(seed=3))
    assert sampler(seed=3).draws(41) == all_draws(sampler(seed=3))[41 * 8 : 42 * 8]
    assert all_draws(sampler(seed=3)) != all_draws(sampler(seed=4))
    assert all_draws(sampler(seed=3)) != all_draws(sampler(seed=3, stage=1))


def test_more_steps_change_no_earlier_step():
    assert all_draws(sampler()) == all_draws(sampler(steps=90))[: 50 * 8]


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_ranks_share_a_step_without_overlap_and_agree_on_its_modality(world):
    whole = sampler()
    ranks = [sampler(rank=rank, world=world) for rank in range(world)]
    for step in range(whole.steps):
        assert [draw for rank in ranks for draw in rank.draws(step)] == whole.draws(step)
        assert {rank.modality(step) for rank in ranks} == {whole.modality(step)}


def test_a_part_of_a_steps_draws_is_that_part():
    assert sampler().draws(5, 2, 6) == sampler().draws(5)[2:6]


@pytest.mark.parametrize("grouping", [True, False])
def test_every_sample_comes_once_an_epoch_in_an_order_of_its_own(grouping):
    source = texts(count=20)
    draws = all_draws(
        sampler(Mixture(entries=(Entry(source=source),)), steps=20, samples_per_step=6, grouping=grouping)
    )
    by_position = [draw.index for draw in sorted(draws, key=lambda draw: draw.position)]
    assert [draw.position for draw in sorted(draws, key=lambda draw: draw.position)] == list(range(120))
    epochs = [tuple(by_position[i : i + 20]) for i in range(0, 120, 20)]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert len(set(epochs)) == len(epochs)


def test_weights_hold_exactly_within_a_modality_and_positions_have_no_gaps():
    names = {"a": 10.5, "b": 35.5, "c": 4.1, "d": 0.4}
    entries = tuple(Entry(source=Listed(n, "text", texts(count=30).samples), weight=w) for n, w in names.items())
    for total in (7, 100, 1000):
        draws = all_draws(sampler(Mixture(entries=entries), steps=total, samples_per_step=1))
        counts = Counter(draw.entry for draw in draws)
        for entry, weight in enumerate(names.values()):
            assert abs(counts[entry] - total * weight / sum(names.values())) <= len(names) / 2
            positions = [draw.position for draw in draws if draw.entry == entry]
            assert positions == list(range(counts[entry]))


def test_grouping_makes_every_step_one_modality_at_the_ratio_asked():
    mix = mixture(captions=1, articles=1)
    grouped = sampler(mix, steps=2000, text_ratio=0.7)
    for step in range(100):
        kinds = {mix.entries[draw.entry].source.modality for draw in grouped.draws(step)}
        assert kinds == {grouped.modality(step)}
    share = np.mean([grouped.modality(step) == "text" for step in range(2000)])
    assert abs(share - 0.7) < 4 * np.sqrt(0.7 * 0.3 / 2000)


def test_without_grouping_the_ratio_holds_by_samples_and_steps_are_mixed():
    mix = mixture(captions=1, articles=1)
    mixed = sampler(mix, steps=100, samples_per_step=10, text_ratio=0.7, grouping=False)
    counts = Counter(mix.entries[draw.entry].source.modality for draw in all_draws(mixed))
    assert counts == {"text": 700, "multimodal": 300}
    assert mixed.modality(50) == "mixed"


def test_without_a_ratio_the_weights_decide_between_modalities():
    mixed = sampler(mixture(captions=1, articles=3), steps=100, samples_per_step=8, grouping=False)
    assert Counter(draw.entry for draw in all_draws(mixed)) == {1: 600, 0: 200}


def test_the_share_of_text_falls_linearly_and_stays():
    share = text_share(mixture(captions=3, articles=7), 1000, 0.7, 0.1)
    assert share[0] == 1
    np.testing.assert_allclose(share[:100], 1 - 0.3 * np.arange(100) / 100)
    np.testing.assert_allclose(share[100:], 0.7)


@pytest.mark.parametrize(
    "sources, settings, message",
    [
        ([texts()], {"text_ratio": 0.5}, "text_ratio 0.5 needs images"),
        ([captions()], {"text_ratio": 0.5}, "text_ratio 0.5 with modality_warmup 0.0 needs text"),
        ([captions()], {"modality_warmup": 0.1}, "needs text, but no source is text"),
        ([texts(), captions()], {"text_ratio": 1.5}, "must be in 0..1"),
        ([texts()], {"rank": 2, "world": 2}, "rank 2 is not in 0..1"),
        ([texts()], {"world": 9}, "8 samples a step leave some of 9 ranks without any"),
    ],
)
def test_what_cannot_be_drawn_is_refused(sources, settings, message):
    with pytest.raises(ValueError, match=message):
        sampler(Mixture(entries=tuple(Entry(source=source) for source in sources)), **settings)
    with pytest.raises(ValueError, match=r"step 50 is not in 0\.\.49"):
        sampler().draws(50)


def test_replacements_and_augmentation_are_keyed_by_the_draw():
    one, two = sampler(seed=1), sampler(seed=1)
    first, second = one.draws(0)[:2]
    assert one.replacement(first, 1) == two.replacement(first, 1)
    assert len({one.replacement(first, attempt).index for attempt in range(1, 20)}) > 5
    assert one.augmentation(first).random() == two.augmentation(first).random()
    assert one.augmentation(first).random() != one.augmentation(second).random()


@pytest.mark.parametrize(
    "entries, message",
    [
        ((), "there are no entries"),
        ((Entry(source=texts()), Entry(source=texts())), "each source needs a name of its own"),
    ],
)
def test_bad_mixtures_are_refused(entries, message):
    with pytest.raises(ValueError, match=message):
        Mixture(entries=entries)


@pytest.mark.parametrize("weight", [0, -1, float("nan"), float("inf")])
def test_bad_weights_are_refused(weight):
    with pytest.raises(ValueError, match="'articles': weight .* must be finite and over zero"):
        Entry(source=texts(), weight=weight)


def test_bad_sources_are_refused():
    with pytest.raises(ValueError, match="'articles': the source is empty"):
        Entry(source=texts(count=0))
    with pytest.raises(ValueError, match="modality 'audio' is none of"):
        Entry(source=Listed("x", "audio", [1]))
