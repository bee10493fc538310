"""Weights on disk, in either public layout, to and from the model."""

from vlcore.checkpoint.reading import from_pretrained, load_llama
from vlcore.checkpoint.replacing import replacing_directory
from vlcore.checkpoint.writing import save_pretrained, write_config

__all__ = ["from_pretrained", "load_llama", "replacing_directory", "save_pretrained", "write_config"]
