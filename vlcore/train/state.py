"""Checkpoints of a run: everything that going on needs, written whole or not at all, read back with every check."""

import json
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from vlcore.checkpoint import replacing_directory, write_config
from vlcore.models.deepseek_vl import DeepSeekVL
from vlcore.processing import Processor
from vlcore.train.description import OtherRun, check_same
from vlcore.train.result import StageResult

FORMAT = 1
MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"
RNG = "torch_rng_state"
# What save_checkpoint calls a checkpoint, and what is left of one that was killed.
NAME = r"step-[0-9]{8}(-done)?"
LEFTOVER = rf"\.{NAME}\.[0-9a-f]+\.incomplete"


@dataclass
class Progress:
    """Where a run stands.

    Attributes:
        stage, step: what comes next: step `step` of the stage-th stage.
        global_step: steps before it, of all stages.
        bad_steps: by modality, its last steps in a row that were skipped.
        results: what each stage begun has done so far.
    """

    stage: int = 0
    step: int = 0
    global_step: int = 0
    bad_steps: dict[str, int] = field(default_factory=dict)
    results: list[StageResult] = field(default_factory=list)


def save_checkpoint(
    folder: Path,
    progress: Progress,
    described: dict[str, Any],
    model: DeepSeekVL,
    processor: Processor,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    keep: int,
) -> Path:
    """Write folder/step-NNNNNNNN with model.safetensors, optimizer.safetensors and state.json; drop all but the newest.
    What `from_pretrained` reads besides, of the model and of the processor, is there too; it takes no model in which
    layers were replaced.

    It is written under another name and renamed when it is complete and on disk, so a crash or a full disk leaves the
    checkpoints that were there.

    Args:
        described: what `describe` says of the run.
        optimizer: None between two stages, for each begins with a fresh one; the name then ends in "-done".
        keep: how many checkpoints stay, this one included.

    Returns:
        The checkpoint's directory.

    Raises:
        OSError: it cannot be written.
    """
    target = folder / f"step-{progress.global_step:08d}{'' if optimizer else '-done'}"
    # Not asdict: it makes a Counter of a Counter's items.
    values = {**vars(progress), "results": [vars(result) for result in progress.results]}
    state = {"format": FORMAT, "progress": values, "config": described}
    try:
        with replacing_directory(target) as fresh:
            save_file({name: p.detach().contiguous() for name, p in model.named_parameters()}, fresh / MODEL)
            save_file(_optimizer_tensors(optimizer, model), fresh / OPTIMIZER)
            write_config(model, fresh, "transformers")
            processor.save_pretrained(fresh)
            (fresh / STATE).write_text(json.dumps(state, indent=1), encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise OSError(f"{target} could not be written, the checkpoints before it are whole: {error}") from error
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return target


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in a folder, oldest first; what else is called step-something is not ours."""
    return _named(folder, NAME)


def remove_leftovers(folder: Path) -> None:
    """Delete what saves that were killed left half-written."""
    for leftover in _named(folder, LEFTOVER):
        shutil.rmtree(leftover)


def remove_checkpoints(folder: Path) -> None:
    """Delete every checkpoint.

    Raises:
        OSError: it cannot be deleted, or is a link to somewhere else.
    """
    if folder.is_symlink():
        raise OSError(f"{folder} is a symbolic link; what it leads to is not deleted.")
    for checkpoint in checkpoints(folder):
        shutil.rmtree(checkpoint)


@contextmanager
def naming_an_older(path: Path) -> Iterator[None]:
    """An error about the newest checkpoint says, too, which one may be gone on from instead.

    Raises:
        ValueError: that error, with the older checkpoint behind it if there is one.
    """
    try:
        yield
    except OtherRun:
        raise
    except ValueError as error:
        older = checkpoints(path.parent)[:-1]
        remedy = f" {older[-1]} is older and still there: delete {path} to go on from it." if older else ""
        raise ValueError(f"{error}{remedy}") from None


def load_checkpoint(path: Path, described: dict[str, Any], model: DeepSeekVL) -> Progress:
    """Put a checkpoint's weights into `model`, restore torch's generator, and say where the run stands.

    Args:
        described: what `describe` says of the run that is to go on.

    Raises:
        ValueError: the checkpoint is damaged, or is of another run: the first setting, source or weights that differ
            are named. What may differ is what changes no result (output, logging, workers, micro-batches) and stages
            not begun.
    """
    state = _read_state(path / STATE)
    try:
        progress = _progress(state["progress"])
        check_same(path, state["config"], described, len(progress.results))
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path / STATE} is damaged: {error}.") from None
    tensors = _read_tensors(path / MODEL)
    parameters = dict(model.named_parameters())
    _check_keys(path / MODEL, tensors, parameters)
    with torch.no_grad():
        for name, parameter in parameters.items():
            if parameter.shape != tensors[name].shape:
                found, needed = tuple(tensors[name].shape), tuple(parameter.shape)
                raise ValueError(f"{path / MODEL}: {name} is {found}, the model needs {needed}.")
            parameter.copy_(tensors[name])
    torch.set_rng_state(_read_rng(path / OPTIMIZER))
    return progress


def load_optimizer(path: Path, optimizer: torch.optim.Optimizer, model: DeepSeekVL) -> None:
    """Put a checkpoint's moments into a fresh optimizer.

    Raises:
        ValueError: the file is damaged, or is of other parameters than the optimizer's.
    """
    tensors = _read_tensors(path / OPTIMIZER)
    tensors.pop(RNG, None)
    trained = {p for group in optimizer.param_groups for p in group["params"]}
    parameters = {name: p for name, p in model.named_parameters() if p in trained}
    for key, tensor in tensors.items():
        name, _, moment = key.rpartition(".")
        if name not in parameters:
            raise ValueError(f"{path / OPTIMIZER} has {key!r}, but the stage does not train {name!r}.")
        if tensor.shape not in ((), parameters[name].shape):
            found, needed = tuple(tensor.shape), tuple(parameters[name].shape)
            raise ValueError(f"{path / OPTIMIZER}: {key} is {found}, the parameter {needed}.")
        optimizer.state[parameters[name]][moment] = tensor.to(parameters[name].device)


def _named(folder: Path, pattern: str) -> list[Path]:
    return sorted(path for path in folder.glob("*") if re.fullmatch(pattern, path.name))


def _optimizer_tensors(optimizer: torch.optim.Optimizer | None, model: DeepSeekVL) -> dict[str, Tensor]:
    tensors = {RNG: torch.get_rng_state()}
    if optimizer is not None:
        names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
        for parameter, state in optimizer.state.items():
            tensors |= {f"{names[parameter]}.{moment}": tensor.contiguous() for moment, tensor in state.items()}
    return tensors


def _read_state(path: Path) -> dict[str, Any]:
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError(f"{path} is not a checkpoint of format {FORMAT}.")
    return state


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None


def _read_rng(path: Path) -> Tensor:
    try:
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(RNG)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None


def _check_keys(path: Path, tensors: dict[str, Tensor], parameters: dict[str, Any]) -> None:
    missing, extra = sorted(parameters.keys() - tensors.keys()), sorted(tensors.keys() - parameters.keys())
    if missing or extra:
        raise ValueError(f"{path} does not fit the model: it lacks {missing[:3]} and has {extra[:3]} besides.")


def _progress(values: dict[str, Any]) -> Progress:
    if values.keys() != (expected := {f.name for f in fields(Progress)}):
        raise TypeError(f"its progress has {sorted(values)}, not {sorted(expected)}")
    # Checkpoints of earlier releases hold one count of all modalities, which says nothing of any of them.
    bad_steps = values["bad_steps"] if isinstance(values["bad_steps"], dict) else {}
    results = [_stage_result(result) for result in values["results"]]
    return Progress(**{**values, "bad_steps": bad_steps, "results": results})


def _stage_result(values: dict[str, Any]) -> StageResult:
    counters = {key: Counter(values[key]) for key in ("samples_by_source", "tokens_by_source")}
    return StageResult(**{**values, **counters})
