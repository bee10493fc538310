"""What decides the outcome of a run, written down to tell whether a checkpoint is of the same one."""

import hashlib
import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from vlcore.config import VLConfig
from vlcore.data import Source
from vlcore.models.deepseek_vl import DeepSeekVL
from vlcore.processing import Processor
from vlcore.train.config import Stage, TrainConfig

# Settings of a stage that change no result.
FREE = ("micro_batch_size",)
# What stands for contents. None, or none in checkpoints of earlier releases, says that they are not known.
FINGERPRINTS = ("weights", "rows")
# Numbers of a parameter that its fingerprint is of, at least, where it has as many.
SAMPLED = 4096


class OtherRun(ValueError):
    """A checkpoint is whole, but of another run."""


def describe(config: TrainConfig, model: VLConfig, processor: Processor, weights: str | None = None) -> dict[str, Any]:
    """What decides the outcome of a run, as JSON has it; of the tokenizer the SHA-256 of its JSON.

    Args:
        weights: stands for those that the run starts from; None where they are not known.
    """
    stages = []
    for stage in config.stages:
        settings = {f.name: getattr(stage, f.name) for f in fields(Stage) if f.name not in ("mixture", *FREE)}
        settings["mixture"] = [
            {
                "name": entry.source.name,
                "modality": entry.source.modality,
                "samples": len(entry.source),
                "weight": entry.weight,
                "augmented": entry.augment is not None,
                "rows": _rows(entry.source),
            }
            for entry in stage.mixture.entries
        ]
        stages.append(settings)
    architecture = asdict(model)
    # Decides where an answer stops, and nothing that is trained.
    del architecture["language"]["other_eos_token_ids"]
    described = {
        "model": architecture,
        "weights": weights,
        "tokenizer": hashlib.sha256(processor.tokenizer.to_str().encode()).hexdigest(),
        "template": asdict(processor.template),
        "seed": config.seed,
        "precision": config.precision,
        "stages": stages,
    }
    return json.loads(json.dumps(described))


def fingerprint(model: DeepSeekVL) -> str:
    """SHA-256 of names, shapes and numbers evenly spaced in each parameter, which is quick however large they are."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        numbers = parameter.detach().flatten()
        digest.update(f"{name} {tuple(parameter.shape)} ".encode())
        digest.update(numbers[:: max(1, len(numbers) // SAMPLED)].cpu().numpy().tobytes())
    return digest.hexdigest()


def check_same(path: Path, saved: Any, current: Any, begun: int) -> None:
    """Compare what `describe` said of a checkpoint's run and of this one, of which `begun` stages are begun.

    Raises:
        OtherRun: they differ; what is named.
    """
    saved, current = ({**whole, "stages": whole["stages"][:begun]} for whole in (saved, current))
    if difference := _difference(saved, current) or _changed(saved, current):
        raise OtherRun(
            f"{path} is of another run: {difference}. Restore it, or choose another output_dir, or "
            "resume=false to delete it and begin again."
        )


def _difference(saved: Any, current: Any, key: str = "") -> str | None:
    """The first setting that differs between two descriptions, or None."""
    if isinstance(saved, list) and isinstance(current, list):
        saved, current = dict(enumerate(saved)), dict(enumerate(current))
    if not (isinstance(saved, dict) and isinstance(current, dict)):
        return None if saved == current else f"its {key} is {saved!r:.80}, the configuration's {current!r:.80}"
    pairs = {part: (saved.get(part), current.get(part)) for part in {**saved, **current} if part not in FINGERPRINTS}
    differences = (_difference(*pair, f"{key}.{part}".lstrip(".")) for part, pair in pairs.items())
    return next((difference for difference in differences if difference), None)


def _changed(saved: Any, current: Any) -> str | None:
    """What has changed though all settings are the same, or None."""

    def differ(name: str, one: dict[str, Any], other: dict[str, Any]) -> bool:
        fingerprints = {one.get(name), other.get(name)}
        return None not in fingerprints and len(fingerprints) > 1

    if differ("weights", saved, current):
        return "it started from other weights than the configuration's model has"
    for one, other in zip(saved["stages"], current["stages"], strict=True):
        for entry, other_entry in zip(one["mixture"], other["mixture"], strict=True):
            if differ("rows", entry, other_entry):
                return f"the source {entry['name']!r} of its stage {one['name']!r} held other rows than it does now"
    return None


def _rows(source: Source) -> str | None:
    fingerprint = getattr(source, "fingerprint", None)
    return None if fingerprint is None else fingerprint()
