"""From a sample to token ids, labels and images, or to the reason why it cannot be trained on."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from PIL import Image

from vlcore.data.sample import BadSample, Overlong, Sample
from vlcore.processing import IGNORE_INDEX, Encoded, Processor


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """Encodes the samples of one stage.

    Attributes:
        processor: tokenizer, chat template and image settings.
        sequence_length: the most tokens that a sample may have, images included.
        supervise: "text" supervises all text, of conversations too; "answers" those of conversations and their EOS.
        overlong: "skip" refuses a sample that is too long; "truncate" cuts a document's text at the end, and leaves out
            the last turns of a conversation, up to an answer that fits.
    """

    processor: Processor
    sequence_length: int
    supervise: Literal["text", "answers"] = "text"
    overlong: Literal["skip", "truncate"] = "skip"

    def __call__(
        self, sample: Sample, augment: Callable[[Image.Image], Image.Image] | None = None
    ) -> tuple[Encoded, int]:
        """The sample encoded, and how many tokens were cut off its end.

        Raises:
            BadSample: an image that cannot be read, placeholders that do not match the images, no token supervised, a
                conversation to learn all of that ends without an answer, images where its modality has none or the
                other way round, or `augment` fails or makes no image.
            Overlong: too many tokens, and no beginning that could be learned.
        """
        try:
            encoded = self._encode(sample)
        except BadSample:
            raise
        except (ValueError, OSError) as error:
            raise BadSample(str(error), sample.id) from None
        if (sample.modality == "multimodal") != bool(encoded.images):
            raise BadSample(f"it has {len(encoded.images)} images, but its source is {sample.modality}.", sample.id)
        encoded, cut = self._fit(encoded, sample)
        if not (encoded.labels[1:] != IGNORE_INDEX).any():
            raise BadSample(f"all {len(encoded.labels)} labels are masked: no token is supervised.", sample.id)
        if augment is not None:
            encoded = replace(encoded, images=[_augmented(augment, image, sample) for image in encoded.images])
        return encoded, cut

    def _encode(self, sample: Sample) -> Encoded:
        if sample.document is not None:
            if self.supervise == "answers":
                raise BadSample("it is a document, but only answers are supervised.", sample.id)
            return self.processor.encode_document(sample.document)
        assert sample.conversation is not None
        encoded = self.processor.encode_conversation(sample.conversation, supervise=True)
        if self.supervise == "answers":
            return encoded
        if encoded.input_ids[-1] != self.processor.control.eos:
            raise BadSample("its last turn is no answer, and what would open one is not to be learned.", sample.id)
        labels = encoded.input_ids.masked_fill(encoded.input_ids == self.processor.control.image, IGNORE_INDEX)
        labels[0] = IGNORE_INDEX  # BOS, which nothing comes before
        return replace(encoded, labels=labels)

    def _fit(self, encoded: Encoded, sample: Sample) -> tuple[Encoded, int]:
        length, limit = len(encoded.input_ids), self.sequence_length
        if length <= limit:
            return encoded, 0
        end = self._end(encoded, sample) if self.overlong == "truncate" else 0
        ids = encoded.input_ids[:end]
        # An image's placeholders lie all before the end or all behind it.
        num_images = int((ids == self.processor.control.image).sum()) // self.processor.control.num_image_tokens
        has_labels = bool((encoded.labels[1:end] != IGNORE_INDEX).any())
        if not has_labels or bool(num_images) != bool(encoded.images):
            raise Overlong(f"it has {length} tokens, over the sequence length of {limit}.", sample.id)
        fitting = replace(encoded, input_ids=ids, labels=encoded.labels[:end], images=encoded.images[:num_images])
        return fitting, length - end

    def _end(self, encoded: Encoded, sample: Sample) -> int:
        """Where an overlong sample may be cut: in a document's text, behind a conversation's answer; 0 is nowhere."""
        control, limit = self.processor.control, self.sequence_length
        if sample.document is not None:
            return 0 if (encoded.input_ids[limit:] == control.image).any() else limit
        answer_ends = (encoded.input_ids[:limit] == control.eos).nonzero()
        return int(answer_ends[-1]) + 1 if len(answer_ends) else 0


def _augmented(augment: Callable[[Image.Image], Image.Image], image: Image.Image, sample: Sample) -> Image.Image:
    try:
        changed = augment(image)
    except Exception as error:  # a user's function may raise anything
        raise BadSample(f"its augmentation failed: {type(error).__name__}: {error}", sample.id) from error
    if not isinstance(changed, Image.Image) or changed.mode != "RGB" or 0 in changed.size:
        raise BadSample(f"its augmentation returned {changed!r:.80}, which is no RGB image with pixels.", sample.id)
    return changed
