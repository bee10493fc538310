"""Which sources are trained on, and in what ratio."""

from collections.abc import Callable
from dataclasses import dataclass
from math import isfinite

import numpy as np
from PIL import Image

from vlcore.data.sample import MODALITIES, Source

Augment = Callable[[Image.Image, np.random.Generator], Image.Image]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A source and its share of the mixture.

    Attributes:
        source: what is drawn from.
        weight: share of the samples drawn, relative to the other entries; the paper counts in percent.
        augment: changes each image drawn, given a generator that depends on the seed, the step and the place in the
            batch alone. A sample at which it fails is bad. It must be picklable where worker processes are spawned.
    """

    source: Source
    weight: float = 1.0
    augment: Augment | None = None

    def __post_init__(self):
        name = self.source.name
        if not (isfinite(self.weight) and self.weight > 0):
            raise ValueError(f"Entry {name!r}: weight {self.weight} must be finite and over zero.")
        if self.source.modality not in MODALITIES:
            raise ValueError(f"Entry {name!r}: modality {self.source.modality!r} is none of {MODALITIES}.")
        if len(self.source) == 0:
            raise ValueError(f"Entry {name!r}: the source is empty.")


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """Sources drawn from by weight. The unit of the ratio is the sample drawn (the paper does not say)."""

    entries: tuple[Entry, ...]

    def __post_init__(self):
        names = [entry.source.name for entry in self.entries]
        if not names:
            raise ValueError("Mixture: there are no entries.")
        if len(set(names)) < len(names):
            raise ValueError(f"Mixture: each source needs a name of its own, given {names}.")

    @property
    def text_share(self) -> float:
        """The part of the weights that lies on text sources."""
        weights = {modality: 0.0 for modality in MODALITIES}
        for entry in self.entries:
            weights[entry.source.modality] += entry.weight
        return weights["text"] / sum(weights.values())
