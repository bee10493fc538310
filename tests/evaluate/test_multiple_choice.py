"""Options scored behind a shared prompt: equal to scoring each alone, one question or many."""

from dataclasses import replace

import pytest
import torch
from toy_data import square

from vlcore.evaluate import OptionScore, choose, score_many, score_options, with_letters

OPTIONS = ["a cat", "the red house with three windows", "2", "blue trees under"]


def question(text="What is this?", images=1, number=0):
    parts = [{"type": "image", "image": square(number + i)} for i in range(images)]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def alone(model, processor, conversation, option, with_eos=True):
    """The definition: a full forward over prompt and option, and the log-softmax at the option's tokens."""
    answered = [*conversation, {"role": "assistant", "content": option}]
    encoded = processor.encode_conversation(answered, supervise=True)
    with torch.no_grad():
        out = model.eval()(encoded.input_ids[None], processor.pixels(encoded.images), return_logits=True)
    labels = encoded.labels[1:] if with_eos else encoded.labels[1:].masked_fill(encoded.labels[1:] == 2, -100)
    kept = labels != -100
    log_probabilities = out.logits[0, :-1].double().log_softmax(-1)[kept]
    nll = -log_probabilities.gather(1, labels[kept][:, None]).sum()
    return OptionScore(float(nll), int(kept.sum()))


def assert_scores(found, expected):
    assert [score.num_tokens for score in found] == [score.num_tokens for score in expected]
    for one, other in zip(found, expected, strict=True):
        assert one.sum_nll == pytest.approx(other.sum_nll, abs=1e-5, rel=1e-6)
        assert one.mean_nll == one.sum_nll / one.num_tokens


@pytest.mark.parametrize("images", [0, 1, 2])
@pytest.mark.parametrize("with_eos", [True, False])
def test_shared_prompt_equals_each_option_alone(model, processor, images, with_eos):
    conversation = question(images=images)
    expected = [alone(model, processor, conversation, option, with_eos) for option in OPTIONS]
    assert_scores(score_options(model, processor, conversation, OPTIONS, with_eos=with_eos), expected)
    assert len({round(score.sum_nll, 3) for score in expected}) == len(OPTIONS)


def test_a_single_token_each_needs_no_second_forward(model, processor):
    letters = ["A", "B", "C"]
    expected = [alone(model, processor, question(), letter, False) for letter in letters]
    assert_scores(score_options(model, processor, question(), letters, with_eos=False), expected)


def test_many_questions_are_each_scored_as_if_alone(model, processor):
    questions = [
        (question(number=1), OPTIONS),
        (question("And this one, which is longer?", number=2), OPTIONS[:2]),
        (question(number=3), OPTIONS[1:]),
        (question(images=0), ["yes", "no"]),
        (question(number=4), OPTIONS),
        (
            [*question(number=5), {"role": "assistant", "content": "A cat."}, {"role": "user", "content": "Sure?"}],
            ["a"],
        ),
    ]
    expected = [score_options(model, processor, *each) for each in questions]
    for max_rows in (1, 5, 100):
        for found, one in zip(score_many(model, processor, questions, max_rows=max_rows), expected, strict=True):
            assert_scores(found, one)
    assert score_many(model, processor, []) == []


def test_bf16_computes_and_scores_nearly_the_same(model, processor):
    exact = score_options(model, processor, question(), OPTIONS)
    model.compute_dtype = torch.bfloat16
    try:
        rounded = score_options(model, processor, question(), OPTIONS)
    finally:
        model.compute_dtype = None
    for one, other in zip(exact, rounded, strict=True):
        assert other.sum_nll == pytest.approx(one.sum_nll, rel=0.05)


def test_the_model_is_left_as_it_was(model, processor):
    model.train()
    model.vision.eval()
    score_options(model, processor, question(), ["a"])
    assert model.training and model.adaptor.training and not model.vision.training
    assert all(parameter.grad is None for parameter in model.parameters())
    model.eval()
    score_options(model, processor, question(), ["a"])
    assert not model.training


def test_choosing_by_sum_mean_and_letter(model, processor):
    scores = score_options(model, processor, question(), OPTIONS)
    sums, means = [score.sum_nll for score in scores], [score.mean_nll for score in scores]
    assert choose(model, processor, question(), OPTIONS, by="sum") == sums.index(min(sums))
    assert choose(model, processor, question(), OPTIONS) == means.index(min(means))
    letters = ["A", "B", "C", "D"]
    listed = with_letters(question(), OPTIONS)
    of_letters = [alone(model, processor, listed, letter, False).sum_nll for letter in letters]
    assert choose(model, processor, question(), OPTIONS, by="letter") == of_letters.index(min(of_letters))


LISTING = "\nA. cat\nB. dog\nAnswer with the option's letter from the given choices directly."
IMAGE = {"type": "image", "image": square(0)}


@pytest.mark.parametrize(
    "content, listed",
    [
        ("Which?", "Which?" + LISTING),
        ([{"type": "text", "text": "Which?"}], [{"type": "text", "text": "Which?" + LISTING}]),
        ([IMAGE], [IMAGE, {"type": "text", "text": LISTING}]),
        ([], [{"type": "text", "text": LISTING}]),
    ],
)
def test_options_are_listed_in_the_last_message(content, listed):
    conversation = [{"role": "system", "content": "s"}, {"role": "user", "content": content}]
    assert with_letters(conversation, ["cat", "dog"]) == [conversation[0], {"role": "user", "content": listed}]
    assert conversation[1] == {"role": "user", "content": content}


def test_options_are_listed_in_conversations_of_the_original_style(processor):
    conversation = [{"role": "User", "content": "<image_placeholder>Which?", "images": [square(0)]}]
    (message,) = with_letters(conversation, ["cat"])
    assert message["content"].startswith("<image_placeholder>Which?\nA. cat\n")
    assert len(processor.encode_conversation([message]).images) == 1


@pytest.mark.parametrize(
    "conversation, options, message",
    [
        (question(), [], "A question needs one or more options; it has none"),
        (question(), "abc", "The options are 'abc', one string; they must be a list of them"),
        (question(), ["a", ""], "An option is empty: ''"),
        (question(), ["a", "  "], "An option is empty: '  '"),
        ([*question(), {"role": "assistant", "content": "x"}], ["a"], "ends with the user's turn"),
        ([{"role": "user", "content": [{"type": "image", "image": b"no"}]}], ["a"], "image"),
    ],
)
def test_bad_questions_are_refused(model, processor, conversation, options, message):
    with pytest.raises(ValueError, match=message):
        score_options(model, processor, conversation, options)


def test_an_option_that_ends_beyond_the_models_positions_is_refused(model, processor, monkeypatch):
    prompt = len(processor.encode_conversation(question(), open_turn=True))
    option = score_options(model, processor, question(), OPTIONS)[1].num_tokens
    fits = prompt + option - 1

    def limited_to(positions):
        language = replace(model.config.language, max_positions=positions)
        monkeypatch.setattr(model, "config", replace(model.config, language=language))

    limited_to(fits)
    assert len(score_options(model, processor, question(), OPTIONS)) == 4
    limited_to(fits - 1)
    short = (question("?", images=0), ["a"])
    message = f"Question 1 .* prompt of {prompt} tokens .* option of {option} need {fits} positions, .* has {fits - 1}"
    with pytest.raises(ValueError, match=message):
        score_many(model, processor, [short, (question(), OPTIONS)])


def test_bad_forms_are_refused(model, processor):
    with pytest.raises(ValueError, match="by is 'max'; it must be 'sum', 'mean' or 'letter'"):
        choose(model, processor, question(), OPTIONS, by="max")
    with pytest.raises(ValueError, match="27 options cannot be lettered; it takes 1 to 26"):
        with_letters(question(), ["x"] * 27)
    with pytest.raises(ValueError, match="The options are 'abc', one string; they must be a list of them"):
        choose(model, processor, question(), "abc", by="letter")
    with pytest.raises(ValueError, match="the conversation has no messages"):
        with_letters([], ["x"])
    for message in ({"role": "user"}, {"role": "user", "content": 3}, "Which?"):
        with pytest.raises(ValueError, match="the last message has no content to list options in: "):
            with_letters([message], ["x"])
