"""The language model's part of a config.json: transformers' LlamaConfig, whatever the layout of the rest."""

from vlcore.config import LlamaConfig
from vlcore.layouts.fields import Fields, Json

DEEPSEEK_VOCABULARY = 102400


def llama_from_dict(fields: Fields) -> LlamaConfig:
    """The config that an object in transformers' terms describes; what it leaves out has LlamaConfig's defaults there.

    Raises:
        ValueError: a field of the wrong type, or a variant that this package does not compute.
    """
    fields.require("model_type", "llama", "llama")
    fields.require("hidden_act", "silu", "silu")
    fields.require("attention_bias", False, False)
    fields.require("mlp_bias", False, False)
    rope = fields.section("rope_parameters") if fields.raw.get("rope_parameters") else fields.section("rope_scaling")
    kind = rope.raw.get("rope_type", rope.raw.get("type", "default"))
    for section in (fields, rope):
        section.require("partial_rotary_factor", 1, 1)
    if kind != "default":
        raise ValueError(f"{rope.where} asks for {kind!r}; this package computes unscaled rotary positions only.")
    vocab_size, hidden_size = fields.get("vocab_size", 32000), fields.get("hidden_size", 4096)
    num_heads = fields.get("num_attention_heads", 32)
    bos, (eos, *others) = special_ids(fields, vocab_size)
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=fields.get("intermediate_size", 11008),
        num_layers=fields.get("num_hidden_layers", 32),
        num_heads=num_heads,
        num_kv_heads=fields.get("num_key_value_heads", num_heads),
        head_dim=fields.get("head_dim", hidden_size // max(num_heads, 1)),
        rope_theta=rope.get("rope_theta", fields.get("rope_theta", 1e4)),
        rms_norm_eps=fields.get("rms_norm_eps", 1e-6),
        max_positions=fields.get("max_position_embeddings", 2048),
        tie_embeddings=fields.get("tie_word_embeddings", False),
        bos_token_id=bos,
        eos_token_id=eos,
        pad_token_id=fields.get("pad_token_id", eos),
        other_eos_token_ids=tuple(others),
    )


def special_ids(fields: Fields, vocab_size: int) -> tuple[int, tuple[int, ...]]:
    """Beginning of text, and the ids that end it, the first of which is the one written behind an answer.

    With DeepSeek's vocabulary LlamaConfig's defaults 1 and 2 are wrong, even written.
    """
    bos, default = fields.get("bos_token_id", 1), 2
    several = isinstance(ends := fields.raw.get("eos_token_id"), list) and ends
    eos, *others = fields.get("eos_token_id", (default,)) if several else [fields.get("eos_token_id", default)]
    if vocab_size == DEEPSEEK_VOCABULARY and (bos, eos) == (1, default):
        bos, eos = 100000, 100001
    return bos, tuple(dict.fromkeys([eos, *others]))


def eos_to_json(config: LlamaConfig) -> int | list[int]:
    """`eos_token_id` as config.json and generation_config.json have it: a list where several ids end an answer."""
    others = config.other_eos_token_ids
    return [config.eos_token_id, *others] if others else config.eos_token_id


def llama_to_dict(config: LlamaConfig) -> Json:
    """In transformers' terms, as both layouts write it; rope_theta for its releases 4 and rope_parameters for 5."""
    return {
        "model_type": "llama",
        "attention_bias": False,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": eos_to_json(config),
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_positions,
        "mlp_bias": False,
        "num_attention_heads": config.num_heads,
        "num_hidden_layers": config.num_layers,
        "num_key_value_heads": config.num_kv_heads,
        "pad_token_id": config.pad_token_id,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_embeddings,
        "vocab_size": config.vocab_size,
    }
