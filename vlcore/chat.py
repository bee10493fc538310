"""A conversation in the terminal: `vlcore chat --model DIR [--image FILE]... [PROMPT]`."""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from vlcore.checkpoint import from_pretrained
from vlcore.generate import generate
from vlcore.processing import Processor, load_image

PROMPT = "> "


def run(model_directory: str | Path, images: Sequence[str | Path], prompt: str | None, **sampling: Any) -> int:
    """Answer `prompt`, or without it converse, one question a line, until the input ends.

    Answers go to standard output, piece by piece as they are generated. The images belong to the first question. The
    model runs on the GPU where there is one.

    Args:
        model_directory: in either public layout, with its tokenizer.
        images: files that the first question shows.
        prompt: a question, or None for a conversation: on a terminal with a prompt, otherwise the lines of standard
            input. Empty lines are passed over.
        sampling: max_new_tokens, temperature, top_p, repetition_penalty and seed of `generate`.

    Returns:
        0.

    Raises:
        ValueError, OSError: what cannot be loaded or answered. In a conversation on a terminal, a question that cannot
            be answered is said to be so, and the conversation goes on without it.
    """
    processor = Processor.from_pretrained(model_directory)
    shown = [load_image(path, str(path)) for path in images]
    device = "cuda" if torch.cuda.is_available() else None
    model = from_pretrained(model_directory, device=device)

    def answer(conversation: list[dict[str, Any]]) -> str:
        return generate(model, processor, conversation, stream=_write, **sampling)

    if prompt is not None:
        answer([_question(prompt, shown)])
        _write("\n")
    elif sys.stdin.isatty():
        _converse(answer, shown, _typed_lines(), goes_on=True)
    else:
        _converse(answer, shown, sys.stdin, goes_on=False)
    return 0


def _converse(
    answer: Callable[[list[dict[str, Any]]], str], images: Sequence[Image.Image], lines: Iterable[str], goes_on: bool
) -> None:
    history: list[dict[str, Any]] = []
    for line in lines:
        if not line.strip():
            continue
        question = _question(line, images)
        try:
            text = answer([*history, question])
        except ValueError as error:
            if not goes_on:
                raise
            print(error, file=sys.stderr)
            continue
        _write("\n")
        # A turn that was answered by nothing cannot stand in the prompt; its images go with the next question.
        if text.strip():
            history += [question, {"role": "assistant", "content": text}]
            images = ()


def _question(text: str, images: Sequence[Image.Image]) -> dict[str, Any]:
    pictures = [{"type": "image", "image": image} for image in images]
    return {"role": "user", "content": [*pictures, {"type": "text", "text": text}]}


def _typed_lines() -> Iterator[str]:
    while True:
        try:
            yield input(PROMPT)
        except EOFError:
            print()
            return


def _write(piece: str) -> None:
    print(piece, end="", flush=True)
