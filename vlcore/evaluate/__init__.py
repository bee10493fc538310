"""Measuring a model: multiple choice by likelihood, and the perplexity of texts."""

from vlcore.evaluate.multiple_choice import OptionScore, choose, score_many, score_options, with_letters
from vlcore.evaluate.perplexity import TextScore, perplexity, score_texts

__all__ = [
    "OptionScore",
    "TextScore",
    "choose",
    "perplexity",
    "score_many",
    "score_options",
    "score_texts",
    "with_letters",
]
