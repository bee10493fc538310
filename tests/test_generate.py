import dataclasses
import math
from threading import Event, Thread

import numpy as np
import pytest
import torch
from PIL import Image
from small_tokenizer import small_tokenizer

from vlcore.config import preset
from vlcore.generate import Sampling, evaluating, generate
from vlcore.models import DeepSeekVL, init_weights
from vlcore.processing import ImageError, Processor, collate, pack

TINY = preset("tiny")
RED, BLUE = Image.new("RGB", (20, 10), "red"), Image.new("RGB", (10, 20), "blue")


def ask(text, *images):
    parts = [{"type": "image", "image": image} for image in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


CONVERSATIONS = [
    ask("What colour is this?", RED),
    ask("Hello?"),
    ask("Which of them is blue?", RED, BLUE, RED),
    [*ask("And this?", BLUE), {"role": "assistant", "content": "Blue."}, *ask("Sure? 图")],
]


@pytest.fixture(scope="module")
def processor():
    return Processor(small_tokenizer(TINY), TINY)


@pytest.fixture(scope="module")
def model():
    model = DeepSeekVL(TINY)
    init_weights(model, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:  # a scale at which attention is far from uniform, and the words vary
                parameter.normal_(0, 3 / parameter.shape[-1] ** 0.5, generator=generator)
        model.lm_head.weight.normal_(generator=generator)
    return model.eval()


def greedy_without_cache(model, processor, conversation, steps):
    """The whole prompt through the model for every token."""
    encoded = processor.encode_conversation(conversation)
    ids, answer, pixels = encoded.input_ids[None], [], processor.pixels(encoded.images)
    allowed = torch.arange(TINY.language.vocab_size) < processor.num_token_ids
    allowed[processor.control.image] = False
    for _ in range(steps):
        with torch.no_grad():
            logits = model(ids, pixels).logits[0, -1]
        token = int(logits.masked_fill(~allowed, -math.inf).argmax())
        if token == processor.control.eos:
            break
        answer.append(token)
        ids = torch.cat([ids, torch.tensor([[token]])], 1)
    return answer


@pytest.mark.parametrize("index", range(len(CONVERSATIONS)))
def test_greedy_equals_the_model_without_a_cache(model, processor, index):
    expected = greedy_without_cache(model, processor, CONVERSATIONS[index], 12)
    assert len(set(expected)) > 4
    answer = generate(model, processor, CONVERSATIONS[index], max_new_tokens=12)
    text = processor.decode(expected).lstrip()
    assert answer == (text[:-1] if text.endswith("\ufffd") else text)


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_a_row_of_a_batch_is_what_it_is_alone(model, processor, penalty):
    settings = {"max_new_tokens": 10, "repetition_penalty": penalty}
    alone = [generate(model, processor, conversation, **settings) for conversation in CONVERSATIONS]
    assert generate(model, processor, CONVERSATIONS, **settings) == alone
    assert len(set(alone)) == len(alone)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batches_give_what_packed_ones_do(model, processor, side):
    samples = [processor.encode_conversation(conversation) for conversation in CONVERSATIONS]
    batch = collate(samples, processor, side=side)
    with torch.no_grad():
        padded = model(batch.input_ids, batch.pixels, positions=batch.positions, attention_mask=batch.attention_mask)
        packed = pack(samples, processor)
        whole = model(packed.input_ids, packed.pixels, positions=packed.positions, cu_seqlens=packed.cu_seqlens)
    for row, logits in enumerate(whole.logits[0].split(batch.lengths)):
        start = padded.logits.shape[1] - len(logits) if side == "left" else 0
        torch.testing.assert_close(padded.logits[row, start : start + len(logits)], logits, rtol=1e-3, atol=1e-3)


def test_seeds_repeat_and_differ(model, processor):
    def sample(seed):
        return generate(model, processor, CONVERSATIONS[:2], 8, temperature=1.5, top_p=0.9, seed=seed)

    assert sample(3) == sample(3) != sample(4)
    assert sample(np.int64(3)) == sample(3) and sample(2**64 - 1) and sample(-(2**63))
    torch.manual_seed(0)
    first = generate(model, processor, CONVERSATIONS[0], 8, temperature=1.5)
    assert first != generate(model, processor, CONVERSATIONS[0], 8, temperature=1.5)


def test_a_small_temperature_is_greedy(model, processor):
    cold = generate(model, processor, CONVERSATIONS, 6, temperature=1e-30, seed=0)
    assert cold == generate(model, processor, CONVERSATIONS, 6)
    assert cold == generate(model, processor, CONVERSATIONS, 6, temperature=2.0, top_p=1e-9, seed=0)


def test_pieces_are_streamed_as_they_come(model, processor):
    pieces = []
    answer = generate(model, processor, CONVERSATIONS[0], 10, stream=pieces.append)
    assert "".join(pieces) == answer and len(pieces) > 2 and all(pieces)
    rows = []
    answers = generate(model, processor, CONVERSATIONS, 10, stream=lambda row, piece: rows.append((row, piece)))
    assert ["".join(piece for r, piece in rows if r == row) for row in range(4)] == answers
    assert [row for row, _ in rows] != sorted(row for row, _ in rows)


def scripted(monkeypatch, script):
    """Let row r say script[r], token by token, and return what the logits were."""
    steps, logits = iter(zip(*script, strict=True)), []

    def choose(self, given, seen, generator):
        logits.append(given)
        return torch.tensor(next(steps))

    monkeypatch.setattr(Sampling, "choose", choose)
    return logits


def test_each_row_stops_at_its_own_eos(model, processor, monkeypatch):
    a, b, eos = *processor.encode_text("ab"), processor.control.eos
    logits = scripted(monkeypatch, [[a, eos, b, b], [b, a, b, eos], [eos, a, a, a], [a, a, eos, a]])
    assert generate(model, processor, CONVERSATIONS, 99) == ["a", "bab", "", "aa"]
    assert len(logits) == 4


def test_a_row_stops_at_any_of_the_ids_that_end_an_answer(model, processor, monkeypatch):
    (a, b, other), eos = processor.encode_text("abc"), processor.control.eos
    language = dataclasses.replace(TINY.language, other_eos_token_ids=(other,))
    monkeypatch.setattr(model, "config", dataclasses.replace(TINY, language=language))
    logits = scripted(monkeypatch, [[a, other, b, b], [b, a, b, eos], [other, a, a, a], [a, a, eos, a]])
    assert generate(model, processor, CONVERSATIONS, 99) == ["a", "bab", "", "aa"]
    assert len(logits) == 4


def test_rows_go_on_undisturbed_after_others_have_ended(model, processor, monkeypatch):
    expected = greedy_without_cache(model, processor, CONVERSATIONS[0], 8)
    choose, calls = Sampling.choose, []

    def end_the_second_row(self, logits, seen, generator):
        tokens = choose(self, logits, seen, generator)
        calls.append(tokens[0].item())
        tokens[1] = processor.control.eos
        return tokens

    monkeypatch.setattr(Sampling, "choose", end_the_second_row)
    assert generate(model, processor, CONVERSATIONS[:2], 8)[1] == "" and calls == expected


def test_what_has_no_text_is_never_chosen(model, processor, monkeypatch):
    logits = scripted(monkeypatch, [[processor.control.eos]])
    generate(model, processor, CONVERSATIONS[0], 1)
    impossible = {processor.control.image, *range(processor.num_token_ids, TINY.language.vocab_size)}
    assert set(logits[0][0].isinf().nonzero()[:, 0].tolist()) == impossible


def test_a_penalty_counts_the_prompt_and_not_its_images(model, processor, monkeypatch):
    encoded = processor.encode_conversation(CONVERSATIONS[0])
    seens = []

    def choose(self, logits, seen, generator):
        seens.append(set(seen[0].nonzero()[:, 0].tolist()))
        return torch.tensor([processor.encode_text("z")[0]])

    monkeypatch.setattr(Sampling, "choose", choose)
    generate(model, processor, CONVERSATIONS[0], 2, repetition_penalty=1.2)
    prompt = set(encoded.input_ids.tolist()) - {processor.control.image}
    assert seens == [prompt, prompt | set(processor.encode_text("z"))] and seens[0] != seens[1]


def test_sampling_is_that_of_transformers():
    processors = pytest.importorskip("transformers").generation.logits_process
    logits = torch.randn(5, 50, generator=torch.Generator().manual_seed(0)) * 3
    ids = torch.randint(50, (5, 12), generator=torch.Generator().manual_seed(1))
    seen = torch.zeros(5, 50, dtype=torch.bool).scatter_(1, ids, True)
    penalised = processors.RepetitionPenaltyLogitsProcessor(1.7)(ids, logits.clone())
    assert Sampling(repetition_penalty=1.7).choose(logits, seen, None).tolist() == penalised.argmax(-1).tolist()
    warped = processors.TopPLogitsWarper(0.6)(ids, processors.TemperatureLogitsWarper(0.8)(ids, penalised))
    sampling = Sampling(temperature=0.8, top_p=0.6, repetition_penalty=1.7)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([sampling.choose(logits, seen, generator) for _ in range(2000)])
    counts = torch.zeros(5, 50).scatter_add_(1, drawn.T, torch.ones(5, 2000)) / 2000
    assert (counts[warped.isinf()] == 0).all()
    # 2000 draws: a share's standard deviation is at most 0.011.
    assert (counts - warped.softmax(-1)).abs().max() < 0.05


def test_the_last_of_several_threads_leaves_the_model_as_it_was(model):
    entered, leave = Event(), Event()

    def hold():
        with evaluating(model):
            entered.set()
            assert leave.wait(30)

    model.train()
    model.vision.eval()
    thread = Thread(target=hold)
    thread.start()
    assert entered.wait(30)
    with evaluating(model):
        leave.set()
        thread.join()
        assert not any(module.training for module in model.modules())
    assert model.training and model.language.training and not model.vision.training


def test_the_model_is_left_as_it_was(model, processor):
    model.train()
    model.vision.eval()
    generate(model, processor, CONVERSATIONS[1], 2)
    assert model.training and model.language.training and not model.vision.training
    with pytest.raises(RuntimeError, match="stop here"):
        generate(
            model, processor, CONVERSATIONS[1], 2, stream=lambda piece: (_ for _ in ()).throw(RuntimeError("stop here"))
        )
    assert model.training
    model.eval()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_generation_in_bfloat16(model, processor):
    answers = generate(model.bfloat16(), processor, CONVERSATIONS, 4)
    model.float()
    assert len(answers) == 4 and all(isinstance(answer, str) for answer in answers)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"max_new_tokens": 0}, "max_new_tokens 0 must be a positive integer"),
        ({"max_new_tokens": 2.0}, "max_new_tokens 2.0 must be a positive integer"),
        ({"max_new_tokens": True}, "max_new_tokens True must be"),
        ({"seed": torch.tensor(1.5)}, r"seed tensor\(1.5000\) must be an integer"),
        ({"temperature": -0.1}, r"temperature -0.1 must be 0 \(greedy\) or a positive number"),
        ({"temperature": math.nan}, "temperature nan must be"),
        ({"temperature": math.inf}, "temperature inf must be"),
        ({"top_p": 0.0}, "top_p 0.0 must be above 0 and at most 1"),
        ({"top_p": 1.1}, "top_p 1.1 must be above 0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty 0.0 must be a positive number; 1 is none"),
        ({"repetition_penalty": math.inf}, "repetition_penalty inf must be"),
        ({"max_new_tokens": "9"}, "max_new_tokens '9' must be a positive integer"),
        ({"seed": 1.5}, r"seed 1.5 must be an integer from -2\*\*63 to 2\*\*64 - 1"),
        ({"seed": 10**22}, "seed 10000000000000000000000 must be an integer from"),
        ({"seed": -(2**63) - 1}, "seed -9223372036854775809 must be"),
        ({"max_new_tokens": 512}, r"The conversation has \d+ tokens with its 1 images; with max_new_tokens 512 .* 512"),
    ],
)
def test_arguments_out_of_range(model, processor, arguments, message):
    with pytest.raises(ValueError, match=message):
        generate(model, processor, CONVERSATIONS[0], **arguments)


@pytest.mark.parametrize(
    "conversation, error, message",
    [
        ([], ValueError, "There are no conversations to answer"),
        ("Hello?", ValueError, "A conversation is a list of messages, not str"),
        ([{"role": "user"}], ValueError, r"^conversation\[0\] has no 'content'"),
        ([ask("x"), [{"role": "user"}]], ValueError, r"^conversations\[1\]: conversation\[0\] has no 'content'"),
        (
            [ask("x"), ask("x", b"")],
            ImageError,
            r"^conversations\[1\]: conversation\[0\]\['content'\]\[0\]: it is empty",
        ),
        ([ask("x"), ask("x" * 999)], ValueError, r"^conversations\[1\] has \d+ tokens with its 0 images"),
        ([*ask("x"), {"role": "assistant", "content": "y"}], ValueError, "open_turn=True needs a conversation that"),
    ],
)
def test_conversations_that_cannot_be_answered(model, processor, conversation, error, message):
    with pytest.raises(error, match=message):
        generate(model, processor, conversation)


def test_a_model_of_one_tower_and_tied_heads(processor):
    language = dataclasses.replace(TINY.language, tie_embeddings=True)
    config = dataclasses.replace(TINY, sam=None, adaptor="mlp_gelu", language=language)
    model = DeepSeekVL(config)
    init_weights(model, seed=0)
    answer = generate(model, Processor(small_tokenizer(config), config), CONVERSATIONS[0], 4)
    assert isinstance(answer, str)
