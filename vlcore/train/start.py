"""What a run starts from: the model and processor that its configuration names, checked against its stages."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vlcore.checkpoint import from_pretrained
from vlcore.config import PRESETS, VLConfig, preset
from vlcore.data import BadSample, Source
from vlcore.data.sampler import text_share
from vlcore.models import DeepSeekVL, init_weights, quantized_name
from vlcore.processing import Processor
from vlcore.train.config import Stage, TrainConfig
from vlcore.train.state import remove_checkpoints, remove_leftovers

CHECKPOINTS = "checkpoints"
METRICS, BAD_SAMPLES, PLOT = RECORDS = ("metrics.jsonl", "bad_samples.jsonl", "loss.png")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Variants of one block's code: with or without a gradient, first layer or not, packed or not, and sizes of 1, which the
# compiler tells from more. A run of three stages makes about ten.
RECOMPILE_LIMIT = 64
# Samples at the beginning of a source, one of which is good and tells what it holds.
LOOKED_AT = 20


def check_alone() -> None:
    """Refuse to be one of several processes: each would train on everything and write to the same folder.

    Raises:
        ValueError: torchrun, or another launcher, started more than one.
    """
    world = os.environ.get("WORLD_SIZE", "")
    if world not in ("", "1"):
        raise ValueError(
            f"WORLD_SIZE is {world}, but training is one process today: start it once, without torchrun, or unset "
            "WORLD_SIZE."
        )


def load_model(config: TrainConfig) -> DeepSeekVL:
    """The model that config.model names, in float32: fresh weights for a configuration or preset, or a directory's.

    It is on config.device, or without one on the GPU if there is one.

    Raises:
        ValueError, OSError: there is no such preset, directory or device, or it is damaged.
    """
    chosen = config.model
    device = _device(config.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if isinstance(chosen, str) and chosen in PRESETS:
        chosen = preset(chosen)
    if isinstance(chosen, VLConfig):
        model = DeepSeekVL(chosen)
        init_weights(model, config.seed)
        return model.to(device)
    if not Path(chosen).is_dir():
        raise ValueError(f"model {str(chosen)!r} is neither a preset ({', '.join(PRESETS)}) nor a directory.")
    return from_pretrained(chosen, dtype=torch.float32, device=device)


def place(model: DeepSeekVL, config: TrainConfig) -> DeepSeekVL:
    """A model that was handed over, in float32; where it is, or on config.device.

    Raises:
        ValueError: there is no such device.
    """
    return model.float() if config.device is None else model.float().to(_device(config.device))


def _device(name: str) -> torch.device:
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # the latter where torch is built without CUDA
        reason = str(error).splitlines()[0]
        raise ValueError(f"TrainConfig: device is {name!r}, which cannot be used: {reason}") from None


def load_processor(config: TrainConfig) -> Processor:
    """The processor of config.processor, or of the model directory.

    Raises:
        ValueError, OSError: none is named and the model is no directory, or what is named is damaged.
    """
    directory = config.processor or config.model
    if isinstance(directory, VLConfig) or (config.processor is None and directory in PRESETS):
        raise ValueError("TrainConfig: fresh weights bring no tokenizer; name a directory that has one as processor.")
    return Processor.from_pretrained(directory)


def check(config: TrainConfig, model: DeepSeekVL, processor: Processor) -> None:
    """Find what would only fail, or train nothing, hours later.

    Raises:
        ValueError: the model is quantised, it and the processor disagree on images or tokens, a stage asks for what the
            model or the data lacks, or there is no such backend to compile with.
    """
    if name := quantized_name(model):
        raise ValueError(f"A model that is quantised cannot be trained: {name} holds integers, which have no gradient.")
    for name in ("image_token_id", "image_size", "num_image_tokens", "pad_color"):
        _check_same(name, getattr(model.config, name), getattr(processor.config, name))
    for name in ("bos_token_id", "eos_token_id"):
        _check_same(name, getattr(model.config.language, name), getattr(processor.config.language, name))
    vocab_size = model.config.language.vocab_size
    if processor.num_token_ids > vocab_size:
        raise ValueError(f"The processor makes ids up to {processor.num_token_ids - 1}; the model has {vocab_size}.")
    for stage in config.stages:
        _check_stage(stage, model)
    if isinstance(config.compile, str) and config.compile not in (known := torch.compiler.list_backends(())):
        raise ValueError(f"TrainConfig: compile is {config.compile!r}; there are the backends {', '.join(known)}.")


def _check_same(name: str, of_model: Any, of_processor: Any) -> None:
    if of_model != of_processor:
        raise ValueError(f"The processor's {name} is {of_processor}, the model's {of_model}.")


def _check_stage(stage: Stage, model: DeepSeekVL) -> None:
    parts = model.parts()
    empty = [part for part in stage.trains if not parts[part]]
    if empty:
        raise ValueError(f"Stage {stage.name!r} trains {empty}, which this model does not have.")
    longest = model.config.language.max_positions
    if stage.sequence_length > longest:
        raise ValueError(
            f"Stage {stage.name!r}: sequence_length {stage.sequence_length} is over the model's {longest} positions."
        )
    shows_images = any(entry.source.modality == "multimodal" for entry in stage.mixture.entries)
    num_image_tokens = model.config.num_image_tokens
    if shows_images and stage.sequence_length < num_image_tokens + 2:
        raise ValueError(
            f"Stage {stage.name!r}: sequence_length {stage.sequence_length} has no room for an image: with BOS and one "
            f"token to learn, the model's {num_image_tokens} image tokens need {num_image_tokens + 2}."
        )
    share = stage.mixture.text_share if stage.text_ratio is None else stage.text_ratio
    if "language" not in stage.trains and (share > 0 or stage.modality_warmup > 0):
        raise ValueError(
            f"Stage {stage.name!r} trains {stage.trains}, which text without images does not reach, but its share of "
            f"text is {share:g}."
        )
    try:
        text_share(stage.mixture, stage.steps, stage.text_ratio, stage.modality_warmup)
    except ValueError as error:
        raise ValueError(f"Stage {stage.name!r}: {error}") from None
    if stage.supervise == "answers":
        for entry in stage.mixture.entries:
            if _is_of_documents(entry.source):
                raise ValueError(
                    f"Stage {stage.name!r}: only answers are supervised, but {entry.source.name!r} holds documents."
                )


def _is_of_documents(source: Source) -> bool:
    """Whether the first sample that can be read is one."""
    for index in range(min(len(source), LOOKED_AT)):
        with suppress(BadSample):
            return source[index].document is not None
    return False


@contextmanager
def training_mode(model: DeepSeekVL, config: TrainConfig) -> Iterator[None]:
    """Set precision, recomputation and compilation for a run; afterwards they, and what is frozen, are as they were."""
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    recomputing: list[Any] = [module for module in model.modules() if hasattr(module, "activation_checkpointing")]
    before = [module.activation_checkpointing for module in recomputing]
    dtype = model.compute_dtype
    model.compute_dtype = DTYPES[config.precision]
    for module in recomputing:
        module.activation_checkpointing = config.activation_checkpointing
    try:
        with _compiled(model, config.compile) if config.compile else nullcontext():
            yield
    finally:
        model.compute_dtype = None if dtype == model.language.embed_tokens.weight.dtype else dtype
        for module, value in zip(recomputing, before, strict=True):
            module.activation_checkpointing = value
        model.requires_grad_(True)
        for parameter in frozen:
            parameter.requires_grad_(False)


@contextmanager
def _compiled(model: DeepSeekVL, backend: bool | str) -> Iterator[None]:
    """Compile the repeated blocks, each by itself: alike ones share their code, so it takes seconds, not minutes."""
    blocks = [block for module in model.modules() if isinstance(module, nn.ModuleList) for block in module]
    # What Module.compile sets, and there is no call to undo it.
    before = [block._compiled_call_impl for block in blocks]
    try:
        # At 8 variants, its own limit, the compiler would give the block up for the rest of the run.
        with torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT):
            for block in blocks:
                block.compile(backend="inductor" if backend is True else backend, dynamic=True)
            yield
    finally:
        for block, compiled in zip(blocks, before, strict=True):
            block._compiled_call_impl = compiled


def clear_leftovers(output_dir: Path) -> None:
    """Delete what a run that was killed while it saved left half-written."""
    # The weights of the final model are written to a directory beside the one that they and the processor move in from.
    remove_leftovers(output_dir / CHECKPOINTS)
    for pattern in (".model.*.incomplete", "..model.*.incomplete"):
        for leftover in output_dir.glob(pattern):
            shutil.rmtree(leftover)
    for name in RECORDS:
        for leftover in output_dir.glob(f".{name}.*.partial"):
            leftover.unlink()


def remove_run(output_dir: Path) -> None:
    """Delete what an earlier run wrote to output_dir, and nothing else; its model, too, stays until it is replaced.

    Raises:
        OSError: it cannot be deleted.
    """
    remove_checkpoints(output_dir / CHECKPOINTS)
    for name in RECORDS:
        (output_dir / name).unlink(missing_ok=True)
