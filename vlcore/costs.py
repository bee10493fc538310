"""What a model costs: parameters, memory, FLOPs of each part, and KV cache a token. Counted from the config alone.

A FLOP is one multiplication or one addition of a matrix product, convolution or attention; elementwise work is left
out. Causal attention counts the pairs it needs, T (T + 1) / 2, and window attention the real queries against whole
windows, as `vlcore.ops` may compute it; the public SAM also computes what it pads and crops (4 % more at 64 x 64).
"""

from typing import Any

from vlcore import layouts
from vlcore.config import PARTS, LlamaConfig, SamConfig, SiglipConfig, VLConfig

TEXT_TOKENS = 512  # beside one image, in the prefill that is described
BYTES = {"float32": 4, "bfloat16": 2}


def describe(config: VLConfig) -> dict[str, Any]:
    """The costs of a model, ready for JSON.

    Returns:
        parameters: count of each part and "total"; what checkpoints hold and nobody applies is not counted.
        memory_bytes: of the weights, by dtype.
        kv_cache_bytes_per_token: by dtype.
        flops: "image" by part for one image; "prefill" of `prefill_tokens` tokens, one image and 512 of text, with the
            head on the last row; "decode" of the token behind them.
    """
    parameters = _parameters(config)
    prefill_tokens = config.num_image_tokens + TEXT_TOKENS
    image = image_flops(config)
    language = config.language
    kv_values = 2 * language.num_layers * language.num_kv_heads * language.head_dim
    return {
        "image_size": config.image_size,
        "image_tokens": config.num_image_tokens,
        "parameters": parameters | {"total": sum(parameters.values())},
        "memory_bytes": {dtype: size * sum(parameters.values()) for dtype, size in BYTES.items()},
        "kv_cache_bytes_per_token": {dtype: size * kv_values for dtype, size in BYTES.items()},
        "flops": {
            "image": image | {"total": sum(image.values())},
            "prefill_tokens": prefill_tokens,
            "prefill": llama_flops(language, prefill_tokens) + head_flops(language, 1),
            "decode": llama_flops(language, 1, prefill_tokens) + head_flops(language, 1),
        },
    }


def render(description: dict[str, Any]) -> str:
    """`describe`'s result as lines of text."""
    flops = description["flops"]
    lines = [f"image      {description['image_size']}² pixels -> {description['image_tokens']} tokens", ""]
    lines.append(f"{'part':<10} {'parameters':>14} {'FLOPs an image':>16}")
    for part, count in description["parameters"].items():
        work = _scaled(flops["image"][part], 1000, "FLOP") if part in flops["image"] else ""
        lines.append(f"{part:<10} {count:>14,} {work:>16}")
    lines.append("")
    for dtype in BYTES:
        weights = _scaled(description["memory_bytes"][dtype], 1024, "B")
        cache = _scaled(description["kv_cache_bytes_per_token"][dtype], 1024, "B")
        lines.append(f"{dtype:<10} {weights:>12} of weights {cache:>12} of KV cache a token")
    lines.append("")
    lines.append(f"prefill    {_scaled(flops['prefill'], 1000, 'FLOP')} for {flops['prefill_tokens']} tokens")
    lines.append(f"decode     {_scaled(flops['decode'], 1000, 'FLOP')} for the token behind them")
    return "\n".join(lines)


def image_flops(config: VLConfig) -> dict[str, int]:
    """FLOPs of one image through each part: necks are SAM's, the two stride-2 convolutions the adaptor's."""
    tokens, width = config.num_image_tokens, config.language.hidden_size
    low = config.siglip.hidden_size
    if config.sam is None:
        return {"siglip": _siglip(config.siglip), "adaptor": _mlp_adaptor(tokens, low, width)}
    high = config.sam.output_size
    adaptor = {
        "hybrid": 2 * tokens * ((high + low) * (width // 2) + width**2),
        "shared": 2 * _mlp_adaptor(tokens, low, width // 2),
        "separate": _mlp_adaptor(tokens, high, width // 2) + _mlp_adaptor(tokens, low, width // 2),
    }[config.adaptor]
    return {
        "sam": _sam(config.sam),
        "siglip": _siglip(config.siglip),
        "adaptor": _downsample(config.sam, config.siglip.grid) + adaptor,
    }


def llama_flops(config: LlamaConfig, num_tokens: int, num_cached: int = 0) -> int:
    """FLOPs of the language model, without its head, on `num_tokens` tokens behind `num_cached` ones."""
    query_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    weights = config.hidden_size * (2 * query_size + 2 * kv_size + 3 * config.intermediate_size)
    pairs = num_tokens * num_cached + num_tokens * (num_tokens + 1) // 2
    return config.num_layers * (2 * num_tokens * weights + 4 * pairs * query_size)


def head_flops(config: LlamaConfig, num_rows: int) -> int:
    """FLOPs of the head on `num_rows` hidden states."""
    return 2 * num_rows * config.hidden_size * config.vocab_size


def _parameters(config: VLConfig) -> dict[str, int]:
    counts = dict.fromkeys(PARTS.values(), 0)
    for name, shape in layouts.parameters(config):
        part = next((part for prefix, part in PARTS.items() if name.startswith(prefix)), None)
        if part:
            size = 1
            for side in shape:
                size *= side
            counts[part] += size
    return {part: count for part, count in counts.items() if count}


def _vit_linears(config: SiglipConfig | SamConfig) -> int:
    """FLOPs of the patch convolution and of every linear map of the blocks."""
    tokens, size = config.grid**2, config.hidden_size
    patches = 2 * tokens * size * 3 * config.patch_size**2
    return patches + config.num_layers * 2 * tokens * size * (4 * size + 2 * config.intermediate_size)


def _siglip(config: SiglipConfig) -> int:
    return _vit_linears(config) + config.num_layers * 4 * config.num_tokens**2 * config.hidden_size


def _sam(config: SamConfig) -> int:
    tokens, size, channels = config.grid**2, config.hidden_size, config.neck_channels
    num_global = len(set(config.global_layers))
    # Scores and values over all keys, and each query against the positions along a row and a column.
    over_map = 4 * tokens**2 * size + 4 * tokens * config.grid * size
    in_windows = 4 * tokens * config.window_size**2 * size + 4 * tokens * config.window_size * size
    attention = num_global * over_map + (config.num_layers - num_global) * in_windows
    necks = 2 * 2 * tokens * channels * (size + 9 * channels)
    return _vit_linears(config) + attention + necks


def _downsample(config: SamConfig, grid: int) -> int:
    channels = config.neck_channels
    return 2 * 9 * 2 * channels**2 * ((2 * grid) ** 2 + 4 * grid**2)


def _mlp_adaptor(tokens: int, in_size: int, size: int) -> int:
    return 2 * tokens * (in_size * size + size**2)


def _scaled(value: float, step: int, unit: str) -> str:
    prefixes = ["", "k", "M", "G", "T"] if step == 1000 else ["", "Ki", "Mi", "Gi", "Ti"]
    while value >= step and len(prefixes) > 1:
        value /= step
        prefixes.pop(0)
    return f"{value:.4g} {prefixes[0]}{unit}"
