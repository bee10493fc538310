"""A byte-level BPE tokenizer of DeepSeek's kind for a small configuration, trained on the spot in milliseconds."""

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from vlcore.config import VLConfig

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
IMAGE = "<image_placeholder>"

CORPUS = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language.",
    "User: What is the colour of the sky in this picture, and what stands under it?",
    "Assistant: The sky is blue. Under it stands a small house with a red roof, 3 windows and 12 trees beside it.",
    "The cat sat on the mat and looked at the other cat, which was drawn in black and white.",
    "图中有一只猫和一座房子。天空是蓝色的。",
)


def small_tokenizer(config: VLConfig, corpus: tuple[str, ...] = CORPUS) -> Tokenizer:
    """At most config.language.vocab_size tokens, with BOS, EOS and placeholder at the configuration's ids."""
    language = config.language
    control = {language.bos_token_id: BOS, language.eos_token_id: EOS, config.image_token_id: IMAGE}
    tokenizer = Tokenizer(models.BPE())
    splits = [r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"\s+$", r"[一-龥]+"]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in splits),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=language.vocab_size,
        special_tokens=[control.get(index, f"<｜unused{index}｜>") for index in range(max(control) + 1)],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return tokenizer
