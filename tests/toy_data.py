"""Small training data: sources in memory, and files of every kind with drawn images."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from vlcore.data import BadSample, Entry, Mixture, Sample

WORDS = ("cat", "mat", "red", "sat", "blue", "tree", "house", "three", "under", "with")


class Listed:
    """A source of given samples; None stands for a bad one."""

    def __init__(self, name, modality, samples):
        self.name, self.modality, self.samples = name, modality, samples

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        if self.samples[index] is None:
            raise BadSample("it is broken", f"{self.name}-{index}")
        return self.samples[index]


def sentence(number, length=None):
    rng = np.random.default_rng(number)
    return " ".join(rng.choice(WORDS, length or int(rng.integers(3, 12))))


def texts(name="articles", count=20, length=None):
    samples = [Sample(id=f"{name}-{i}", modality="text", document=[sentence(i, length)]) for i in range(count)]
    return Listed(name, "text", samples)


def square(number, size=24):
    """An image of one colour with a darker corner, a function of the number."""
    pixels = np.random.default_rng(number).integers(60, 256, 3, dtype=np.uint8) * np.ones((size, size, 1), np.uint8)
    pixels[: size // 2, : size // 3] //= 2
    return Image.fromarray(pixels)


def captions(name="captions", count=20):
    samples = [
        Sample(id=f"{name}-{i}", modality="multimodal", document=[square(i), sentence(100 + i)]) for i in range(count)
    ]
    return Listed(name, "multimodal", samples)


def instructions(name="instructions", count=20):
    samples = []
    for i in range(count):
        question = [{"type": "image", "image": square(i)}, {"type": "text", "text": "What is this?"}]
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": sentence(200 + i)}]
        samples.append(Sample(id=f"{name}-{i}", modality="multimodal", conversation=turns))
    return Listed(name, "multimodal", samples)


def mixture(**weights):
    """A mixture of the sources above by name, such as mixture(captions=3, articles=7)."""
    makers = {"articles": texts, "captions": captions, "instructions": instructions}
    return Mixture(entries=tuple(Entry(source=makers[name](), weight=weight) for name, weight in weights.items()))


def write_jsonl(path: Path, rows) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path
