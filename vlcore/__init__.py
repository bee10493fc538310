"""DeepSeek-VL on compiled kernels."""

from vlcore import ops
from vlcore.checkpoint import from_pretrained, save_pretrained
from vlcore.config import VLConfig
from vlcore.cuda_graph import CudaGraphs
from vlcore.generate import generate
from vlcore.models.deepseek_vl import DeepSeekVL
from vlcore.models.quantized import quantize
from vlcore.processing import Processor

__version__ = "0.1.0"

__all__ = [
    "CudaGraphs",
    "DeepSeekVL",
    "Processor",
    "VLConfig",
    "from_pretrained",
    "generate",
    "ops",
    "quantize",
    "save_pretrained",
]
