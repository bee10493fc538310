"""The language model with real weights: SmolLM2-135M, with grouped queries and a tied head, against transformers."""

import pytest
import torch
from fetch_smollm2 import FOLDER
from transformers import AutoModelForCausalLM, AutoTokenizer

from vlcore import checkpoint

TEXT = (
    "The Moon is Earth's only natural satellite. It orbits at an average distance of about 384,400 kilometres, which "
    "is roughly thirty times the diameter of Earth. The gravitational pull of the Moon"
)


@pytest.fixture(scope="module")
def smollm2():
    if not FOLDER.is_dir():
        pytest.skip(f"SmolLM2-135M is not at {FOLDER}; `make data` or `python tests/fetch_smollm2.py` fetches it")
    public = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
    return public, checkpoint.load_llama(FOLDER, dtype=torch.float32), AutoTokenizer.from_pretrained(FOLDER)


@torch.no_grad()
def test_real_weights_give_the_same_logits_and_the_same_continuation(smollm2):
    public, (language, head), tokenizer = smollm2
    assert head.weight is language.embed_tokens.weight
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    expected = public(ids).logits
    continuation = public.generate(ids, max_new_tokens=16, do_sample=False)
    num_given = ids.shape[1]
    assert continuation.shape[1] == num_given + 16 and "Earth" in tokenizer.decode(continuation[0, num_given:])
    logits = head(language(language.embed_tokens(continuation), torch.arange(num_given + 16)[None]))
    assert (logits[:, :num_given] - expected).abs().max() <= 1e-3
    assert torch.equal(logits[:, :num_given].argmax(-1), expected.argmax(-1))
    # Given each token that transformers chose, ours would have chosen the next one too.
    assert torch.equal(logits[:, num_given - 1 : -1].argmax(-1), continuation[:, num_given:])


@torch.no_grad()
def test_reads_in_the_dtype_on_disk_unless_told_otherwise(smollm2):
    language, _ = checkpoint.load_llama(FOLDER)
    assert {parameter.dtype for parameter in language.parameters()} == {torch.bfloat16}
