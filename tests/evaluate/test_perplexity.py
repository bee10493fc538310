"""Perplexity of texts: weighted by tokens, in any batches."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from toy_data import sentence

from vlcore.evaluate import TextScore, perplexity, score_texts

TEXTS = [sentence(i, length) for i, length in enumerate([3, 40, 7, 12, 25])]


def alone(model, processor, text):
    encoded = processor.encode_document([text])
    with torch.no_grad():
        logits = model.eval()(encoded.input_ids[None], return_logits=True).logits[0]
    return float(F.cross_entropy(logits[:-1], encoded.input_ids[1:], reduction="sum")), len(encoded) - 1


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_it_is_the_exponential_of_the_mean_over_all_tokens(model, processor, batch_size):
    sums, counts = zip(*(alone(model, processor, text) for text in TEXTS), strict=True)
    score = score_texts(model, processor, TEXTS, batch_size=batch_size)
    assert score.num_tokens == sum(counts)
    assert score.nll == pytest.approx(sum(sums), rel=1e-6)
    expected = math.exp(sum(sums) / sum(counts))
    assert perplexity(model, processor, TEXTS, batch_size=batch_size) == pytest.approx(expected, rel=1e-5)


def test_a_text_longer_than_the_model_reads_goes_in_pieces(model, processor, monkeypatch):
    short = replace(model.config, language=replace(model.config.language, max_positions=16))
    whole = score_texts(model, processor, TEXTS[1:2])
    monkeypatch.setattr(model, "config", short)
    pieces = score_texts(model, processor, TEXTS[1:2])
    assert pieces.num_tokens == whole.num_tokens > 16 and pieces.nll != pytest.approx(whole.nll, rel=1e-4)


def test_a_hopeless_model_has_infinite_perplexity():
    assert TextScore(1e6, 2).perplexity == math.inf
    assert TextScore(2 * math.log(7), 2).perplexity == pytest.approx(7)


@pytest.mark.parametrize(
    "texts, message",
    [
        ([], "there are no texts"),
        (["a", ""], "a text is empty"),
        ("abc", "texts is 'abc', one string; it must be a list of them"),
        ("", "texts is '', one string"),
    ],
)
def test_nothing_to_read_is_refused(model, processor, texts, message):
    with pytest.raises(ValueError, match=message):
        perplexity(model, processor, texts)


@pytest.mark.parametrize("batch_size", [0, -1])
def test_a_batch_of_nothing_is_refused(model, processor, batch_size):
    with pytest.raises(ValueError, match=f"batch_size is {batch_size}; it must be at least 1"):
        score_texts(model, processor, TEXTS, batch_size=batch_size)
