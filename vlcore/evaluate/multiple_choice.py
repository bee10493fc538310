"""Multiple choice by likelihood: of the answers offered, the one that the model finds likeliest after the question.

Two forms are in use: the whole text of an option is scored (its sum, or its mean a token), or the options are listed in
the question and the letter is scored.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any, Literal

import torch
from torch import Tensor

from vlcore.evaluate.prefix import PrefixRecorder, SharedPrefix
from vlcore.generate import evaluating
from vlcore.models import DeepSeekVL
from vlcore.processing import IGNORE_INDEX, Encoded, Processor, collate

Conversation = Sequence[Mapping[str, Any]]
LETTER_REQUEST = "Answer with the option's letter from the given choices directly."


@dataclass(frozen=True)
class OptionScore:
    """How unlikely an option is after its question.

    Attributes:
        sum_nll: negative log-likelihood of its tokens, in nats.
        num_tokens: how many they are.
    """

    sum_nll: float
    num_tokens: int

    @property
    def mean_nll(self) -> float:
        """A token's, whose exponential is the option's perplexity."""
        return self.sum_nll / self.num_tokens


def score_options(
    model: DeepSeekVL,
    processor: Processor,
    conversation: Conversation,
    options: Sequence[str],
    *,
    with_eos: bool = True,
) -> list[OptionScore]:
    """Score every option as the answer to a conversation: the prompt is computed once, the options together behind it.

    Args:
        conversation: of either style that `Processor.encode_conversation` takes, ending with the user's turn.
        options: answers.
        with_eos: count the EOS that ends the answer, so that an option is not likelier for being the beginning of
            another one (ours; the paper does not say).

    Returns:
        One score an option.

    Raises:
        ValueError: the conversation does not end with the user's turn, the options are one string, one is empty, or
            prompt and option need more positions than the model has.
        ImageError: an image cannot be used.
    """
    return score_many(model, processor, [(conversation, options)], with_eos=with_eos)[0]


def score_many(
    model: DeepSeekVL,
    processor: Processor,
    questions: Sequence[tuple[Conversation, Sequence[str]]],
    *,
    with_eos: bool = True,
    max_rows: int = 128,
) -> list[list[OptionScore]]:
    """`score_options` of many questions, those with prompts of equal length together.

    Args:
        questions: pairs of a conversation and its options.
        with_eos: as for `score_options`.
        max_rows: options of one forward, over several questions; a single question may have more.

    Returns:
        One list a question, in the order given, equal to what score_options gives but for rounding.

    Raises:
        ValueError, ImageError: as `score_options`.
    """
    answers = _Answers(processor, with_eos)
    encoded = [answers.question(conversation, options) for conversation, options in questions]
    for number, (prompt, options) in enumerate(encoded):
        _check_length(model, number, len(prompt), max(map(len, options)))
    by_length: dict[int, list[int]] = defaultdict(list)
    for index, (prompt, _) in enumerate(encoded):
        by_length[len(prompt)].append(index)
    scores: dict[int, list[OptionScore]] = {}
    with evaluating(model) as device:
        for indices in by_length.values():
            for group in _groups(indices, [len(encoded[index][1]) for index in indices], max_rows):
                found = _score(model, processor, [encoded[index] for index in group], device)
                scores |= dict(zip(group, found, strict=True))
    return [scores[index] for index in range(len(questions))]


def choose(
    model: DeepSeekVL,
    processor: Processor,
    conversation: Conversation,
    options: Sequence[str],
    *,
    by: Literal["sum", "mean", "letter"] = "mean",
) -> int:
    """The option that the model finds likeliest.

    Args:
        by: "mean" or "sum" of the negative log-likelihood of each option's text, or "letter": the options are listed in
            the prompt, and the letter is scored alone.

    Returns:
        Its position in `options`; the first of equals.

    Raises:
        ValueError: another `by`, no options, or as `score_options`.
    """
    if by not in ("sum", "mean", "letter"):
        raise ValueError(f"choose: by is {by!r}; it must be 'sum', 'mean' or 'letter'.")
    if by == "letter":
        listed = with_letters(conversation, options)
        scores = score_options(model, processor, listed, list(ascii_uppercase[: len(options)]), with_eos=False)
    else:
        scores = score_options(model, processor, conversation, options)
    values = [score.mean_nll if by == "mean" else score.sum_nll for score in scores]
    return values.index(min(values))


def with_letters(conversation: Conversation, options: Sequence[str]) -> list[Mapping[str, Any]]:
    """The conversation with the options listed after its last message, a letter each, and the letter asked for.

    The wording is LLaVA's, which the public evaluation tools share.

    Raises:
        ValueError: there are no options, more than there are letters, or one string; or no last message with content.
    """
    _check_several(options)
    if not 0 < len(options) <= len(ascii_uppercase):
        raise ValueError(
            f"with_letters: {len(options)} options cannot be lettered; it takes 1 to {len(ascii_uppercase)}."
        )
    lines = [f"{letter}. {option}" for letter, option in zip(ascii_uppercase, options, strict=False)]
    listing = "\n".join(["", *lines, LETTER_REQUEST])
    if not conversation:
        raise ValueError("with_letters: the conversation has no messages.")
    *before, last = conversation
    content = last.get("content") if isinstance(last, Mapping) else None
    if not isinstance(content, (str, list, tuple)):
        raise ValueError(f"with_letters: the last message has no content to list options in: {last!r:.80}.")
    if isinstance(content, str):
        return [*before, {**last, "content": content + listing}]
    *parts, end = content or [None]
    if isinstance(end, Mapping) and end.get("type") == "text" and isinstance(end.get("text"), str):
        return [*before, {**last, "content": [*parts, {**end, "text": end["text"] + listing}]}]
    return [*before, {**last, "content": [*content, {"type": "text", "text": listing}]}]


class _Answers:
    """Tokenises prompts, and answers as they stand behind one; the same answer is tokenised once."""

    def __init__(self, processor: Processor, with_eos: bool):
        self.processor, self.with_eos = processor, with_eos
        self._known: dict[str, list[int]] = {}

    def question(self, conversation: Conversation, options: Sequence[str]) -> tuple[Encoded, list[list[int]]]:
        _check_several(options)
        if not options:
            raise ValueError("A question needs one or more options; it has none.")
        return self.processor.encode_conversation(conversation, open_turn=True), [self.ids(text) for text in options]

    def ids(self, text: str) -> list[int]:
        """The tokens that training would supervise in an answer."""
        if text not in self._known:
            turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": text}]
            labels = self.processor.encode_conversation(turns, supervise=True).labels
            ids = labels[labels != IGNORE_INDEX].tolist()
            if len(ids) < 2:
                raise ValueError(f"An option is empty: {text!r}.")
            self._known[text] = ids if self.with_eos else ids[:-1]
        return self._known[text]


def _check_several(options: Sequence[str]) -> None:
    """A string is a sequence of its letters, which nobody means by it."""
    if isinstance(options, str):
        raise ValueError(f"The options are {options!r:.60}, one string; they must be a list of them.")


def _check_length(model: DeepSeekVL, number: int, prompt: int, option: int) -> None:
    """Of a question's prompt and its longest option, of which the last token is not read."""
    longest = model.config.language.max_positions
    if prompt + option - 1 > longest:
        raise ValueError(
            f"Question {number} cannot be scored: its prompt of {prompt} tokens and its longest option of {option} "
            f"need {prompt + option - 1} positions, and the model has {longest}."
        )


def _groups(indices: list[int], sizes: list[int], limit: int) -> list[list[int]]:
    """Consecutive indices in groups whose sizes sum to at most `limit`, or that are alone."""
    groups: list[list[int]] = []
    room = 0
    for index, size in zip(indices, sizes, strict=True):
        if size > room:
            groups.append([])
            room = limit
        groups[-1].append(index)
        room -= size
    return groups


def _score(
    model: DeepSeekVL, processor: Processor, questions: list[tuple[Encoded, list[list[int]]]], device: torch.device
) -> list[list[OptionScore]]:
    """Questions with prompts of one length P: a forward over the prompts, then one over all options behind them."""
    batch = collate([prompt for prompt, _ in questions], processor).to(device)
    recorder = PrefixRecorder()
    places = torch.arange(batch.input_ids.shape[1], device=device).expand(batch.input_ids.shape)
    hidden = model(batch.input_ids, batch.pixels, positions=places, memory=recorder, return_logits=False).hidden
    answers = [ids for _, options in questions for ids in options]
    owners = [number for number, (_, options) in enumerate(questions) for _ in options]
    prompts = torch.tensor(owners, device=device)
    labels = _padded(answers, IGNORE_INDEX, device)
    # The prompt's last state predicts an answer's first token, and each token of it the next: the last is not read.
    states_BTD = hidden[:, -1:].index_select(0, prompts)
    if labels.shape[1] > 1:
        inputs = _padded([ids[:-1] for ids in answers], processor.pad_token_id, device)
        behind = torch.arange(inputs.shape[1], device=device).expand(inputs.shape) + places.shape[1]
        memory = SharedPrefix(recorder, prompts)
        following = model(inputs, positions=behind, memory=memory, return_logits=False).hidden
        states_BTD = torch.cat([states_BTD, following], 1)
    sums = iter(model.loss(states_BTD, labels, "none").double().sum(1).tolist())
    return [[OptionScore(next(sums), len(ids)) for ids in options] for _, options in questions]


def _padded(rows: list[list[int]], value: int, device: torch.device) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + [value] * (width - len(row)) for row in rows], device=device)
