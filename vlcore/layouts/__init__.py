"""The two public layouts of a DeepSeek-VL directory: the original one and transformers'. No torch in sight."""

from vlcore.layouts.configs import config_from_dict, config_to_dict, read_config, read_llama_config
from vlcore.layouts.files import StoredTensor, read_json, stored_tensors, weight_keys
from vlcore.layouts.llama_config import eos_to_json
from vlcore.layouts.shapes import parameters
from vlcore.layouts.weights import (
    LAYOUTS,
    Binding,
    bindings,
    detect_layout,
    is_never_applied,
    llama_bindings,
    own_bindings,
    weight_table,
)

__all__ = [
    "LAYOUTS",
    "Binding",
    "StoredTensor",
    "bindings",
    "config_from_dict",
    "config_to_dict",
    "detect_layout",
    "eos_to_json",
    "is_never_applied",
    "llama_bindings",
    "own_bindings",
    "parameters",
    "read_config",
    "read_json",
    "read_llama_config",
    "stored_tensors",
    "weight_keys",
    "weight_table",
]
