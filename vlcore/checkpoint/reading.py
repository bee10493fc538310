"""Safetensors -> model: everything is checked from the headers before anything is allocated, then read file by file."""

import re
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from vlcore import layouts
from vlcore.layouts import Binding, StoredTensor
from vlcore.models import DeepSeekVL, Llama
from vlcore.models.layers import Linear, lay_side_by_side
from vlcore.native import prefer_huge_pages

MOST_NAMED = 10  # keys that an error message lists before it only counts
# How names of parameters begin of which neither layout has such.
OWN = "language."
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def from_pretrained(
    directory: str | Path, dtype: torch.dtype | str | None = None, device: torch.device | str | None = None
) -> DeepSeekVL:
    """The model in a directory, in eval mode.

    config.json and the weights may each be in either public layout; or it is a checkpoint of a training run, which has
    no weights but those that the model applies. Weights are safetensors, one file or several with an index. The peak of
    memory is the model and one tensor, besides the operating system's cache of the files.

    Args:
        directory: holds config.json and the weights.
        dtype: of the parameters, such as torch.bfloat16 or "bfloat16"; by default each keeps the one it has on disk,
            and one that is stored in parts of several dtypes has the one that holds them all.
        device: by default the CPU.

    Raises:
        FileNotFoundError: there is no such directory, or no config.json in it.
        ValueError: a dtype that is not of floating numbers; the config is not one of this model's; a file is malformed;
            weights are missing, unexpected, there twice or of another shape than the config says, each of them named.
    """
    directory, dtype = Path(directory), _floating("from_pretrained", dtype)
    stored = _stored(directory)
    config = layouts.read_config(directory)
    layout = _layout(directory, stored)
    towers = (config.siglip,) if config.sam is None else (config.siglip, config.sam)
    _check_layers(directory, sum(part.num_layers for part in (config.language, *towers)), stored)
    bindings = layouts.bindings(config, layout) if layout else layouts.own_bindings(config)
    unused = _check(directory, f"the {layout} layout" if layout else "a training run's layout", bindings, stored)
    with torch.device("meta"):
        model = DeepSeekVL(config)
    _fill(model, bindings, stored, dtype, device)
    model.unused = {key: tensor.clone() for key, tensor in _read(stored, unused)}
    return model.eval()


def load_llama(
    directory: str | Path, dtype: torch.dtype | str | None = None, device: torch.device | str | None = None
) -> tuple[Llama, Linear]:
    """A plain LLaMA directory's model and its head, which holds the embedding's weight where they are tied.

    Raises:
        FileNotFoundError: there is no such directory, or no config.json in it.
        ValueError: as `from_pretrained`.
    """
    directory, dtype = Path(directory), _floating("load_llama", dtype)
    stored = layouts.stored_tensors(directory)
    config = layouts.read_llama_config(directory)
    _check_layers(directory, config.num_layers, stored)
    bindings = layouts.llama_bindings(config)
    _check(directory, "LLaMA's layout", bindings, stored)
    with torch.device("meta"):
        language, head = Llama(config), Linear(config.hidden_size, config.vocab_size, bias=False)
    if config.tie_embeddings:
        head.weight = language.embed_tokens.weight
    _fill(nn.ModuleDict({"language": language, "lm_head": head}), bindings, stored, dtype, device)
    return language.eval(), head


def _floating(caller: str, dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A dtype that may be given by its name."""
    named = {str(known).removeprefix("torch."): known for known in DTYPES.values()}
    found = named.get(dtype) if isinstance(dtype, str) else dtype
    if dtype is not None and found not in named.values():
        raise ValueError(f"{caller}: dtype {dtype!r} is none of {', '.join(named)}.")
    return found


def _check_layers(directory: Path, num_layers: int, stored: dict[str, StoredTensor]) -> None:
    """Of any number of layers a list would be made to compare the weights with."""
    if num_layers > len(stored):
        given = f"config.json describes {num_layers} layers"
        raise ValueError(f"{directory}: the weights do not fit: {given}, and there are {len(stored)} tensors in all.")


def _stored(directory: Path) -> dict[str, StoredTensor]:
    """The directory's tensors by their plain keys."""
    stored: dict[str, StoredTensor] = {}
    for key, tensor in layouts.stored_tensors(directory).items():
        plain = _plain(key)
        if plain in stored:
            raise ValueError(f"{directory}: the weights hold {plain} twice, with `vision_model` once and doubled.")
        stored[plain] = tensor
    return stored


def _plain(key: str) -> str:
    """transformers' releases 4 wrote `vision_model` twice."""
    return re.sub(r"^model\.vision_model\.vision_model\.", "model.vision_model.", key)


def _layout(directory: Path, stored: Iterable[str]) -> str | None:
    """One of the public ones; None where parameters go by their own names."""
    if any(key.startswith(OWN) for key in stored):
        return None
    found = {layouts.detect_layout(key) for key in stored} - {None}
    if len(found) != 1:
        problem = "of no known layout" if not found else "of both layouts at once"
        raise ValueError(f"{directory}: the weights are {problem}; the first key is {next(iter(stored), None)!r}.")
    return str(found.pop())


def _check(directory: Path, where: str, bindings: list[Binding], stored: dict[str, StoredTensor]) -> list[str]:
    """Compare what there is with what there should be; the keys that are there and never applied."""
    expected = {binding.key: binding for binding in bindings}
    missing = [b.key for b in bindings if b.parameter is not None and b.key not in stored]
    extra = [key for key in stored if key not in expected]
    unexpected = [key for key in extra if not layouts.is_never_applied(key)]
    shapes = [
        f"{key} is {list(stored[key].shape)}, not {list(binding.shape)}"
        for key, binding in expected.items()
        if key in stored and stored[key].shape != binding.shape
    ]
    dtypes = [f"{key} is {t.dtype}" for key, t in stored.items() if t.dtype not in DTYPES and key not in extra]
    problems = {
        "missing": missing,
        "unexpected": unexpected,
        "of another shape": shapes,
        "of a dtype that is none of " + ", ".join(DTYPES): dtypes,
    }
    if found := [f"{len(keys)} {problem}: {_listed(keys)}" for problem, keys in problems.items() if keys]:
        raise ValueError(f"{directory}: the weights, in {where}, do not fit config.json. {'; '.join(found)}.")
    return [key for key in stored if key in extra or expected[key].parameter is None]


def _listed(keys: list[str]) -> str:
    more = len(keys) - MOST_NAMED
    return ", ".join(keys[:MOST_NAMED]) + (f", and {more} more" if more > 0 else "")


def _fill(
    model: nn.Module,
    bindings: list[Binding],
    stored: dict[str, StoredTensor],
    dtype: torch.dtype | None,
    device: torch.device | str | None,
) -> None:
    """Give a model built on `meta` its memory, and read the weights into it."""
    by_key = {binding.key: binding for binding in bindings if binding.parameter is not None}
    dtypes: dict[str | None, torch.dtype] = {}
    for key, binding in by_key.items():
        on_disk = DTYPES[stored[key].dtype]
        dtypes[binding.parameter] = torch.promote_types(on_disk, dtypes.get(binding.parameter, on_disk))
    _materialize(model, dtypes if dtype is None else dict.fromkeys(dtypes, dtype), device)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for key, tensor in _read(stored, by_key):
            parameter = parameters[str(by_key[key].parameter)]
            target = parameter if (rows := by_key[key].rows) is None else parameter[rows]
            target.copy_(tensor.view(target.shape))
    lay_side_by_side(model)


def _materialize(model: nn.Module, dtypes: dict[str | None, torch.dtype], device: torch.device | str | None) -> None:
    """Replace every parameter on `meta` by memory of the same shape, once for a weight that two modules share."""
    made: dict[int, nn.Parameter] = {}
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in made:
                dtype = dtypes[f"{module_name}.{name}".removeprefix(".")]
                empty = torch.empty_like(parameter, dtype=dtype, device=device or "cpu")
                made[id(parameter)] = nn.Parameter(prefer_huge_pages(empty), parameter.requires_grad)
            module._parameters[name] = made[id(parameter)]


def _read(stored: dict[str, StoredTensor], keys: Iterable[str]) -> Iterable[tuple[str, Tensor]]:
    """The tensors, one at a time, with each file opened once."""
    by_file: dict[Path, list[str]] = {}
    for key in keys:
        by_file.setdefault(stored[key].file, []).append(key)
    for file, wanted in by_file.items():
        with safe_open(file, framework="pt") as tensors:
            names = {_plain(name): name for name in tensors.keys()}  # noqa: SIM118 (no mapping)
            for key in wanted:
                yield key, tensors.get_tensor(names[key])
