"""Checkpoints that are damaged or do not fit: named, with what is wrong, and never half read."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from vlcore.train import state as state_module


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["cut", "missing", "garbage"])
def test_a_damaged_checkpoint_is_named(run, stages, interrupted, name, damage):
    path = interrupted / name
    content = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes(content[: len(content) // 2] if damage == "cut" else b"\x00" * 100)
    with pytest.raises(ValueError, match=rf"{name} is damaged"):
        run(*stages)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors"])
def test_what_is_older_than_a_damaged_checkpoint_is_named_and_gone_on_from(run, stages, interrupted, name, tmp_path):
    tensors = load_file(interrupted / name)
    tensors.pop(next(key for key in tensors if key != state_module.RNG))
    save_file({**tensors, "other": torch.ones(1)}, interrupted / name)
    older = interrupted.with_name("step-00000003-done")
    with pytest.raises(ValueError, match=rf"{name} .* {older} is older and still there: delete {interrupted} to go on"):
        run(*stages)
    with pytest.raises(ValueError, match="is of another run") as other:
        run(*stages, seed=2)
    assert "is older" not in str(other.value)
    shutil.rmtree(interrupted)
    assert len(run(*stages).stages) == 3
    only = tmp_path / "run" / "checkpoints" / "step-00000010-done"
    shutil.rmtree(only.with_name("step-00000007-done"))
    (only / name).unlink()
    with pytest.raises(ValueError, match=rf"{name} is damaged: (?!.*is older)"):
        run(*stages)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s.update(format=99), r"state\.json is not a checkpoint of format 1"),
        (lambda s: s["progress"].pop("step"), r"state\.json is damaged: its progress has .*'global_step'"),
        (lambda s: s["progress"].update(steps=3), r"state\.json is damaged: its progress has .*'steps'"),
        (lambda s: s["progress"]["results"][0].pop("samples_by_source"), r"state\.json is damaged"),
        (lambda s: s.pop("config"), r"state\.json is damaged: 'config'"),
    ],
)
def test_a_changed_state_is_refused(run, stages, interrupted, change, message):
    path = interrupted / "state.json"
    state = json.loads(path.read_text())
    change(state)
    path.write_text(json.dumps(state))
    with pytest.raises(ValueError, match=message):
        run(*stages)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop("lm_head.weight"), r"does not fit the model: it lacks \['lm_head.weight'\]"),
        (lambda t: t.update(extra=torch.ones(1)), r"and has \['extra'\] besides"),
        (
            lambda t: t.update({"lm_head.weight": torch.ones(2, 2)}),
            r"lm_head.weight is \(2, 2\), the model needs \(512",
        ),
    ],
)
def test_weights_that_do_not_fit_are_named(run, stages, interrupted, change, message):
    tensors = load_file(interrupted / "model.safetensors")
    change(tensors)
    save_file(tensors, interrupted / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        run(*stages)


def test_an_optimizer_of_other_parameters_is_refused(run, stages, interrupted):
    tensors = load_file(interrupted / "optimizer.safetensors")
    save_file({**tensors, "vision.siglip.x.exp_avg": torch.ones(1)}, interrupted / "optimizer.safetensors")
    with pytest.raises(ValueError, match=r"has 'vision.siglip.x.exp_avg', but the stage does not train"):
        run(*stages)
    tensors.pop(state_module.RNG)
    save_file(tensors, interrupted / "optimizer.safetensors")
    with pytest.raises(ValueError, match="optimizer.safetensors is damaged: .*torch_rng_state"):
        run(*stages)
    key = next(key for key in tensors if key.endswith("q_proj.weight.exp_avg"))
    save_file(
        tensors | {key: torch.ones(7), state_module.RNG: torch.get_rng_state()}, interrupted / "optimizer.safetensors"
    )
    with pytest.raises(ValueError, match=rf"{key} is \(7,\), the parameter \("):
        run(*stages)
