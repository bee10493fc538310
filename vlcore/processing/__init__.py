"""Text and images in, tensors out; no model in sight."""

from vlcore.processing.batch import Batch, collate, pack
from vlcore.processing.chat import ChatTemplate, read_conversation
from vlcore.processing.colors import ImageError
from vlcore.processing.images import ImageSettings, load_image, to_pixels
from vlcore.processing.processor import Processor
from vlcore.processing.segments import IGNORE_INDEX, Encoded

__all__ = [
    "IGNORE_INDEX",
    "Batch",
    "ChatTemplate",
    "Encoded",
    "ImageError",
    "ImageSettings",
    "Processor",
    "collate",
    "load_image",
    "pack",
    "read_conversation",
    "to_pixels",
]
