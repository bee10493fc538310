import io
import sys

import pytest
import torch
from PIL import Image
from small_tokenizer import small_tokenizer

from vlcore import chat
from vlcore.checkpoint import from_pretrained, save_pretrained
from vlcore.config import preset
from vlcore.generate import generate
from vlcore.models import DeepSeekVL, init_weights
from vlcore.processing import ImageError, Processor

TINY = preset("tiny")


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("chat") / "model"
    model = DeepSeekVL(TINY)
    init_weights(model, seed=0)
    with torch.no_grad():
        model.lm_head.weight.normal_(generator=torch.Generator().manual_seed(0))
    save_pretrained(model, directory)
    Processor(small_tokenizer(TINY), TINY).save_pretrained(directory)
    Image.new("RGB", (20, 10), "red").save(directory.parent / "red.png")
    return directory


@pytest.fixture
def conversations(monkeypatch):
    """What generate is asked; each question is answered by its number, and `None` by nothing."""
    asked, answers = [], iter(["one", "two", "three"])

    def answer(model, processor, conversation, stream, **sampling):
        text = "" if "nothing" in str(conversation[-1]) else next(answers)
        if "too long" in str(conversation[-1]):
            raise ValueError("it is too long")
        asked.append((conversation, sampling))
        stream(text)
        return text

    monkeypatch.setattr(chat, "generate", answer)
    return asked


def texts(conversation):
    return [
        turn["content"] if isinstance(turn["content"], str) else turn["content"][-1]["text"].strip()
        for turn in conversation
    ]


def test_one_question_is_answered_as_generate_does(directory, capsys):
    red = directory.parent / "red.png"
    assert chat.run(directory, [red, red], "What is it?", max_new_tokens=6, temperature=1.0, seed=1) == 0
    model, processor = from_pretrained(directory), Processor.from_pretrained(directory)
    parts = [{"type": "image", "path": red}] * 2 + [{"type": "text", "text": "What is it?"}]
    expected = generate(model, processor, [{"role": "user", "content": parts}], 6, temperature=1.0, seed=1)
    assert capsys.readouterr().out == expected + "\n" and expected


def test_a_conversation_on_standard_input(directory, conversations, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("First?\n\n  \nSay nothing.\nSecond?"))
    assert chat.run(directory, [directory.parent / "red.png"], None, seed=3) == 0
    assert capsys.readouterr().out == "one\n\ntwo\n"
    assert [texts(conversation) for conversation, _ in conversations] == [
        ["First?"],
        ["First?", "one", "Say nothing."],
        ["First?", "one", "Second?"],
    ]
    images = [
        [part["type"] for turn in c for part in turn["content"][:-1] if turn["role"] == "user"]
        for c, _ in conversations
    ]
    assert images == [["image"]] * 3 and conversations[0][1] == {"seed": 3}


def test_images_wait_until_something_is_answered(directory, conversations, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("nothing\nFirst?\n"))
    chat.run(directory, [directory.parent / "red.png"], None)
    assert [len(conversation[0]["content"]) for conversation, _ in conversations] == [2, 2]


def test_a_conversation_on_a_terminal_survives_an_error(directory, conversations, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", Terminal("First?\ntoo long\nSecond?\n"))
    lines = iter(["First?", "too long", "Second?"])

    def typed(prompt):
        assert prompt == "> "
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", typed)
    assert chat.run(directory, [], None) == 0
    captured = capsys.readouterr()
    assert captured.out == "one\nthree\n\n" and captured.err == "it is too long\n"
    assert texts(conversations[-1][0]) == ["First?", "one", "Second?"]


def test_an_error_on_standard_input_ends_it(directory, conversations, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("too long\nSecond?\n"))
    with pytest.raises(ValueError, match="it is too long"):
        chat.run(directory, [], None)


def test_what_is_missing_is_named(directory, tmp_path):
    with pytest.raises(ImageError, match="no.png: it cannot be opened"):
        chat.run(directory, ["no.png"], "x")
    with pytest.raises(FileNotFoundError, match="tokenizer.json does not exist"):
        chat.run(tmp_path, [], "x")
    with pytest.raises(ValueError, match="The conversation has no turns|is empty"):
        chat.run(directory, [], " ")
