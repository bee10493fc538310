"""Generation: all prompts of a batch in one prefill, then one token a row and step."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Integral
from threading import Lock
from typing import Any, SupportsIndex, overload

import torch
from torch import Tensor, nn

from vlcore.decoding import KVCache, next_logits
from vlcore.models.deepseek_vl import DeepSeekVL
from vlcore.processing import Batch, Encoded, ImageError, Processor, pack
from vlcore.processing.text_stream import TextStream

SEEDS = (-(2**63), 2**64 - 1)  # what torch's generators take


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen from the logits, in this order.

    Attributes:
        repetition_penalty: logits of tokens that the row holds, prompt included and image placeholders not, are
            divided by it where positive and multiplied where negative (as transformers does; arXiv 1909.05858).
        temperature: divides the logits; 0 takes the likeliest token.
        top_p: of the likeliest tokens, as many as it takes to reach this probability are drawn from (arXiv 1904.09751).
    """

    temperature: float = 0.0
    top_p: float = 1.0
    repetition_penalty: float = 1.0

    def __post_init__(self):
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature {self.temperature} must be 0 (greedy) or a positive number.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p {self.top_p} must be above 0 and at most 1.")
        if not 0 < self.repetition_penalty < math.inf:
            raise ValueError(f"repetition_penalty {self.repetition_penalty} must be a positive number; 1 is none.")

    def choose(self, logits: Tensor, seen: Tensor | None, generator: torch.Generator | None) -> Tensor:
        """logits (B, V), seen (B, V) bool or None -> (B,) ids."""
        logits = logits.float()
        if seen is not None:
            penalised = torch.where(logits > 0, logits / self.repetition_penalty, logits * self.repetition_penalty)
            logits = torch.where(seen, penalised, logits)
        if self.temperature == 0:
            return logits.argmax(-1)
        # The largest is taken off first: a small temperature may not make infinities of them.
        scaled = (logits - logits.amax(-1, keepdim=True)) / self.temperature
        probabilities, ids = scaled.softmax(-1).sort(-1, descending=True)
        above = probabilities.cumsum(-1) - probabilities
        kept = probabilities.masked_fill(above >= self.top_p, 0)
        return ids.gather(-1, torch.multinomial(kept, 1, generator=generator)).squeeze(-1)


@overload
def generate(
    model: DeepSeekVL,
    processor: Processor,
    conversation: Sequence[Mapping[str, Any]],
    max_new_tokens: SupportsIndex = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    seed: SupportsIndex | None = None,
    stream: Callable[[str], object] | None = None,
) -> str: ...


@overload
def generate(
    model: DeepSeekVL,
    processor: Processor,
    conversation: Sequence[Sequence[Mapping[str, Any]]],
    max_new_tokens: SupportsIndex = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    seed: SupportsIndex | None = None,
    stream: Callable[[int, str], object] | None = None,
) -> list[str]: ...


def generate(
    model: DeepSeekVL,
    processor: Processor,
    conversation: Sequence[Any],
    max_new_tokens: SupportsIndex = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    seed: SupportsIndex | None = None,
    stream: Callable[..., object] | None = None,
) -> str | list[str]:
    """Answer a conversation, or a list of them at once.

    Prompts of different lengths are packed, so that a row of a batch is computed as it would be alone. A row ends with
    EOS, with one of the configuration's `other_eos_token_ids`, or after `max_new_tokens`. Image placeholders, and ids
    that the tokenizer has no token for, are never chosen.

    Args:
        model: on any device; it is run in eval mode, and left in the mode it was in.
        processor: of the same model.
        conversation: one, or a list of them, in either style that `read_conversation` takes, ending with the user's
            turn.
        max_new_tokens: the most tokens of an answer.
        temperature, top_p, repetition_penalty: see `Sampling`; by default the likeliest token is taken.
        seed: makes sampling repeatable on one device, for the same list of conversations.
        stream: called with each piece of text as soon as it is final, `stream(piece)`; for a list of conversations
            `stream(row, piece)`. Pieces are whole characters, and together the answer.

    Returns:
        The answer, or a list of them: text without the white space that it begins with, and without a last character
        of which `max_new_tokens` left only a part.

    Raises:
        ValueError: an argument out of its range, a malformed conversation, or more tokens than the model has positions.
        ImageError: an image cannot be used.
    """
    sampling = Sampling(temperature=temperature, top_p=top_p, repetition_penalty=repetition_penalty)
    most = _integer("max_new_tokens", max_new_tokens, 1, math.inf, "a positive integer")
    if seed is not None:
        seed = _integer("seed", seed, *SEEDS, "an integer from -2**63 to 2**64 - 1")
    is_list = isinstance(conversation, (list, tuple)) and all(isinstance(c, (list, tuple)) for c in conversation)
    if is_list and not conversation:
        raise ValueError("There are no conversations to answer.")
    prompts = _encode(processor, conversation if is_list else [conversation], is_list)
    _check_lengths(prompts, most, model.config.language.max_positions, is_list)
    emit = stream
    if stream is not None and not is_list:
        emit = lambda row, piece: stream(piece)  # noqa: E731 - the one place where the forms of stream meet
    with evaluating(model) as device:
        batch = pack(prompts, processor).to(device)
        answers = _answer(model, processor, batch, most, sampling, seed, emit)
    return answers if is_list else answers[0]


def _integer(name: str, value: Any, least: int, most: float, needed: str) -> int:
    """A number of any type that is an integer to Python, such as NumPy's."""
    if isinstance(value, bool) or not isinstance(value, Integral) or not least <= int(value) <= most:
        raise ValueError(f"{name} {value!r} must be {needed}.")
    return int(value)


# Of each model that is run in eval mode at this moment: by how many threads, and the modes that the first one found.
_evaluated: dict[nn.Module, tuple[int, list[tuple[nn.Module, bool]]]] = {}
_changing_modes = Lock()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[torch.device]:
    """Eval mode without gradients; gives the device that the model is on, and leaves every module in its own mode, as
    the last of several threads does."""
    with _changing_modes:
        count, modes = _evaluated.get(model) or (0, [(module, module.training) for module in model.modules()])
        _evaluated[model] = count + 1, modes
        model.eval()
    try:
        with torch.inference_mode():
            yield next(model.parameters()).device
    finally:
        with _changing_modes:
            count, modes = _evaluated.pop(model)
            if count > 1:
                _evaluated[model] = count - 1, modes
            else:
                for module, mode in modes:
                    module.training = mode


def _answer(
    model: DeepSeekVL,
    processor: Processor,
    prompts: Batch,
    max_new_tokens: int,
    sampling: Sampling,
    seed: int | None,
    emit: Callable[[int, str], object] | None,
) -> list[str]:
    device, end = prompts.input_ids.device, processor.control.eos
    ends = torch.tensor([end, *model.config.language.other_eos_token_ids], device=device)
    generator = None if seed is None else torch.Generator(device).manual_seed(seed)
    num_rows, capacity = len(prompts.lengths), max(prompts.lengths) + max_new_tokens
    cache = KVCache(model.config.language, num_rows, capacity, model.compute_dtype, device)
    impossible = torch.arange(model.config.language.vocab_size, device=device) >= processor.num_token_ids
    impossible[processor.control.image] = True
    seen = None if sampling.repetition_penalty == 1 else _seen(prompts, processor.control.image, impossible.numel())
    step = next_logits(model, cache)
    texts = [TextStream(processor.decode) for _ in range(num_rows)]
    running = torch.ones(num_rows, dtype=torch.bool, device=device)
    logits = model.lm_head(_prefill(model, prompts, cache))
    for num_tokens in range(1, max_new_tokens + 1):
        tokens = sampling.choose(logits.masked_fill(impossible, -math.inf), seen, generator)
        running = running & ~torch.isin(tokens, ends)
        # The one place where the host waits for the device.
        ids = tokens.where(running, end).tolist()
        for row, token in enumerate(ids):
            piece = "" if token == end else texts[row].push(token)
            if piece and emit is not None:
                emit(row, piece)
        if num_tokens == max_new_tokens or all(token == end for token in ids):
            break
        if seen is not None:
            seen.scatter_(1, tokens[:, None], True)
        logits = step(tokens)
        # A row that has ended keeps writing to the slot behind its last token.
        cache.advance(running)
    return [text.text for text in texts]


def _prefill(model: DeepSeekVL, prompts: Batch, cache: KVCache) -> Tensor:
    """The hidden states (B, D) of the prompts' last tokens, the only ones whose logits are wanted."""
    assert prompts.cu_seqlens is not None
    cache.begin(prompts.lengths)
    output = model(
        prompts.input_ids,
        prompts.pixels,
        positions=prompts.positions,
        cu_seqlens=prompts.cu_seqlens,
        memory=cache,
        return_logits=False,
    )
    return output.hidden[0, prompts.cu_seqlens[1:].long() - 1]


def _seen(prompts: Batch, image_id: int, vocab_size: int) -> Tensor:
    """(B, V) bool: the tokens that each prompt holds, but for image placeholders."""
    assert prompts.cu_seqlens is not None
    lengths = prompts.cu_seqlens.diff().long()
    rows = torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)
    seen = torch.zeros(len(lengths), vocab_size, dtype=torch.bool, device=lengths.device)
    seen[rows, prompts.input_ids[0]] = True
    seen[:, image_id] = False
    return seen


def _encode(processor: Processor, conversations: Sequence[Any], is_list: bool) -> list[Encoded]:
    prompts = []
    for index, conversation in enumerate(conversations):
        try:
            prompts.append(processor.encode_conversation(conversation, open_turn=True))
        except ValueError as error:
            if not is_list:
                raise
            kind = ImageError if isinstance(error, ImageError) else ValueError
            raise kind(f"conversations[{index}]: {error}") from error
    return prompts


def _check_lengths(prompts: Sequence[Encoded], max_new_tokens: int, max_positions: int, is_list: bool) -> None:
    for index, prompt in enumerate(prompts):
        if len(prompt) + max_new_tokens > max_positions:
            which = f"conversations[{index}]" if is_list else "The conversation"
            raise ValueError(
                f"{which} has {len(prompt)} tokens with its {len(prompt.images)} images; with max_new_tokens "
                f"{max_new_tokens} that is more than the model's {max_positions} positions."
            )
