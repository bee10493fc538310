import random

import pytest
from small_tokenizer import small_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from vlcore.config import preset
from vlcore.processing.text_stream import TextStream

TEXT = " Un café, 图中有一只猫 🦉👩‍👩‍👧 — ø\n\n  12 % "


def stream(decode, ids):
    text_stream = TextStream(decode)
    pieces = [text_stream.push(token) for token in ids]
    assert "".join(pieces) == text_stream.text
    return pieces


def test_pieces_are_whole_characters(processor):
    ids = processor.encode_text(TEXT)
    assert len(ids) > len(TEXT)  # some characters take several tokens
    pieces = stream(processor.decode, ids)
    assert "".join(pieces) == TEXT.lstrip() and not any("\ufffd" in piece for piece in pieces)


def test_a_character_that_is_cut_off_is_left_out(processor):
    ids = processor.encode_text("a 🦉")
    assert [*stream(processor.decode, ids[:-1])] == ["a", " ", "", "", ""][: len(ids) - 1]
    assert "".join(stream(processor.decode, ids[:-1])) == "a "


def test_bytes_that_are_no_utf8_become_what_decoding_makes_of_them(processor):
    generator = random.Random(0)
    for _ in range(50):
        ids = [generator.randrange(4, processor.num_token_ids) for _ in range(40)]
        whole = processor.decode(ids).lstrip()
        text = "".join(stream(processor.decode, ids))
        assert text == (whole[:-1] if whole.endswith("\ufffd") else whole)


def test_control_tokens_give_no_text(processor):
    assert (
        stream(processor.decode, [processor.control.bos, *processor.encode_text("x"), processor.control.eos])[0] == ""
    )


def test_white_space_inside_is_kept_and_at_the_beginning_is_not(processor):
    ids = processor.encode_text(" \n a  b\n")
    assert "".join(stream(processor.decode, ids)) == "a  b\n"


@pytest.mark.parametrize("kind", ["metaspace", "word pieces"])
def test_decoders_that_look_at_neighbours(kind):
    tokenizer = Tokenizer(models.BPE(unk_token="?") if kind == "metaspace" else models.WordPiece(unk_token="?"))
    if kind == "metaspace":
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        trainer = trainers.BpeTrainer(special_tokens=["?"], show_progress=False, vocab_size=60)
    else:
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(special_tokens=["?"], show_progress=False, vocab_size=60)
    text = "the cat sat on the other cat"
    tokenizer.train_from_iterator([text], trainer)
    assert "".join(stream(tokenizer.decode, tokenizer.encode(text).ids)) == text


def test_of_the_demo_size():
    tokenizer = small_tokenizer(preset("demo"))
    ids = tokenizer.encode(TEXT).ids
    assert "".join(stream(tokenizer.decode, ids)) == TEXT.lstrip()
