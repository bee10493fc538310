"""Training data: sources, mixtures of them, and the loader that turns a mixture into batches."""

from vlcore.data.conversations import JsonlConversations
from vlcore.data.documents import JsonlDocuments, JsonlText
from vlcore.data.encode import Encoder
from vlcore.data.loader import Loader, Portion, Rejection
from vlcore.data.mixture import Augment, Entry, Mixture
from vlcore.data.sample import BadSample, Modality, Overlong, Sample, Source
from vlcore.data.sampler import Draw, Sampler

__all__ = [
    "Augment",
    "BadSample",
    "Draw",
    "Encoder",
    "Entry",
    "JsonlConversations",
    "JsonlDocuments",
    "JsonlText",
    "Loader",
    "Mixture",
    "Modality",
    "Overlong",
    "Portion",
    "Rejection",
    "Sample",
    "Sampler",
    "Source",
]
