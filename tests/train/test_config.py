"""Runs as data: what is refused, the schedules, and the paper's stages."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from toy_data import captions, mixture, texts

from vlcore import overrides
from vlcore.config import preset
from vlcore.train import (
    Stage,
    TrainConfig,
    adaptor_warmup,
    joint_pretraining,
    learning_rate,
    supervised_finetuning,
    weighted,
)
from vlcore.train.description import describe
from vlcore.train.stages import FINETUNING_PERCENT, PRETRAINING_PERCENT


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("trains", (), r"trains \(\) must name one or more of"),
        (
            "trains",
            ("vision",),
            r"trains is \('vision',\) \(tuple\); it must be \('sam' or 'siglip' or 'adaptor' or 'lan",
        ),
        (
            "trains",
            "adaptor",
            r"trains is 'adaptor'; it must be \('sam' or 'siglip' or 'adaptor' or 'language', \.\.\.\)",
        ),
        ("steps", 1e4, r"steps is 10000.0 \(float\); it must be int\."),
        ("steps", True, r"steps is True \(bool\); it must be int\."),
        ("packing", "no", r"packing is 'no'; it must be bool\."),
        ("packing", 1, r"packing is 1 \(int\); it must be bool\."),
        ("learning_rate", 10**400, r"learning_rate is 10{70,}.* \(int\); it must be float\."),
        ("schedule", np.zeros(2), r"schedule is array\(.*\(ndarray\); it must be 'cosine' or"),
        ("text_ratio", "half", r"text_ratio is 'half'; it must be float or none\."),
        ("betas", (0.9,), r"betas is \(0.9,\) \(tuple\); it must be \(float, float\)\."),
        ("betas", (0.9, math.nan), r"betas is \(0.9, nan\); it must be in 0\.\.1"),
        ("weight_decay", math.inf, "weight_decay is inf; it must be finite and 0 or more"),
        ("steps", 0, "steps is 0; it must be at least 1"),
        ("batch_size", 0, "batch_size is 0; it must be at least 1"),
        ("micro_batch_size", -1, "micro_batch_size is -1; it must be at least 1"),
        ("learning_rate", math.nan, "learning_rate is nan; it must be finite and over 0"),
        ("clip_norm", 0.0, "clip_norm is 0.0; it must be finite and over 0"),
        ("warmup_steps", -1, "warmup_steps is -1; it must be 0 or more"),
        ("text_ratio", 1.5, r"text_ratio is 1.5; it must be in 0\.\.1"),
        ("modality_warmup", -0.1, r"modality_warmup is -0.1; it must be in 0\.\.1"),
        ("schedule", "linear", "schedule is 'linear'; it must be 'cosine' or 'step' or 'constant'"),
        ("supervise", "answer", "supervise is 'answer'; it must be 'text' or 'answers'"),
        ("overlong", "trunc", "overlong is 'trunc'; it must be 'skip' or 'truncate'"),
        ("betas", (0.9, 1.0), r"betas is \(0.9, 1.0\); it must be in 0\.\.1"),
    ],
)
def test_a_stage_refuses_what_is_out_of_range(stage, field, value, message):
    with pytest.raises(ValueError, match=f"Stage 'only': {message}"):
        stage(**{field: value})


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("stages", (), "there are no stages"),
        ("keep", 0, "keep is 0; it must be at least 1"),
        ("checkpoint_every", 0, "checkpoint_every is 0; it must be at least 1, or None"),
        ("num_workers", -1, "num_workers is -1"),
        ("seed", -1, "seed is -1"),
        ("precision", "fp16", "precision is 'fp16'; it must be 'fp32' or 'bf16'"),
        ("max_bad_samples", 2.0, r"max_bad_samples is 2.0; it must be in 0\.\.1"),
        ("seed", 1.5, r"seed is 1.5 \(float\); it must be int\."),
        ("log_every", 1.5, r"log_every is 1.5 \(float\); it must be int\."),
        ("checkpoint_every", "often", r"checkpoint_every is 'often'; it must be int or none\."),
        ("stages", ("s",), r"stages is \('s',\) \(tuple\); it must be \(Stage, \.\.\.\)\."),
        ("model", None, r"model is None \(NoneType\); it must be VLConfig or str or path\."),
        ("on_stage_end", 3, r"on_stage_end is 3 \(int\); it must be Callable or none\."),
    ],
)
def test_a_run_refuses_what_is_out_of_range(stage, field, value, message):
    settings = {"model": "tiny", "stages": (stage(),), "output_dir": "x", field: value}
    with pytest.raises(ValueError, match=f"TrainConfig: {message}"):
        TrainConfig(**settings)


def test_lists_and_numpys_numbers_become_what_is_declared(stage, processor):
    listed = stage(trains=["language"], betas=[0.9, np.float64(0.5)], learning_rate=np.float32(0.5), steps=np.int64(3))
    config = TrainConfig(model="tiny", stages=[replace(listed, weight_decay=1)], output_dir="x")
    assert config == TrainConfig(model="tiny", stages=(replace(listed, weight_decay=1.0),), output_dir="x")
    (only,) = config.stages
    values = only.trains, only.betas, only.learning_rate, only.steps, only.weight_decay
    assert repr(values) == "(('language',), (0.9, 0.5), 0.5, 3, 1.0)"
    assert describe(config, preset("tiny"), processor)["stages"][0]["learning_rate"] == 0.5
    assert overrides.apply(config, ["stages.0.steps=1"]).stages[0].steps == 1
    assert stage(packing=np.True_).packing is True


def test_a_mixture_of_a_list_is_reached_by_overrides(stage):
    mix = replace(mixture(articles=1), entries=list(mixture(articles=1).entries))
    config = TrainConfig(model="tiny", stages=(replace(stage(), mixture=mix),), output_dir="x")
    changed = overrides.apply(config, ["stages.0.mixture.entries.0.weight=2"])
    assert changed.stages[0].mixture.entries[0].weight == 2.0 and mix.entries[0].weight == 1.0


def test_stages_need_names_of_their_own(stage):
    with pytest.raises(ValueError, match="each stage needs a name of its own"):
        TrainConfig(model="tiny", stages=(stage(), stage()), output_dir="x")


def test_fields_are_reached_by_overrides(stage):
    config = TrainConfig(model="tiny", stages=(stage(), stage(name="next")), output_dir="x")
    changes = ["stages.1.steps=10", "stages.0.trains=adaptor,language", "stages.1.mixture.entries.0.weight=2"]
    changed = overrides.apply(
        config, [*changes, "model=demo", "precision=bf16", "compile=true", "stages.0.text_ratio=1"]
    )
    assert changed.stages[1].steps == 10 and changed.stages[0].trains == ("adaptor", "language")
    assert changed.stages[1].mixture.entries[0].weight == 2.0 and changed.stages[0].text_ratio == 1.0
    assert (changed.model, changed.precision, changed.compile) == ("demo", "bf16", True)
    with pytest.raises(ValueError, match="Stage has no field 'stpes'; did you mean 'steps'"):
        overrides.apply(config, ["stages.0.stpes=3"])
    with pytest.raises(ValueError, match="given 'vision' .* but .*'sam' or 'siglip' or 'adaptor' or 'language'"):
        overrides.apply(config, ["stages.0.trains=vision"])


def test_cosine_falls_from_the_peak_to_a_tenth(stage):
    cosine = stage(schedule="cosine", steps=110, warmup_steps=10, learning_rate=2.0)
    rates = [learning_rate(cosine, step) for step in range(110)]
    assert rates[:10] == pytest.approx([0.2 * (step + 1) for step in range(10)])
    assert rates[10] == 2.0 and rates[60] == pytest.approx(2 * 0.55)
    assert rates[10:] == sorted(rates[10:], reverse=True) and rates[-1] == pytest.approx(0.2, rel=0.01)


def test_step_schedule_goes_down_at_80_and_90_percent(stage):
    step = stage(schedule="step", steps=100, warmup_steps=4, learning_rate=1.0)
    rates = [learning_rate(step, at) for at in (0, 3, 4, 79, 80, 89, 90, 99)]
    assert rates == pytest.approx([0.25, 1, 1, 1, 0.316, 0.316, 0.1, 0.1])


def test_constant_schedule_and_a_warmup_longer_than_the_stage(stage):
    assert learning_rate(stage(schedule="constant", learning_rate=3.0), 2) == 3.0
    for schedule in ("cosine", "step", "constant"):
        short = stage(steps=4, warmup_steps=128, learning_rate=1.28, schedule=schedule)
        assert [learning_rate(short, step) for step in range(4)] == pytest.approx([0.32, 0.64, 0.96, 1.28])


@pytest.mark.parametrize(
    "size, rates, steps, batches",
    [
        ("1.3B", (1e-3, 3e-5, 2e-5), (15000, 96000, 10000), (256, 1024, 256)),
        ("7B", (1e-3, 4.2e-5, 2e-5), (15000, 42000, 10000), (256, 2304, 256)),
    ],
)
def test_the_papers_table(size, rates, steps, batches):
    both = mixture(captions=1, articles=1)
    stages = (adaptor_warmup(both, size), joint_pretraining(both, size), supervised_finetuning(both, size))
    assert tuple(stage.learning_rate for stage in stages) == rates
    assert tuple(stage.steps for stage in stages) == steps
    assert tuple(stage.batch_size for stage in stages) == batches
    assert [stage.sequence_length for stage in stages] == [512 + 576, 4096, 4096]
    assert [stage.packing for stage in stages] == [False, True, False]
    assert [stage.schedule for stage in stages] == ["cosine", "step", "cosine"]
    assert [stage.warmup_steps for stage in stages] == [128, 2000, 256]
    assert [stage.supervise for stage in stages] == ["text", "text", "answers"]
    assert [set(stage.trains) for stage in stages] == [
        {"adaptor"},
        {"adaptor", "language"},
        {"adaptor", "language", "siglip"},
    ]
    assert "sam" in supervised_finetuning(both, size, train_sam=True).trains
    for stage in stages:
        assert (stage.betas, stage.weight_decay, stage.clip_norm, stage.eps) == ((0.9, 0.95), 0.0, 1.0, 1e-8)
    assert (stages[1].text_ratio, stages[1].modality_warmup, stages[1].grouping) == (0.7, 0.1, True)
    assert joint_pretraining(both, size, finetuning_share=0.02).text_ratio == pytest.approx(0.68)


def test_the_papers_mixtures_sum_up_and_become_weights():
    assert sum(PRETRAINING_PERCENT.values()) == pytest.approx(100)
    assert sum(FINETUNING_PERCENT.values()) == pytest.approx(100)
    mix = weighted(PRETRAINING_PERCENT, {"caption": captions(), "text": texts()})
    assert [entry.weight for entry in mix.entries] == [11.1, 70.0]
    assert mix.text_share == pytest.approx(70 / 81.1)


def test_the_paper_has_two_sizes_and_its_own_categories():
    both = mixture(captions=1, articles=1)
    with pytest.raises(ValueError, match="trains 1.3B and 7B, not '13B'"):
        adaptor_warmup(both, "13B")
    with pytest.raises(ValueError, match="finetuning_share 0.8 must be in"):
        joint_pretraining(both, finetuning_share=0.8)
    with pytest.raises(ValueError, match=r"no category \['video'\]"):
        weighted(PRETRAINING_PERCENT, {"video": captions()})


def test_a_packed_step_draws_a_fixed_number_of_samples(stage):
    assert stage(batch_size=8).samples_per_step == 8
    assert stage(batch_size=8, packing=True, samples_per_sequence=3).samples_per_step == 24


def test_a_stage_is_changed_by_replace_and_written_as_json(stage, processor):
    config = TrainConfig(model="tiny", stages=(replace(stage(), steps=9),), output_dir="x")
    described = describe(config, preset("tiny"), processor)
    assert described["stages"][0]["steps"] == 9 and json.loads(json.dumps(described)) == described
    assert isinstance(config.stages[0], Stage)
