"""The model: plain torch modules written with vlcore.ops, one file a part."""

from vlcore.models.deepseek_vl import DeepSeekVL, VLOutput
from vlcore.models.initialization import init_weights
from vlcore.models.llama import Llama
from vlcore.models.quantized import quantize, quantized_name
from vlcore.models.vision import TowerFeatures

__all__ = ["DeepSeekVL", "Llama", "TowerFeatures", "VLOutput", "init_weights", "quantize", "quantized_name"]
