"""How well a model predicts texts: exp of the mean negative log-likelihood of all their tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, inf

import torch

from vlcore.generate import evaluating
from vlcore.models import DeepSeekVL
from vlcore.processing import Encoded, Processor, collate


@dataclass(frozen=True)
class TextScore:
    """Attributes:
    nll: negative log-likelihood of the tokens, in nats.
    num_tokens: every token but BOS; EOS counts.
    """

    nll: float
    num_tokens: int

    @property
    def perplexity(self) -> float:
        mean = self.nll / self.num_tokens
        return exp(mean) if mean < 700 else inf


def perplexity(model: DeepSeekVL, processor: Processor, texts: Sequence[str], *, batch_size: int = 16) -> float:
    """The perplexity of texts taken together: long ones weigh more, by their tokens.

    Args:
        texts: each read as a document of its own, from BOS to EOS.
        batch_size: texts of one forward.

    Raises:
        ValueError: there are no texts, they are one string, one is empty, or batch_size is below 1.
    """
    return score_texts(model, processor, texts, batch_size=batch_size).perplexity


def score_texts(model: DeepSeekVL, processor: Processor, texts: Sequence[str], *, batch_size: int = 16) -> TextScore:
    """The summed likelihood of texts. One that is longer than the model reads goes in pieces, each after a BOS.

    Args:
        texts: each read as a document of its own, from BOS to EOS.
        batch_size: pieces of one forward.

    Raises:
        ValueError: there are no texts, they are one string, one is empty, or batch_size is below 1.
    """
    if batch_size < 1:
        raise ValueError(f"score_texts: batch_size is {batch_size}; it must be at least 1.")
    if isinstance(texts, str):
        raise ValueError(f"score_texts: texts is {texts!r:.60}, one string; it must be a list of them.")
    if not texts:
        raise ValueError("score_texts: there are no texts.")
    longest = model.config.language.max_positions
    pieces = [piece for text in texts for piece in _pieces(processor, text, longest)]
    pieces.sort(key=len)
    nll, num_tokens = 0.0, 0
    with evaluating(model) as device:
        for start in range(0, len(pieces), batch_size):
            batch = collate(pieces[start : start + batch_size], processor)
            num_tokens += batch.num_supervised
            batch = batch.to(device)
            nll += float(model(batch.input_ids, labels=batch.labels, loss_reduction="sum").loss)
    return TextScore(nll, num_tokens)


def _pieces(processor: Processor, text: str, longest: int) -> list[Encoded]:
    if not text:
        raise ValueError("score_texts: a text is empty.")
    encoded = processor.encode_document([text])
    bos, ids = encoded.input_ids[:1], encoded.input_ids[1:]
    masked = encoded.labels[:1]
    return [Encoded(torch.cat([bos, part]), torch.cat([masked, part]), []) for part in ids.split(longest - 1)]
