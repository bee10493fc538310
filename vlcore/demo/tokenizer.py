"""A small tokenizer of DeepSeek-LLM's kind, trained on the demo's own texts."""

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from vlcore.config import VLConfig

BOS, EOS, IMAGE = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<image_placeholder>"


def train_tokenizer(texts: Iterable[str], config: VLConfig) -> Tokenizer:
    """Byte-level BPE, digits one by one, with the control tokens at the ids that the configuration names.

    Args:
        texts: what is to be compressed.
        config: gives the size of the vocabulary, which the ids may end below, and the ids of BOS, EOS and the image
            placeholder, which must be the first three.

    Raises:
        ValueError: the control tokens are not the first three ids.
    """
    language = config.language
    spellings = {language.bos_token_id: BOS, language.eos_token_id: EOS, config.image_token_id: IMAGE}
    if sorted(spellings) != [0, 1, 2]:
        raise ValueError(f"The control tokens have the ids {sorted(spellings)}; this tokenizer puts them at 0, 1, 2.")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=language.vocab_size,
        special_tokens=[spellings[token_id] for token_id in range(3)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer
