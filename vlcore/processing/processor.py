"""Conversations, documents and images in; token ids, labels and pixels out."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer
from torch import Tensor

from vlcore.config import VLConfig
from vlcore.processing import public_files
from vlcore.processing.chat import IMAGE_PLACEHOLDER, ChatTemplate, read_conversation
from vlcore.processing.images import ImageSettings, batch_pixels, load_image
from vlcore.processing.segments import (
    Bos,
    ControlTokens,
    Encoded,
    Eos,
    Picture,
    Segment,
    Text,
    encode_segments,
)


class Processor:
    """What turns a user's words and images into a model's inputs, and its tokens into words.

    Attributes:
        tokenizer: a copy of the one given, in which text never becomes a control token.
        config: the model's configuration, whose special ids and image size are used.
        template: the chat template.
        settings: how images become pixels.
        control: the ids of BOS, EOS and image placeholder, and the placeholders an image takes.
        pad_token_id: what fills batches.
        num_token_ids: ids from here on stand for nothing; a model's vocabulary may be larger.
    """

    def __init__(self, tokenizer: Tokenizer, config: VLConfig, template: ChatTemplate | None = None):
        """
        Args:
            tokenizer: it must hold BOS, EOS and `<image_placeholder>` at the ids that the configuration names. It is
                copied; truncation and padding that it may be set to are left out of the copy.
            config: of the model that will be fed.
            template: by default DeepSeek-VL's with its system prompt.

        Raises:
            ValueError: the tokenizer and the configuration disagree, both values named.
        """
        language = config.language
        self.config = config
        self.template = template or ChatTemplate()
        self.settings = ImageSettings.from_config(config)
        self.control = ControlTokens(
            language.bos_token_id, language.eos_token_id, config.image_token_id, config.num_image_tokens
        )
        self.pad_token_id = language.pad_token_id
        self.tokenizer = _guarded_copy(tokenizer, config)
        added = self.tokenizer.get_added_tokens_decoder()
        self.num_token_ids = max(self.tokenizer.get_vocab_size(with_added_tokens=False), *(i + 1 for i in added))

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A tokenizer that was pickled, for a worker process, has forgotten that control tokens in text are text."""
        self.__dict__.update(state)
        self.tokenizer.encode_special_tokens = True

    @classmethod
    def from_pretrained(cls, directory: str | Path, template: ChatTemplate | None = None) -> "Processor":
        """The processor of a model directory: its `tokenizer.json`, and the ids and sizes in its `config.json`.

        Args:
            directory: in either public layout; or one without a model, which `save_pretrained` wrote.
            template: by default DeepSeek-VL's, with the system prompt that `save_pretrained` wrote into
                `processor_config.json` where there is one.

        Raises:
            FileNotFoundError: no `tokenizer.json` or no configuration there.
            ValueError: a file is damaged, or tokenizer and configuration disagree.
        """
        directory = Path(directory)
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist; a processor needs the tokenizer of its model.")
        config = public_files.read_model_config(directory)
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises the bare class
            raise ValueError(f"{path} is no tokenizer that can be read: {error}") from error
        if template is None:
            template = public_files.read_template(directory)
        try:
            return cls(tokenizer, config, template)
        except ValueError as error:
            raise ValueError(f"{directory}: {error}") from error

    def save_pretrained(self, directory: str | Path) -> None:
        """Write the tokenizer, chat template and image settings, as transformers' AutoProcessor reads them.

        The files are tokenizer.json, tokenizer_config.json, chat_template.jinja, preprocessor_config.json,
        processor_config.json, which holds the model's configuration too, and generation_config.json. All are written
        under other names first, then renamed, so that a full disk leaves what was there. Two things transformers cannot
        express: it rounds the sides of an image where the public model truncates them, and takes the pad colour of the
        image from the high-resolution tower's mean (model.image_mean for one tower), whatever `config.pad_color` is.

        Raises:
            OSError: the directory cannot be written to; it is as it was before.
        """
        public_files.write(Path(directory), public_files.contents(self.tokenizer, self.config, self.template))

    def encode_conversation(
        self,
        conversation: Sequence[Mapping[str, Any]],
        *,
        supervise: bool = False,
        open_turn: bool | None = None,
    ) -> Encoded:
        """Tokenise a conversation by the chat template and load its images.

        Args:
            conversation: of either style that `read_conversation` takes.
            supervise: labels are the answers and the EOS that ends each; without it they are -100 everywhere.
            open_turn: end with `Assistant:`, for an answer to be generated. By default it is so when the last turn
                with content is the user's.

        Raises:
            ValueError: the conversation is malformed, or `open_turn` after an assistant's turn.
            ImageError: an image cannot be used; the message names its file or its place in the conversation.
        """
        read = read_conversation(conversation)
        if open_turn and not read.ends_with_user:
            raise ValueError(
                "open_turn=True needs a conversation that ends with the user's turn; the assistant's does."
            )
        open_turn = read.ends_with_user if open_turn is None else open_turn
        return self._encode(self.template.render(read, supervise=supervise, open_turn=open_turn))

    def encode_document(self, parts: Sequence[Any]) -> Encoded:
        """Tokenise texts with images between them: BOS, the parts, EOS.

        Args:
            parts: each a str, which is text, or {"text": str}; or an image: {"image": source}, or a source other than
                str (`pathlib.Path`, bytes, Pillow image, numpy array).

        Returns:
            Labels are the text and EOS; -100 at BOS and images.

        Raises:
            ValueError: a part is of another form, or there is none.
            ImageError: an image cannot be used.
        """
        if isinstance(parts, (str, bytes, Mapping)) or not isinstance(parts, Sequence) or not parts:
            raise ValueError(f"A document is a list of one or more parts, not {parts!r:.60}.")
        segments = [_document_part(part, f"document[{index}]") for index, part in enumerate(parts)]
        return self._encode([Bos(), *segments, Eos(supervised=True)])

    def encode_text(self, text: str) -> list[int]:
        """The ids of a text, without BOS or EOS; control tokens that it spells stay text.

        Raises:
            ValueError: the text holds half of a surrogate pair, as broken JSON escapes leave it.
        """
        return self._encode_run(text).ids

    def decode(self, ids: Iterable[int] | Tensor) -> str:
        """The text of ids; control tokens have none."""
        return self.tokenizer.decode(ids.tolist() if isinstance(ids, Tensor) else list(ids), skip_special_tokens=True)

    def pixels(self, images: Sequence[Image.Image]) -> Tensor | None:
        """(I, 3, S, S) float32 in [0, 1], or None where there are no images."""
        return batch_pixels(images, self.settings)

    def _encode(self, segments: Sequence[Segment]) -> Encoded:
        images = []
        for segment in segments:
            if isinstance(segment, Picture):
                name = None if _names_itself(segment.source) else segment.where
                images.append(load_image(segment.source, name, max_pixels=self.settings.max_pixels))
        ids, labels = encode_segments(segments, self._encode_run, self.control)
        encoded = Encoded(torch.tensor(ids), torch.tensor(labels), images)
        encoded.check_images(self.control)
        return encoded

    def _encode_run(self, text: str) -> Any:
        surrogate = next((index for index, c in enumerate(text) if "\ud800" <= c <= "\udfff"), None)
        if surrogate is not None:
            around = text[max(surrogate - 20, 0) : surrogate + 20]
            raise ValueError(f"The text {around!r} cannot be tokenised: half of a surrogate pair is no character.")
        return self.tokenizer.encode(text, add_special_tokens=False)


def _names_itself(source: Any) -> bool:
    return isinstance(source, Path) or (isinstance(source, str) and not source.startswith("data:"))


def _document_part(part: Any, where: str) -> Segment:
    if isinstance(part, Mapping):
        if set(part) == {"text"}:
            part = part["text"]
        elif set(part) == {"image"}:
            return Picture(part["image"], where)
        else:
            raise ValueError(f"{where} has keys {sorted(map(str, part))}; it must have 'text' or 'image' alone.")
        if not isinstance(part, str):
            raise ValueError(f"{where}['text'] is {part!r:.60}; it must be a string.")
    return Text(part, supervised=True) if isinstance(part, str) else Picture(part, where)


def _guarded_copy(tokenizer: Tokenizer, config: VLConfig) -> Tokenizer:
    """A copy that agrees with the configuration and makes no control token of text."""
    language = config.language
    size = tokenizer.get_vocab_size()
    if size > language.vocab_size:
        raise ValueError(f"The tokenizer has {size} tokens; the model's vocab_size is {language.vocab_size}.")
    image_id = tokenizer.token_to_id(IMAGE_PLACEHOLDER)
    if image_id != config.image_token_id:
        raise ValueError(
            f"The tokenizer has {IMAGE_PLACEHOLDER} at id {image_id}; image_token_id is {config.image_token_id}."
        )
    copy = Tokenizer.from_str(tokenizer.to_str())
    copy.no_truncation()
    copy.no_padding()
    copy.encode_special_tokens = True
    added = copy.get_added_tokens_decoder()
    control = {
        "bos_token_id": language.bos_token_id,
        "eos_token_id": language.eos_token_id,
        "image_token_id": config.image_token_id,
    }
    for key, token_id in control.items():
        spelling = copy.id_to_token(token_id)
        if spelling is None:
            raise ValueError(f"The tokenizer has no token of id {token_id}, which is the configuration's {key}.")
        # Only what is marked special can be kept from being found in text.
        if token_id not in added or not added[token_id].special:
            copy.add_special_tokens([AddedToken(spelling, special=True, normalized=False)])
        if token_id in copy.encode(spelling, add_special_tokens=False).ids:
            raise ValueError(
                f"The tokenizer makes the control token {token_id} ({key}) of the plain text {spelling!r}."
            )
    return copy
