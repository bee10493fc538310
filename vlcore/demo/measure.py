"""What the demo measures, always on what training never sees: another artist's flags, other words, other articles."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from vlcore.demo.build import DataSet
from vlcore.demo.questions import NAME_QUESTION, READ_QUESTION
from vlcore.evaluate import perplexity, score_many
from vlcore.generate import generate
from vlcore.models import DeepSeekVL
from vlcore.processing import Processor

NUM_OPTIONS = 4
# Every word of a country's name, or every letter of a page, is at most a few tokens.
LONGEST_NAME = 24
LONGEST_PAGE = 34


@dataclass(frozen=True)
class Answer:
    """What the model said to a held-out picture. `is_right` means: word for word."""

    image: str
    question: str
    expected: str
    answer: str

    @property
    def is_right(self) -> bool:
        return self.answer.strip() == self.expected


@dataclass(frozen=True)
class Measurement:
    """One row of the report.

    Attributes:
        multiple_choice: share of the held-out flags whose name has the lowest perplexity among four names, the three
            others drawn once from the seed. Chance is 0.25.
        exact_name: share of them that the greedy answer names, word for word, out of all names.
        text_perplexity: a token, on held-out articles.
        character_accuracy: 1 - edits / letters, over held-out pages, where edits turn the greedy answer into what the
            page says; blanks count in neither. More edits than letters make it negative.
    """

    multiple_choice: float
    exact_name: float
    text_perplexity: float
    character_accuracy: float

    def as_dict(self) -> dict[str, float]:
        return {name: round(value, 4) for name, value in asdict(self).items()}


class Examiner:
    """Holds the questions, which are the same at every measurement.

    Args:
        data: the built data, of which only the held-out rows are read.
        seed: draws the wrong options.
        flags, pages, articles: how many of each are asked; None asks all.
    """

    def __init__(
        self,
        data: DataSet,
        seed: int,
        *,
        flags: int | None = None,
        pages: int | None = 100,
        articles: int | None = 100,
    ):
        names = [row["name"] for row in data.held_out("flags")]
        self.flags = data.held_out("flags")[:flags]
        self.pages = data.held_out("pages")[:pages]
        self.texts = [row["text"] for row in data.held_out("articles")[:articles]]
        self.options = draw_options([row["name"] for row in self.flags], names, np.random.default_rng([seed, 4]))

    def examine(self, model: DeepSeekVL, processor: Processor) -> tuple[Measurement, list[Answer]]:
        """Ask everything. Returns the measurement, and the answers given about the flags and then the pages."""
        questions = [
            (ask(row["image"], NAME_QUESTION), options) for row, options in zip(self.flags, self.options, strict=True)
        ]
        scores = score_many(model, processor, questions)
        perplexities = [[score.mean_nll for score in found] for found in scores]
        right = [
            options[values.index(min(values))] == row["name"]
            for options, values, row in zip(self.options, perplexities, self.flags, strict=True)
        ]
        named = self._answers(model, processor, self.flags, NAME_QUESTION, "name", LONGEST_NAME)
        read = self._answers(model, processor, self.pages, READ_QUESTION, "text", LONGEST_PAGE)
        measurement = Measurement(
            multiple_choice=float(np.mean(right)),
            exact_name=float(np.mean([answer.is_right for answer in named])),
            text_perplexity=perplexity(model, processor, self.texts),
            character_accuracy=character_accuracy([(answer.expected, answer.answer) for answer in read]),
        )
        return measurement, named + read

    @staticmethod
    def _answers(
        model: DeepSeekVL, processor: Processor, rows: list[dict[str, Any]], question: str, key: str, longest: int
    ) -> list[Answer]:
        asked = [ask(row["image"], question) for row in rows]
        said = generate(model, processor, asked, max_new_tokens=longest)
        return [Answer(row["image"], question, row[key], text) for row, text in zip(rows, said, strict=True)]


def ask(image: str, question: str) -> list[dict[str, Any]]:
    """A conversation of one question about the picture in a file."""
    return [{"role": "user", "content": [{"type": "image", "path": image}, {"type": "text", "text": question}]}]


def draw_options(expected: Sequence[str], names: Sequence[str], rng: np.random.Generator) -> list[list[str]]:
    """For each expected name, four options in random order: itself and three other names.

    Raises:
        ValueError: there are fewer than four names.
    """
    if len(set(names)) < NUM_OPTIONS:
        raise ValueError(f"{len(set(names))} names are too few for {NUM_OPTIONS} options.")
    drawn = []
    for name in expected:
        others = [other for other in names if other != name]
        options = [name, *(others[i] for i in rng.choice(len(others), NUM_OPTIONS - 1, replace=False))]
        drawn.append([options[i] for i in rng.permutation(NUM_OPTIONS)])
    return drawn


def character_accuracy(pairs: Sequence[tuple[str, str]]) -> float:
    """1 - edits / letters over all pairs of (what is there, what was read), blanks left out."""
    bare = [("".join(there.split()), "".join(read.split())) for there, read in pairs]
    return 1 - sum(edit_distance(there, read) for there, read in bare) / sum(len(there) for there, _ in bare)


def edit_distance(first: str, second: str) -> int:
    """Insertions, deletions and replacements of one character that turn one into the other (Levenshtein's)."""
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, 1):
        above_left, row[0] = row[0], i
        for j, b in enumerate(second, 1):
            above_left, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above_left + (a != b))
    return row[-1]
