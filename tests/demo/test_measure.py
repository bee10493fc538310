"""Measuring: the numbers are what they say, and the questions are the same every time."""

import math

import numpy as np
import pytest
from tokenizers import Tokenizer

from vlcore import config
from vlcore.demo import measure as module
from vlcore.demo.build import Sizes, build
from vlcore.demo.measure import Answer, Examiner, ask, character_accuracy, draw_options, edit_distance
from vlcore.evaluate import OptionScore
from vlcore.models import DeepSeekVL, init_weights
from vlcore.processing import ChatTemplate, Processor


@pytest.mark.parametrize(
    "first, second, distance",
    [("", "", 0), ("abc", "abc", 0), ("", "abc", 3), ("abc", "", 3), ("kitten", "sitting", 3), ("ab", "ba", 2)],
)
def test_edit_distance(first, second, distance):
    assert edit_distance(first, second) == distance


def test_character_accuracy_counts_letters_over_all_pages():
    assert character_accuracy([("a b c", "a b c"), ("d e f", "d x f")]) == pytest.approx(1 - 1 / 6)
    assert character_accuracy([("a b", "ab")]) == 1, "blanks do not count"
    assert character_accuracy([("a b", "c d e f g h")]) < 0


def test_an_answer_is_right_word_for_word():
    assert Answer("x.png", "?", "France", " France\n").is_right
    assert not Answer("x.png", "?", "France", "France.").is_right


def test_options_hold_the_answer_once_and_others_from_all_names():
    names = [f"country {number}" for number in range(30)]
    drawn = draw_options(names, names, np.random.default_rng(0))
    assert all(len(set(options)) == 4 and name in options for name, options in zip(names, drawn, strict=True))
    assert {options.index(name) for name, options in zip(names, drawn, strict=True)} == {0, 1, 2, 3}
    assert drawn == draw_options(names, names, np.random.default_rng(0))
    assert len({option for options in drawn for option in options}) > 25


def test_too_few_names_are_refused():
    with pytest.raises(ValueError, match="3 names are too few for 4 options"):
        draw_options(["a"], ["a", "b", "c"], np.random.default_rng(0))


@pytest.fixture(scope="module")
def built(packages, tmp_path_factory):
    sizes = Sizes(held_out_articles=6, held_out_words=10, held_out_pages=4, pages=2)
    data = build(packages, tmp_path_factory.mktemp("data"), config.demo(), sizes, seed=0)
    tokenizer = Tokenizer.from_file(str(data.root / "tokenizer.json"))
    model = DeepSeekVL(config.demo())
    init_weights(model, 0)
    return data, model, Processor(tokenizer, config.demo(), ChatTemplate(system=""))


def test_an_untrained_model_is_measured_and_left_as_it_was(built):
    data, model, processor = built
    examiner = Examiner(data, 0)
    model.train()
    measured, answers = examiner.examine(model, processor)
    again, _ = Examiner(data, 0).examine(model, processor)
    assert measured == again
    assert model.training
    assert 0 <= measured.multiple_choice <= 1 and measured.exact_name == 0
    vocabulary = config.demo().language.vocab_size
    assert measured.text_perplexity > 0.7 * vocabulary, "random weights know nothing"
    assert [answer.expected for answer in answers] == [row["name"] for row in examiner.flags] + [
        row["text"] for row in examiner.pages
    ]
    assert set(measured.as_dict()) == {"multiple_choice", "exact_name", "text_perplexity", "character_accuracy"}


def test_what_a_perfect_and_a_wrong_model_score(built, monkeypatch):
    data, model, processor = built
    examiner = Examiner(data, 0)
    names = {row["image"]: row["name"] for row in examiner.flags}
    texts = names | {row["image"]: row["text"] for row in examiner.pages}

    def image_of(conversation):
        return conversation[0]["content"][0]["path"]

    def score(model, processor, questions):
        # The right name has the lowest mean, and not the lowest sum.
        return [
            [OptionScore(6.0, 6) if option == names[image_of(asked)] else OptionScore(5.0, 2) for option in options]
            for asked, options in questions
        ]

    monkeypatch.setattr(module, "score_many", score)
    monkeypatch.setattr(module, "generate", lambda m, p, asked, max_new_tokens: [texts[image_of(one)] for one in asked])
    perfect, answers = examiner.examine(model, processor)
    assert (perfect.multiple_choice, perfect.exact_name, perfect.character_accuracy) == (1, 1, 1)
    assert all(answer.is_right for answer in answers)
    monkeypatch.setattr(module, "generate", lambda m, p, asked, max_new_tokens: ["" for _ in asked])
    monkeypatch.setattr(
        module, "score_many", lambda m, p, questions: [[OptionScore(math.nan, 1)] * 4 for _ in questions]
    )
    wrong, _ = examiner.examine(model, processor)
    assert (wrong.exact_name, wrong.character_accuracy) == (0, 0)


def test_fewer_questions_can_be_asked(built):
    data, _, _ = built
    examiner = Examiner(data, 0, flags=3, pages=2, articles=1)
    assert (len(examiner.flags), len(examiner.pages), len(examiner.texts)) == (3, 2, 1)
    assert len({option for options in examiner.options for option in options}) > 3, "wrong options are of all countries"


def test_a_question_shows_the_picture_first(built):
    data, _, processor = built
    image = data.held_out("flags")[0]["image"]
    encoded = processor.encode_conversation(ask(image, "What flag is this?"))
    assert len(encoded.images) == 1
    assert processor.decode(encoded.input_ids) == "User: What flag is this?\n\nAssistant:"
