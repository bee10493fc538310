"""Which tensor of a checkpoint is which parameter of the model, in each public layout.

The names are a table, one row a module; the shapes follow from the config. Sources: the public DeepSeek-VL code and
transformers' deepseek_vl and deepseek_vl_hybrid.
"""

import re
from dataclasses import dataclass

from vlcore.config import LlamaConfig, VLConfig
from vlcore.layouts.shapes import UNUSED, Shape, llama_parameters, parameters

ORIGINAL, TRANSFORMERS = LAYOUTS = ("original", "transformers")


@dataclass(frozen=True)
class Binding:
    """One tensor of a checkpoint.

    Attributes:
        key, shape: as it stands on disk.
        parameter: the parameter that it fills, read in its own shape; None where the model never applies the tensor.
        rows: the rows of the parameter that it fills, where it fills a part only.
    """

    key: str
    shape: Shape
    parameter: str | None
    rows: slice | None = None


def weight_table(config: VLConfig, layout: str) -> dict[str, Shape]:
    """Key -> shape of every tensor of a checkpoint, in the public code's order.

    The original layout's table has the tensors that the released checkpoints hold and nobody applies.

    Raises:
        ValueError: a layout that is none of LAYOUTS.
    """
    return {binding.key: binding.shape for binding in bindings(config, layout)}


def bindings(config: VLConfig, layout: str) -> list[Binding]:
    """Every tensor of a checkpoint of `config`, in the public code's order.

    Raises:
        ValueError: a layout that is none of LAYOUTS.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"There is no layout {layout!r}; there are {', '.join(LAYOUTS)}.")
    table = _names(config, LAYOUTS.index(layout))
    found = []
    for name, shape in parameters(config):
        if name.startswith(UNUSED):
            if layout == ORIGINAL:
                found.append(Binding(_rename(name, table), shape, None))
        elif layout == TRANSFORMERS and name.startswith("vision.siglip"):
            found += _transformers_siglip(name, shape, _rename(name, table))
        else:
            found.append(Binding(_rename(name, table), shape, name))
    return found


def own_bindings(config: VLConfig) -> list[Binding]:
    """Every parameter by its own name, as training keeps them."""
    return [Binding(name, shape, name) for name, shape in parameters(config) if not name.startswith(UNUSED)]


def llama_bindings(config: LlamaConfig) -> list[Binding]:
    """Every tensor of a plain LLaMA checkpoint, bound to the names `language.*` and `lm_head.weight`."""
    return [Binding(re.sub(r"^language\.", "model.", name), shape, name) for name, shape in llama_parameters(config)]


def detect_layout(key: str) -> str | None:
    """The layout that a tensor's key belongs to; None where it is neither's."""
    if key.startswith(("vision_model.", "aligner.", "language_model.")):
        return ORIGINAL
    return TRANSFORMERS if key.startswith(("model.", "lm_head.")) else None


def is_never_applied(key: str) -> bool:
    """Whether a tensor that no table lists is known, and known to be without effect: SigLIP's pooling head in
    transformers' layout, and buffers that older releases stored."""
    return bool(re.search(r"^model\.vision_model\.head\.|\.rotary_emb\.inv_freq$|\.embeddings\.position_ids$", key))


def _names(config: VLConfig, column: int) -> dict[str, str]:
    """Our prefix -> a layout's prefix; `*` is a layer's number."""
    high = ("vision_model.vision_tower_high.vision_tower", "model.high_res_vision_model.vision_encoder")
    low = (f"vision_model.vision_tower{'_low.vision_tower' if config.sam else ''}", "model.vision_model")
    rows = [
        ("vision.sam", *high),
        ("vision.sam.patch_embed", f"{high[0]}.patch_embed.proj", f"{high[1]}.patch_embed.projection"),
        ("vision.sam.blocks.*", f"{high[0]}.blocks.*", f"{high[1]}.layers.*"),
        ("vision.sam.blocks.*.norm1", f"{high[0]}.blocks.*.norm1", f"{high[1]}.layers.*.layer_norm1"),
        ("vision.sam.blocks.*.norm2", f"{high[0]}.blocks.*.norm2", f"{high[1]}.layers.*.layer_norm2"),
        ("vision.sam.blocks.*.mlp.fc1", f"{high[0]}.blocks.*.mlp.lin1", f"{high[1]}.layers.*.mlp.lin1"),
        ("vision.sam.blocks.*.mlp.fc2", f"{high[0]}.blocks.*.mlp.lin2", f"{high[1]}.layers.*.mlp.lin2"),
        *_neck_names("vision.sam.neck", f"{high[0]}.neck", f"{high[1]}.neck"),
        *_neck_names("vision.sam.skip_neck", f"{high[0]}.neck_hd", "model.high_res_vision_neck"),
        ("vision.downsample.conv1", f"{high[0]}.downsamples.0", "model.high_res_vision_proj.conv1"),
        ("vision.downsample.conv2", f"{high[0]}.downsamples.1", "model.high_res_vision_proj.conv2"),
        ("vision.downsample.alpha", f"{high[0]}.hd_alpha_downsamples", "model.high_res_vision_alpha"),
        ("vision.siglip", *low),
        ("vision.siglip.pos_embed", f"{low[0]}.pos_embed", f"{low[1]}.embeddings.position_embedding.weight"),
        ("vision.siglip.patch_embed", f"{low[0]}.patch_embed.proj", f"{low[1]}.embeddings.patch_embedding"),
        ("vision.siglip.blocks.*", f"{low[0]}.blocks.*", f"{low[1]}.encoder.layers.*"),
        ("vision.siglip.blocks.*.norm1", f"{low[0]}.blocks.*.norm1", f"{low[1]}.encoder.layers.*.layer_norm1"),
        ("vision.siglip.blocks.*.norm2", f"{low[0]}.blocks.*.norm2", f"{low[1]}.encoder.layers.*.layer_norm2"),
        ("vision.siglip.blocks.*.attn", f"{low[0]}.blocks.*.attn", f"{low[1]}.encoder.layers.*.self_attn"),
        (
            "vision.siglip.blocks.*.attn.proj",
            f"{low[0]}.blocks.*.attn.proj",
            f"{low[1]}.encoder.layers.*.self_attn.out_proj",
        ),
        ("vision.siglip.norm", f"{low[0]}.norm", f"{low[1]}.post_layernorm"),
        (UNUSED, "vision_model", ""),
        (f"{UNUSED}.attn_pool", f"{low[0]}.attn_pool", ""),
        ("adaptor", "aligner", "model.aligner"),
        *_adaptor_names(config.adaptor),
        ("language", "language_model.model", "model.language_model"),
        ("lm_head", "language_model.lm_head", "lm_head"),
    ]
    return {row[0]: row[1 + column] for row in rows}


def _neck_names(ours: str, original: str, transformers: str) -> list[tuple[str, str, str]]:
    layers = (("conv1", "conv1"), ("norm1", "layer_norm1"), ("conv2", "conv2"), ("norm2", "layer_norm2"))
    return [(f"{ours}.{name}", f"{original}.{i}", f"{transformers}.{other}") for i, (name, other) in enumerate(layers)]


def _adaptor_names(kind: str) -> list[tuple[str, str, str]]:
    """The public adaptors; the ablations have names of our own in both layouts."""
    if kind == "hybrid":
        return [
            ("adaptor.high", "aligner.high_up_proj", "model.aligner.high_res_vision_proj"),
            ("adaptor.low", "aligner.low_up_proj", "model.aligner.vision_proj"),
            ("adaptor.out", "aligner.layers.1", "model.aligner.proj"),
        ]
    if kind == "mlp_gelu":
        return [
            ("adaptor.fc1", "aligner.layers.0", "model.aligner.linear1"),
            ("adaptor.fc2", "aligner.layers.2", "model.aligner.linear2"),
        ]
    return []


def _rename(name: str, table: dict[str, str]) -> str:
    """`name` with the longest of its prefixes in `table` replaced."""
    number = re.search(r"blocks\.(\d+)\.", name)
    general = re.sub(r"blocks\.\d+\.", "blocks.*.", name)
    prefix = general
    while prefix not in table:
        prefix = prefix.rpartition(".")[0]
    renamed = table[prefix] + general.removeprefix(prefix)
    return renamed.replace("*", number[1]) if number else renamed


def _transformers_siglip(name: str, shape: Shape, key: str) -> list[Binding]:
    """transformers splits q, k and v, which we and the original layout keep in one weight, and has flat positions."""
    if ".qkv." not in name:
        return [Binding(key, shape[1:] if name.endswith("pos_embed") else shape, name)]
    size = shape[0] // 3
    return [
        Binding(key.replace(".qkv.", f".{part}_proj."), (size, *shape[1:]), name, slice(i * size, (i + 1) * size))
        for i, part in enumerate("qkv")
    ]
