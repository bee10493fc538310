"""The operators that the models are built from; each picks the fastest kernel that can run its inputs."""

from vlcore.ops.add_rms_norm import add_rms_norm
from vlcore.ops.apply_rope import apply_rope
from vlcore.ops.attention import attention
from vlcore.ops.decode_attention import decode_attention
from vlcore.ops.decode_block import BlockWeights, decode_block
from vlcore.ops.downsample_features import downsample_features
from vlcore.ops.hybrid_adaptor import hybrid_adaptor
from vlcore.ops.layer_norm import layer_norm
from vlcore.ops.linear import linear
from vlcore.ops.linear_cross_entropy import linear_cross_entropy
from vlcore.ops.quantized_linear import GROUP_SIZES, QuantizedWeight, quantize_weight, quantized_linear
from vlcore.ops.rel_pos_attention import rel_pos_attention
from vlcore.ops.rms_norm import rms_norm
from vlcore.ops.rope_attention import rope_attention
from vlcore.ops.swiglu import swiglu
from vlcore.ops.window_attention import window_attention

__all__ = [
    "GROUP_SIZES",
    "BlockWeights",
    "QuantizedWeight",
    "add_rms_norm",
    "apply_rope",
    "attention",
    "decode_attention",
    "decode_block",
    "downsample_features",
    "hybrid_adaptor",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "quantize_weight",
    "quantized_linear",
    "rel_pos_attention",
    "rms_norm",
    "rope_attention",
    "swiglu",
    "window_attention",
]
