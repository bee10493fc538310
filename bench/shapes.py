"""The sizes that operators are timed at: those of the presets, for a token, an image with text, and a batch of them."""

from collections.abc import Callable

from vlcore.bench.harness import Case
from vlcore.config import LlamaConfig, preset
from vlcore.costs import TEXT_TOKENS

HYBRID = preset("deepseek_vl_1_3b_hybrid")
LLAMA: LlamaConfig = HYBRID.language
LLAMA_7B: LlamaConfig = preset("deepseek_vl_7b").language
# Tokens of an image with text, of which the text is supervised, and of a training batch of eight.
PROMPT = HYBRID.num_image_tokens + TEXT_TOKENS
BATCH = 8 * PROMPT


def row_cases(case: Callable[..., Case], size: Callable[[LlamaConfig], int]) -> list[Case]:
    """Of an operator on the language model's rows: `case` takes how many, of what size, and whether it trains."""
    row, wide_row = size(LLAMA), size(LLAMA_7B)
    return [
        case(1, row),
        case(PROMPT, row),
        case(PROMPT, row, trains=True),
        case(PROMPT, wide_row),
        case(BATCH, row),
        case(BATCH, row, trains=True),
    ]
