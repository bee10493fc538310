"""The model's parameters and their shapes, by our own names, in the order of the public checkpoints."""

from collections.abc import Iterator

from vlcore.config import LlamaConfig, SamConfig, SiglipConfig, VLConfig

UNUSED = "(unused)"  # stands before what only the original checkpoints hold, and nobody applies

Shape = tuple[int, ...]
Shapes = Iterator[tuple[str, Shape]]


def parameters(config: VLConfig) -> Shapes:
    """Our parameters and their shapes, and under UNUSED what only the original checkpoints hold."""
    if config.sam:
        yield from _sam(config.sam)
    yield from _siglip(config.siglip)
    yield from _unused(config)
    yield from _adaptor(config)
    yield from llama_parameters(config.language)


def _sam(config: SamConfig) -> Shapes:
    size, channels, head_dim = config.hidden_size, config.neck_channels, config.hidden_size // config.num_heads
    yield "vision.sam.pos_embed", (1, config.grid, config.grid, size)
    yield "vision.downsample.alpha", (1,)
    yield from _affine("vision.sam.patch_embed", size, 3, config.patch_size, config.patch_size)
    for i in range(config.num_layers):
        block = f"vision.sam.blocks.{i}"
        num_offsets = 2 * (config.grid if i in config.global_layers else config.window_size) - 1
        yield from _affine(f"{block}.norm1", size)
        yield f"{block}.attn.rel_pos_h", (num_offsets, head_dim)
        yield f"{block}.attn.rel_pos_w", (num_offsets, head_dim)
        yield from _block_linears(block, size, config.intermediate_size)
    yield from _neck("vision.sam.neck", size, channels)
    yield "vision.downsample.conv1.weight", (2 * channels, channels, 3, 3)
    yield "vision.downsample.conv2.weight", (4 * channels, 2 * channels, 3, 3)
    yield from _neck("vision.sam.skip_neck", size, channels)


def _siglip(config: SiglipConfig) -> Shapes:
    size = config.hidden_size
    yield "vision.siglip.pos_embed", (1, config.num_tokens, size)
    yield from _affine("vision.siglip.patch_embed", size, 3, config.patch_size, config.patch_size)
    for i in range(config.num_layers):
        block = f"vision.siglip.blocks.{i}"
        yield from _affine(f"{block}.norm1", size)
        yield from _block_linears(block, size, config.intermediate_size)
    yield from _affine("vision.siglip.norm", size)


def _block_linears(block: str, size: int, hidden_size: int) -> Shapes:
    yield from _affine(f"{block}.attn.qkv", 3 * size, size)
    yield from _affine(f"{block}.attn.proj", size, size)
    yield from _affine(f"{block}.norm2", size)
    yield from _affine(f"{block}.mlp.fc1", hidden_size, size)
    yield from _affine(f"{block}.mlp.fc2", size, hidden_size)


def _neck(neck: str, size: int, channels: int) -> Shapes:
    yield f"{neck}.conv1.weight", (channels, size, 1, 1)
    yield from _affine(f"{neck}.norm1", channels)
    yield f"{neck}.conv2.weight", (channels, channels, 3, 3)
    yield from _affine(f"{neck}.norm2", channels)


def _unused(config: VLConfig) -> Shapes:
    size, pool = config.siglip.hidden_size, f"{UNUSED}.attn_pool"
    yield f"{pool}.latent", (1, 1, size)
    yield from _affine(f"{pool}.q", size, size)
    yield from _affine(f"{pool}.kv", 2 * size, size)
    yield from _affine(f"{pool}.proj", size, size)
    yield from _affine(f"{pool}.norm", size)
    yield from _affine(f"{pool}.mlp.fc1", config.siglip.intermediate_size, size)
    yield from _affine(f"{pool}.mlp.fc2", size, config.siglip.intermediate_size)
    if config.sam:
        yield from _affine(f"{UNUSED}.high_layer_norm", config.sam.output_size)
        yield from _affine(f"{UNUSED}.low_layer_norm", size)


def _adaptor(config: VLConfig) -> Shapes:
    low, size = config.siglip.hidden_size, config.language.hidden_size
    if config.sam is None:
        yield from _mlp_adaptor("adaptor", low, size)
    elif config.adaptor == "hybrid":
        yield from _affine("adaptor.high", size // 2, config.sam.output_size)
        yield from _affine("adaptor.low", size // 2, low)
        yield from _affine("adaptor.out", size, size)
    elif config.adaptor == "shared":
        yield from _mlp_adaptor("adaptor.both", low, size // 2)
    else:
        yield from _mlp_adaptor("adaptor.high", config.sam.output_size, size // 2)
        yield from _mlp_adaptor("adaptor.low", low, size // 2)


def _mlp_adaptor(name: str, in_size: int, size: int) -> Shapes:
    yield from _affine(f"{name}.fc1", size, in_size)
    yield from _affine(f"{name}.fc2", size, size)


def llama_parameters(config: LlamaConfig) -> Shapes:
    """A language model's parameters and their shapes, the head included unless it is tied."""
    size, hidden_size = config.hidden_size, config.intermediate_size
    query_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    yield "language.embed_tokens.weight", (config.vocab_size, size)
    for i in range(config.num_layers):
        layer = f"language.layers.{i}"
        yield f"{layer}.self_attn.q_proj.weight", (query_size, size)
        yield f"{layer}.self_attn.k_proj.weight", (kv_size, size)
        yield f"{layer}.self_attn.v_proj.weight", (kv_size, size)
        yield f"{layer}.self_attn.o_proj.weight", (size, query_size)
        yield f"{layer}.mlp.gate_proj.weight", (hidden_size, size)
        yield f"{layer}.mlp.up_proj.weight", (hidden_size, size)
        yield f"{layer}.mlp.down_proj.weight", (size, hidden_size)
        yield f"{layer}.input_layernorm.weight", (size,)
        yield f"{layer}.post_attention_layernorm.weight", (size,)
    yield "language.norm.weight", (size,)
    if not config.tie_embeddings:
        yield "lm_head.weight", (config.vocab_size, size)


def _affine(name: str, *weight_shape: int) -> Shapes:
    yield f"{name}.weight", weight_shape
    yield f"{name}.bias", weight_shape[:1]
