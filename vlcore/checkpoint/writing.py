"""Model -> config.json and safetensors, in either public layout."""

import json
import re
import warnings
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from vlcore import layouts
from vlcore.checkpoint.replacing import replacing_directory
from vlcore.layouts import Binding, files
from vlcore.models import DeepSeekVL, quantized_name
from vlcore.models.deepseek_vl import unwrapped


def save_pretrained(
    model: DeepSeekVL, directory: str | Path, *, layout: str = "transformers", max_shard_size: float | str = 5e9
) -> None:
    """Write config.json and the weights, in the dtypes they have, so that the public code or transformers reads them.

    The files are written to a directory beside the target and moved into place when all of them are on disk, so a
    reader finds the old checkpoint or the new one. Other files that the target holds, such as a tokenizer, stay.
    Weights that were read and never applied go back unchanged into the layout they came from.

    Args:
        model: torch.compile's wrapper or not.
        directory: made if it is not there, parents included.
        layout: "transformers" or "original".
        max_shard_size: bytes of weights a file, or a text such as "5GB" or "512MiB"; with more, there are several and
            an index.

    Raises:
        ValueError: a layout that is none of the two, another module than a DeepSeekVL, a model that is quantised, or a
            max_shard_size that is no size.
        OSError: the disk is full or not writable; what was there before is untouched.
    """
    model = unwrapped("save_pretrained", model)
    table, most_bytes = layouts.bindings(model.config, layout), _bytes(max_shard_size)
    if name := quantized_name(model):
        raise ValueError(
            f"save_pretrained: {name} holds integers, and neither layout has a place for them; save the model before "
            "it is quantised."
        )
    homeless = [key for key in model.unused if layouts.detect_layout(key) != layout]
    if homeless:
        warnings.warn(
            f"The {layout} layout has no place for {len(homeless)} tensors that the model never applies; they are left "
            f"out: {', '.join(homeless)}.",
            stacklevel=2,
        )
    with replacing_directory(directory, replaced=("config.json", "*.safetensors", files.INDEX)) as fresh:
        try:
            write_config(model, fresh, layout)
            _write_shards(fresh, _tensors(model, table, homeless), most_bytes)
        except (OSError, SafetensorError) as error:
            raise OSError(f"The model could not be written to {directory}, which is as it was: {error}") from error


def write_config(model: DeepSeekVL, directory: Path, layout: str) -> None:
    """config.json, which tells the dtype of the weights too."""
    config = layouts.config_to_dict(model.config, layout)
    dtype = str(model.language.embed_tokens.weight.dtype).removeprefix("torch.")
    config["dtype" if layout == "transformers" else "torch_dtype"] = dtype
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _bytes(size: float | str) -> float:
    """A size that may be given with its unit, as transformers takes it: of 1000 or, with an i, 1024."""
    number: object = size
    if isinstance(size, str) and (match := re.fullmatch(r"(\d+(?:\.\d+)?) *([KMGT])(I?)B", size.upper())):
        number = float(match[1]) * (1024 if match[3] else 1000) ** ("KMGT".index(match[2]) + 1)
    if isinstance(number, bool) or not isinstance(number, (int, float)) or not number > 0:
        raise ValueError(f"save_pretrained: max_shard_size {size!r} is neither a positive number nor such as '5GB'.")
    return number


def _tensors(model: DeepSeekVL, table: list[Binding], homeless: list[str]) -> dict[str, Tensor]:
    """What is to be written, in the table's order; a tied head is in no table."""
    parameters = dict(model.named_parameters())
    tensors: dict[str, Tensor] = {}
    for binding in table:
        if binding.parameter is not None:
            parameter = parameters[binding.parameter].detach()
            tensors[binding.key] = (parameter if binding.rows is None else parameter[binding.rows]).view(binding.shape)
        elif binding.key in model.unused:
            tensors[binding.key] = model.unused[binding.key]
    return tensors | {key: tensor for key, tensor in model.unused.items() if key not in homeless}


def _write_shards(directory: Path, tensors: dict[str, Tensor], max_shard_size: float) -> None:
    shards: list[list[str]] = [[]]
    size = 0
    for key, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > max_shard_size:
            shards.append([])
            size = 0
        shards[-1].append(key)
        size += tensor.nbytes
    if len(shards) == 1:
        _write(directory / files.SINGLE, tensors)
        return
    weight_map: dict[str, str] = {}
    for i, keys in enumerate(shards, 1):
        name = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        _write(directory / name, {key: tensors[key] for key in keys})
        weight_map |= dict.fromkeys(keys, name)
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (directory / files.INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write(file: Path, tensors: dict[str, Tensor]) -> None:
    save_file({key: _owned(tensor) for key, tensor in tensors.items()}, file, metadata={"format": "pt"})


def _owned(tensor: Tensor) -> Tensor:
    """On the CPU and in memory of its own: safetensors takes tensors that share memory, such as rows, for tied ones."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
