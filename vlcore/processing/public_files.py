"""The files of a processor, as transformers' AutoProcessor reads them beside a model's weights."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from vlcore.config import VLConfig
from vlcore.layouts import config_from_dict, config_to_dict, eos_to_json, read_config, read_json
from vlcore.processing.chat import IMAGE_PLACEHOLDER, ChatTemplate
from vlcore.processing.images import MIN_SIDE
from vlcore.processing.writing import replacing_files

PROMPT_KEY, MODEL_KEY = "prompt", "model_config"
BILINEAR, BICUBIC = 2, 3

# The prompt of ChatTemplate.render, for messages; the tokenizer gives `bos_token` and `eos_token`.
JINJA = """\
{%- macro spell(content) -%}
    {%- if content is string -%}
        {{- content -}}
    {%- else -%}
        {%- for part in content -%}
            {%- if part.type == "image" -%}
                {{- IMAGE -}}
            {%- else -%}
                {{- " " if loop.previtem is defined and loop.previtem.type == "text" -}}
                {{- part.text -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- set system = SYSTEM -%}
{%- if messages[0].role == "system" -%}
    {%- set system = spell(messages[0].content) | trim -%}
    {%- set messages = messages[1:] -%}
{%- endif -%}
{{- bos_token -}}
{{- system + SEPARATOR if system -}}
{%- for message in messages -%}
    {%- set said = spell(message.content) | trim -%}
    {%- if message.role == "user" -%}
        {{- USER + ": " + said -}}
        {{- SEPARATOR if not loop.last or add_generation_prompt -}}
        {{- ASSISTANT + ":" if loop.last and add_generation_prompt -}}
    {%- elif said -%}
        {{- ASSISTANT + ": " + said + eos_token -}}
    {%- else -%}
        {{- ASSISTANT + ":" -}}
    {%- endif -%}
{%- endfor -%}
"""


def contents(tokenizer: Tokenizer, config: VLConfig, template: ChatTemplate) -> dict[str, str]:
    """File name -> text of everything that a processor consists of."""
    language = config.language
    ids = {"bos": language.bos_token_id, "eos": language.eos_token_id, "pad": language.pad_token_id}
    processor_class = "DeepseekVLHybridProcessor" if config.sam else "DeepseekVLProcessor"
    tokenizer_config = {f"{name}_token": tokenizer.id_to_token(token_id) for name, token_id in ids.items()} | {
        "clean_up_tokenization_spaces": False,
        "extra_special_tokens": {"image_token": IMAGE_PLACEHOLDER},
        "model_max_length": language.max_positions,
        "padding_side": "left",
        "processor_class": processor_class,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    processor_config = {
        MODEL_KEY: config_to_dict(config, "transformers"),
        "num_image_tokens": config.num_image_tokens,
        "processor_class": processor_class,
        PROMPT_KEY: dataclasses.asdict(template),
    }
    generation_config = {f"{name}_token_id": token_id for name, token_id in ids.items()} | {
        "eos_token_id": eos_to_json(language)
    }
    return {
        "tokenizer.json": tokenizer.to_str(),
        "tokenizer_config.json": _json(tokenizer_config),
        "chat_template.jinja": chat_template(template),
        "preprocessor_config.json": _json(image_processor(config) | {"processor_class": processor_class}),
        "processor_config.json": _json(processor_config),
        "generation_config.json": _json(generation_config),
    }


def chat_template(template: ChatTemplate) -> str:
    """The template in Jinja, with its strings set at the top."""
    strings = {"IMAGE": IMAGE_PLACEHOLDER} | {key.upper(): value for key, value in dataclasses.asdict(template).items()}
    settings = [f"{{%- set {name} = {json.dumps(value, ensure_ascii=False)} -%}}\n" for name, value in strings.items()]
    return "".join(settings) + JINJA


def image_processor(config: VLConfig) -> dict[str, Any]:
    """Settings of transformers' image processor; with two towers `size` is the low-resolution one's.

    That tower's image is made of the padded high-resolution one by the model, bilinearly, and transformers makes it of
    the image itself: bilinearly it comes out the same but for the rounding to 8 bits.
    """
    low = config.siglip
    settings = {
        "do_normalize": True,
        "do_pad": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(low.mean),
        "image_processor_type": "DeepseekVLImageProcessor",
        "image_std": list(low.std),
        "min_size": MIN_SIDE,
        "resample": BICUBIC,
        "rescale_factor": 1 / 255,
        "size": {"height": low.image_size, "width": low.image_size},
    }
    if config.sam is None:
        return settings
    return settings | {
        "high_res_image_mean": list(config.sam.mean),
        "high_res_image_std": list(config.sam.std),
        "high_res_resample": BICUBIC,
        "high_res_size": {"height": config.sam.image_size, "width": config.sam.image_size},
        "image_processor_type": "DeepseekVLHybridImageProcessor",
        "resample": BILINEAR,
    }


def read_model_config(directory: Path) -> VLConfig:
    """The configuration of the processor's model: config.json's, or without one what `contents` wrote of it.

    Raises:
        FileNotFoundError: there is neither.
        ValueError: a file is malformed, or of a model that this package does not compute.
    """
    if (directory / "config.json").exists():
        return read_config(directory)
    path = directory / "processor_config.json"
    raw = read_json(path).get(MODEL_KEY) if path.is_file() else None
    if raw is None:
        raise FileNotFoundError(
            f"{directory} has neither config.json nor a {path.name} with {MODEL_KEY!r}; a processor needs the ids and "
            "sizes of its model."
        )
    if not isinstance(raw, dict):
        raise ValueError(f"{path}: {MODEL_KEY!r} is {raw!r:.80}; it must be what a config.json holds.")
    return config_from_dict(raw, f"{path}: {MODEL_KEY}")


def read_template(directory: Path) -> ChatTemplate:
    """The template that `contents` wrote into processor_config.json; DeepSeek-VL's where there is none.

    Raises:
        ValueError: the file is not JSON, or its prompt is not made of the template's strings.
    """
    path = directory / "processor_config.json"
    prompt = read_json(path).get(PROMPT_KEY, {}) if path.is_file() else {}
    names = {field.name for field in dataclasses.fields(ChatTemplate)}
    if not isinstance(prompt, dict) or not set(prompt) <= names or not all(isinstance(v, str) for v in prompt.values()):
        raise ValueError(f"{path}: {PROMPT_KEY!r} is {prompt!r:.80}; it must hold strings {', '.join(sorted(names))}.")
    return ChatTemplate(**prompt)


def write(directory: Path, files: dict[str, str]) -> None:
    """Write the files, all or none of them.

    Raises:
        OSError: the directory cannot be made or written to; it is as it was.
    """
    is_new = not directory.exists()
    directory.mkdir(parents=True, exist_ok=True)
    try:
        with replacing_files([directory / name for name in files]) as beside:
            for path, text in zip(beside, files.values(), strict=True):
                path.write_text(text, encoding="utf-8")
    except BaseException:
        if is_new:
            directory.rmdir()
        raise


def _json(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False, sort_keys=True) + "\n"
