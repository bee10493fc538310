"""The sizes that operators are timed at: those of the presets, for a token, an image with text, and a batch of them."""

from vlcore.config import LlamaConfig, preset
from vlcore.costs import TEXT_TOKENS

HYBRID = preset("deepseek_vl_1_3b_hybrid")
LLAMA: LlamaConfig = HYBRID.language
LLAMA_7B: LlamaConfig = preset("deepseek_vl_7b").language
# Tokens of an image with text, of which the text is supervised, and of a training batch of eight.
PROMPT = HYBRID.num_image_tokens + TEXT_TOKENS
BATCH = 8 * PROMPT
