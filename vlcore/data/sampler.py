"""Which samples a step draws, as a pure function of the seed and the step: to resume is to know one integer.

Three things are decided in closed form, so nothing has to be replayed, and processes that shared a step's draws would
agree on them without talking (the trainer is one process today):

* the step's modality: one number a step from a counter-based generator, compared with the text share of that step;
* a draw's entry: draws of one modality are numbered, and draw n goes to the first entry with weight w (relative to
  those after it) where floor((n + 1) w + 1/2) steps past floor(n w + 1/2), else on to the rest with the draws counted
  anew; so every entry's share is exact to one draw, and its own draws are numbered without gaps;
* the sample: permutation(seed, epoch, entry)[position], for the entry's draw number = epoch * len(source) + position.
"""

from dataclasses import dataclass, replace

import numpy as np

from vlcore.data.mixture import Mixture
from vlcore.data.sample import Modality

_MODALITY, _PERMUTATION, _ORDER, _AUGMENT, _REPLACEMENT = range(5)
_WEIGHT_BITS = 32


@dataclass(frozen=True)
class Draw:
    """One sample drawn: `index` of the source of `entry`, for place `slot` of the global batch of `step`."""

    step: int
    slot: int
    entry: int
    position: int
    index: int


class Sampler:
    """The draws of one stage.

    Args:
        mixture: what is drawn from.
        steps: global steps of the stage.
        samples_per_step: draws of one global step.
        seed: of the run.
        stage: tells apart the stages of a run, which draw independently.
        text_ratio: share of text, by steps when grouping and by samples otherwise; None takes it from the weights.
        modality_warmup: fraction of the steps over which the share of text falls linearly from 1 to its ratio.
        grouping: every global step is all text or all multimodal.
        rank, world: only the rank-th of `world` equal shares of each step's draws is taken. The draws of a step do not
            depend on them. The trainer takes all.

    Raises:
        ValueError: a share is asked of a modality of which the mixture has no source, or a number is out of range.
    """

    def __init__(
        self,
        mixture: Mixture,
        *,
        steps: int,
        samples_per_step: int,
        seed: int = 0,
        stage: int = 0,
        text_ratio: float | None = None,
        modality_warmup: float = 0.0,
        grouping: bool = True,
        rank: int = 0,
        world: int = 1,
    ):
        if not 0 <= rank < world:
            raise ValueError(f"Sampler: rank {rank} is not in 0..{world - 1}.")
        if samples_per_step < world:
            raise ValueError(f"Sampler: {samples_per_step} samples a step leave some of {world} ranks without any.")
        self.mixture, self.steps, self.samples_per_step = mixture, steps, samples_per_step
        self.seed, self.stage, self.grouping = seed, stage, grouping
        self.slots = range(samples_per_step * rank // world, samples_per_step * (rank + 1) // world)
        self._text, self._images = (_Interleaving(mixture, modality) for modality in ("text", "multimodal"))
        self._text_before = self._count_text(text_share(mixture, steps, text_ratio, modality_warmup))
        self._permutations: dict[tuple[int, int], np.ndarray] = {}

    def _count_text(self, share: np.ndarray) -> np.ndarray:
        """(steps + 1,) text draws before each step."""
        if self.grouping:
            # Number t of this stream depends on the key and t alone, however many are drawn.
            is_text = self._generator(_MODALITY).random(self.steps) < share
            before = np.cumsum(is_text * self.samples_per_step)
        else:
            before = np.floor(np.cumsum(share) * self.samples_per_step + 0.5)
        return np.concatenate([[0], before]).astype(np.int64)

    def text_samples(self, step: int) -> int:
        """How many of the step's draws are text."""
        return int(self._text_before[step + 1] - self._text_before[step])

    def modality(self, step: int) -> str:
        """ "text", "multimodal", or "mixed" where a step without grouping draws both."""
        text = self.text_samples(step)
        return "text" if text == self.samples_per_step else "multimodal" if text == 0 else "mixed"

    def draws(self, step: int, start: int = 0, stop: int | None = None) -> list[Draw]:
        """This rank's draws of a global step, in an order shuffled anew each step; of them, `start` to `stop`."""
        if not 0 <= step < self.steps:
            raise ValueError(f"Sampler: step {step} is not in 0..{self.steps - 1}.")
        text, text_before = self.text_samples(step), int(self._text_before[step])
        images_before = step * self.samples_per_step - text_before
        order = self._generator(_ORDER, step).permutation(self.samples_per_step)
        result = []
        for slot in self.slots[start:stop]:
            number = int(order[slot])
            if number < text:
                entry, position = self._text.locate(text_before + number)
            else:
                entry, position = self._images.locate(images_before + number - text)
            result.append(Draw(step, slot, entry, position, self._index(entry, position)))
        return result

    def replacement(self, draw: Draw, attempt: int) -> Draw:
        """What stands in for a draw that turned out bad: a random sample of the same source, the same on every run."""
        size = len(self.mixture.entries[draw.entry].source)
        generator = self._generator(_REPLACEMENT, draw.step, draw.slot, attempt)
        return replace(draw, index=int(generator.integers(size)))

    def augmentation(self, draw: Draw, attempt: int = 0) -> np.random.Generator:
        """The generator for the augmentation of this draw, or of its replacement."""
        return self._generator(_AUGMENT, draw.step, draw.slot, attempt)

    def _index(self, entry: int, position: int) -> int:
        epoch, offset = divmod(position, len(self.mixture.entries[entry].source))
        return int(self._permutation(entry, epoch)[offset])

    def _permutation(self, entry: int, epoch: int) -> np.ndarray:
        if (entry, epoch) not in self._permutations:
            # A step may reach into the next epoch, and its order is shuffled: two epochs are held.
            for stale in [key for key in self._permutations if key[0] == entry and abs(key[1] - epoch) > 1]:
                del self._permutations[stale]
            size = len(self.mixture.entries[entry].source)
            self._permutations[entry, epoch] = self._generator(_PERMUTATION, entry, epoch).permutation(size)
        return self._permutations[entry, epoch]

    def _generator(self, purpose: int, *numbers: int) -> np.random.Generator:
        """A generator whose stream depends on the seed, the stage, the purpose and up to three numbers alone."""
        # Philox counts up in the first word of its counter; the numbers fill the other three.
        counter = [0, *numbers, *[0] * (3 - len(numbers))]
        return np.random.Generator(np.random.Philox(key=[self.seed, purpose | self.stage << 8], counter=counter))


def text_share(mixture: Mixture, steps: int, ratio: float | None, warmup: float) -> np.ndarray:
    """(steps,) share of text at each step: from 1 down to `ratio` over the first `warmup` of the steps, then level.

    Raises:
        ValueError: a share outside [0, 1], or of a modality that the mixture lacks.
    """
    target = mixture.text_share if ratio is None else ratio
    if not (0 <= target <= 1 and 0 <= warmup <= 1):
        raise ValueError(f"text_ratio {target} and modality_warmup {warmup} must be in 0..1.")
    if mixture.text_share == 0 and (target > 0 or warmup > 0):
        raise ValueError(f"text_ratio {target} with modality_warmup {warmup} needs text, but no source is text.")
    if mixture.text_share == 1 and target < 1:
        raise ValueError(f"text_ratio {target} needs images, but every source is text.")
    progress = np.arange(steps) / max(1.0, warmup * steps) if warmup > 0 else np.ones(steps)
    return 1 - (1 - target) * np.minimum(1, progress)


class _Interleaving:
    """Deals the numbers 0, 1, 2, ... to the entries of one modality by weight, in closed form."""

    def __init__(self, mixture: Mixture, modality: Modality):
        self.entries = [i for i, entry in enumerate(mixture.entries) if entry.source.modality == modality]
        weights = [mixture.entries[i].weight for i in self.entries]
        remaining = [sum(weights[i:]) for i in range(len(weights))]
        # In fixed point, so that floor() is exact for any number of draws.
        self.shares = [round(w / total * 2**_WEIGHT_BITS) for w, total in zip(weights, remaining, strict=True)]

    def locate(self, number: int) -> tuple[int, int]:
        """The entry that draw `number` goes to, and how many draws went to that entry before."""
        half = 1 << (_WEIGHT_BITS - 1)
        for entry, share in zip(self.entries, self.shares, strict=True):
            before = (number * share + half) >> _WEIGHT_BITS
            if ((number + 1) * share + half) >> _WEIGHT_BITS > before:
                return entry, before
            number -= before
        raise AssertionError("the last entry takes every number")
