"""config.json in either public layout <-> VLConfig, with what the public files leave out filled in."""

import dataclasses
from pathlib import Path

from vlcore.config import LlamaConfig, VLConfig
from vlcore.layouts.fields import Fields, Json
from vlcore.layouts.files import read_json, weight_keys
from vlcore.layouts.llama_config import llama_from_dict, special_ids
from vlcore.layouts.original_config import from_original, to_original
from vlcore.layouts.transformers_config import MODEL_TYPES, from_transformers, to_transformers
from vlcore.layouts.weights import LAYOUTS, ORIGINAL

HEADS = ("lm_head.weight", "language_model.lm_head.weight")


def read_config(directory: str | Path) -> VLConfig:
    """The model that a directory's config.json describes, in either layout, whichever layout its weights have.

    Whether the head is tied is decided by the weights, where the directory has them: transformers' configs say that
    it is unless told otherwise, and the released models' is not. What generation_config.json, if there is one, names as
    the end of an answer ends it too: transformers asks that file first.

    Raises:
        FileNotFoundError: there is no config.json.
        ValueError: it is malformed, or of a model that this package does not compute.
    """
    directory = Path(directory)
    config = config_from_dict(read_json(directory / "config.json"), str(directory / "config.json"))
    return dataclasses.replace(config, language=_with_what_lies_beside(config.language, directory))


def config_from_dict(raw: Json, where: str = "config.json") -> VLConfig:
    """The config that the content of a config.json describes; `where` opens the error messages.

    Raises:
        ValueError: it is of neither layout, or of a model that this package does not compute.
    """
    fields = Fields(raw, where)
    try:
        if "language_config" in raw or raw.get("model_type") == "multi_modality":
            return from_original(fields)
        if raw.get("model_type") in MODEL_TYPES.values():
            return from_transformers(fields)
    except ValueError as error:
        raise _located(error, where) from error
    raise ValueError(
        f"{where}: model_type {raw.get('model_type')!r} is no DeepSeek-VL: 'multi_modality', 'deepseek_vl' or "
        "'deepseek_vl_hybrid'."
    )


def config_to_dict(config: VLConfig, layout: str) -> Json:
    """The content of config.json in a layout; `config_from_dict` gives the same config back.

    Raises:
        ValueError: a layout that is none of LAYOUTS.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"There is no layout {layout!r}; there are {', '.join(LAYOUTS)}.")
    common = {"image_token_id": config.image_token_id, "pad_color": list(config.pad_color)}
    return (to_original(config) if layout == ORIGINAL else to_transformers(config)) | common


def read_llama_config(directory: str | Path) -> LlamaConfig:
    """The language model that a plain LLaMA directory holds; its weights say whether the head is tied.

    Raises:
        FileNotFoundError: there is no config.json.
        ValueError: it is malformed, of another model_type, or of a variant that this package does not compute.
    """
    file = Path(directory) / "config.json"
    raw = read_json(file)
    if raw.get("model_type") != "llama":
        raise ValueError(f"{file}: model_type is {raw.get('model_type')!r}, not 'llama'.")
    try:
        config = llama_from_dict(Fields(raw, str(file)))
    except ValueError as error:
        raise _located(error, str(file)) from error
    return _with_what_lies_beside(config, Path(directory))


def _with_what_lies_beside(config: LlamaConfig, directory: Path) -> LlamaConfig:
    """Untied if there is a weight of the head, whatever the config says, and ended by all that ends an answer."""
    keys = weight_keys(directory) or set()
    config = dataclasses.replace(config, tie_embeddings=False) if keys.intersection(HEADS) else config
    file = directory / "generation_config.json"
    generation = Fields(read_json(file) if file.is_file() else {}, str(file))
    if generation.raw.get("eos_token_id") is None:
        return config
    ends = (*config.other_eos_token_ids, *special_ids(generation, config.vocab_size)[1])
    others = tuple(dict.fromkeys(token_id for token_id in ends if token_id != config.eos_token_id))
    try:
        return dataclasses.replace(config, other_eos_token_ids=others)
    except ValueError as error:
        raise _located(error, str(file)) from error


def _located(error: ValueError, where: str) -> ValueError:
    return error if str(error).startswith(where) else ValueError(f"{where}: {error}")
