"""DeepSeek-VL: image tokens take the places of the placeholders in the text, and LLaMA reads the whole."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlcore import ops
from vlcore.config import PARTS, VLConfig
from vlcore.models.adaptor import make_adaptor
from vlcore.models.layers import Linear, is_plain
from vlcore.models.llama import Llama, Memory
from vlcore.models.packing import IGNORED, pack, restarting_positions, shifted_labels, unpack
from vlcore.models.vision import TowerFeatures, Vision
from vlcore.ops.checks import INTEGER
from vlcore.ops.dispatch import has_values


class VLOutput(NamedTuple):
    """What a forward gives.

    Attributes:
        loss: () float32, or None without labels.
        logits: (B, T, V), or None where they were not asked for.
        hidden: (B, T, D), the language model's last hidden states.
    """

    loss: Tensor | None
    logits: Tensor | None
    hidden: Tensor


class DeepSeekVL(nn.Module):
    """The whole model, as `config` describes it.

    Attributes:
        vision, adaptor, language, lm_head: its parts; `lm_head` shares the embedding's weight when they are tied.
        unused: weights that a checkpoint holds and the model never applies, kept to be written back.
    """

    def __init__(self, config: VLConfig):
        super().__init__()
        self.config = config
        self.vision = Vision(config)
        self.adaptor = make_adaptor(config)
        self.language = Llama(config.language)
        self.lm_head = Linear(config.language.hidden_size, config.language.vocab_size, bias=False)
        if config.language.tie_embeddings:
            self.lm_head.weight = self.language.embed_tokens.weight
        self.unused: dict[str, Tensor] = {}
        self._compute_dtype: torch.dtype | None = None

    @property
    def compute_dtype(self) -> torch.dtype:
        """What embeddings and pixels are cast to, and so what everything computes in; by default the weights' dtype."""
        return self._compute_dtype or self.language.embed_tokens.weight.dtype

    @compute_dtype.setter
    def compute_dtype(self, dtype: torch.dtype | None) -> None:
        self._compute_dtype = dtype

    def encode_towers(self, pixels: Tensor) -> TowerFeatures:
        """pixels (I, 3, S, S) float in [0, 1] -> the towers' features, which can be kept while the towers are frozen.

        Raises:
            ValueError: pixels of another shape, or integers.
        """
        size = self.config.image_size
        if pixels.shape[1:] != (3, size, size) or not pixels.is_floating_point():
            raise ValueError(
                f"pixels are {tuple(pixels.shape)} {pixels.dtype}; "
                f"this model reads (num_images, 3, {size}, {size}) of float in [0, 1]."
            )
        return self.vision.towers(pixels, self.compute_dtype)

    def adapt(self, features: TowerFeatures) -> Tensor:
        """The towers' features -> (I, num_image_tokens, D), what stands in for an image's placeholders."""
        return self.adaptor(*self.vision(features))

    def encode_images(self, pixels: Tensor) -> Tensor:
        """pixels (I, 3, S, S) float in [0, 1] -> (I, num_image_tokens, D); frozen towers keep no graph."""
        return self.adapt(self.encode_towers(pixels))

    def embed(self, input_ids: Tensor, pixels: Tensor | None = None, image_features: Tensor | None = None) -> Tensor:
        """Token embeddings, with image tokens at the placeholders in reading order.

        Args:
            input_ids: (B, T) int; config.image_token_id is a placeholder.
            pixels: (I, 3, S, S) float in [0, 1].
            image_features: (I, num_image_tokens, D) in place of pixels, what `encode_images` gives.

        Returns:
            (B, T, D) of compute_dtype.

        Raises:
            ValueError: there are not as many placeholders as image tokens, the features have another shape, or both
                pixels and features are given.
            RuntimeError: in a compiled graph, in place of the ValueError for placeholders.
        """
        if pixels is not None and image_features is not None:
            raise ValueError("Give pixels or image_features, not both.")
        if pixels is not None:
            image_features = self.encode_images(pixels)
        elif image_features is not None:
            self._check_features(image_features)
        embeddings = self.language.embed_tokens(input_ids, self.compute_dtype)
        is_image = input_ids == self.config.image_token_id
        num_images = 0 if image_features is None else image_features.shape[0]
        self._check_placeholders(is_image, num_images)
        if image_features is None or num_images == 0:
            return embeddings
        image_rows = image_features.flatten(0, 1).to(embeddings.dtype)
        places = torch.nonzero_static(is_image.flatten(), size=image_rows.shape[0]).squeeze(1)
        return embeddings.flatten(0, 1).index_copy(0, places, image_rows).view(embeddings.shape)

    def forward(
        self,
        input_ids: Tensor,
        pixels: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        positions: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        memory: Memory | None = None,
        image_features: Tensor | None = None,
        return_logits: bool | None = None,
        loss_reduction: str = "mean",
    ) -> VLOutput:
        """Read text and images; give the hidden states and, where asked, the loss and the logits.

        Args:
            input_ids: (B, T) int; num_image_tokens placeholders for each image.
            pixels: (I, 3, S, S) float in [0, 1], not normalised, in the reading order of the placeholders.
            labels: (B, T) int, aligned with input_ids: the state at t predicts labels[t + 1]. -100 is not supervised.
            positions: (B, T) int; by default each sequence counts from 0.
            attention_mask: (B, T), non-zero at real tokens, padding on either side. Padding is not computed, and its
                hidden states and logits are zero.
            cu_seqlens: (num_sequences + 1,) int32, the borders of the sequences that B = 1 packs.
            memory: attends in place of plain causal attention, such as decoding's KVCache.
            image_features: (I, num_image_tokens, D) in place of pixels.
            return_logits: by default, in eval mode without labels.
            loss_reduction: "mean" over the supervised tokens, or "sum".

        Raises:
            ValueError: input_ids of another shape or dtype; placeholders and images do not match; labels, positions or
                an attention_mask of another shape than input_ids; labels that supervise nothing under "mean" (not
                checked in a compiled graph); an attention_mask together with cu_seqlens or memory; a memory without
                positions.
            RuntimeError: in a compiled graph, placeholders and images do not match.
        """
        if input_ids.ndim != 2 or input_ids.dtype not in INTEGER:
            raise ValueError(
                f"input_ids are {tuple(input_ids.shape)} {input_ids.dtype}; they need to be (B, T) integers."
            )
        for name, tensor in (("labels", labels), ("positions", positions), ("attention_mask", attention_mask)):
            if tensor is not None and tensor.shape != input_ids.shape:
                raise ValueError(
                    f"{name} is {tuple(tensor.shape)}; input_ids {tuple(input_ids.shape)} need the same shape."
                )
        if attention_mask is not None:
            if cu_seqlens is not None or memory is not None:
                raise ValueError("An attention_mask goes with neither cu_seqlens nor a memory.")
            return self._forward_padded(
                input_ids, attention_mask, labels, positions, pixels, image_features, return_logits, loss_reduction
            )
        if memory is not None and positions is None:
            raise ValueError("Tokens behind a memory stand somewhere: a memory needs positions.")
        if memory is not None and input_ids.shape[1] == 1 and pixels is None and image_features is None:
            # A decoding step: whatever id was drawn is text, and looking would cost a synchronisation a token.
            embeddings = self.language.embed_tokens(input_ids, self.compute_dtype)
        else:
            embeddings = self.embed(input_ids, pixels, image_features)
        if positions is None:
            positions = restarting_positions(input_ids, cu_seqlens)
        hidden = self.language(embeddings, positions, cu_seqlens=cu_seqlens, memory=memory)
        loss = None if labels is None else self.loss(hidden, shifted_labels(labels, cu_seqlens), loss_reduction)
        if return_logits is None:
            return_logits = labels is None and not self.training
        return VLOutput(loss, self.lm_head(hidden) if return_logits else None, hidden)

    def decode(
        self,
        tokens: Tensor,
        operands: Sequence[ops.BlockWeights],
        key_caches: Sequence[Tensor],
        value_caches: Sequence[Tensor],
        lengths: Tensor,
    ) -> Tensor:
        """One new text token (B,) a row, behind what the caches hold -> hidden states (B, D); see `Llama.decode`."""
        embeddings = self.language.embed_tokens(tokens[:, None], self.compute_dtype)
        return self.language.decode(embeddings, operands, key_caches, value_caches, lengths)[:, 0]

    def loss(self, hidden: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
        """The cross-entropy of hidden states' logits.

        Args:
            hidden: (B, T, D), what the language model gives.
            targets: (B, T) int, the token that each state is to predict, or -100.
            reduction: "mean" over the supervised tokens, "sum", or "none".

        Returns:
            A scalar, or (B, T) with 0 where nothing is supervised for "none"; float32.

        Raises:
            ValueError: no target is supervised under "mean" (not checked in a compiled graph).
        """
        # What depends on the values cannot be checked in a compiled graph.
        if reduction == "mean" and has_values(targets) and not (targets != IGNORED).any():
            raise ValueError(
                f"All {targets.numel()} labels are masked ({IGNORED}), so there is no mean loss: nothing is supervised."
            )
        if not is_plain(self.lm_head):
            logits = self.lm_head(hidden).flatten(0, -2).float()
            losses = F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORED, reduction=reduction)
            return losses.view(targets.shape) if reduction == "none" else losses
        weight = self.lm_head.operand(hidden.dtype)
        if isinstance(weight, ops.QuantizedWeight):
            weight = weight.dequantize(hidden.dtype)
        return ops.linear_cross_entropy(hidden, weight, targets, ignore_index=IGNORED, reduction=reduction)

    def parts(self) -> dict[str, list[nn.Parameter]]:
        """The parameters of "sam" (ViT and necks), "siglip", "adaptor" (with the two stride-2 convolutions and alpha,
        which the paper counts as adaptor) and "language" (embeddings and head included); each is in exactly one."""
        parts: dict[str, list[nn.Parameter]] = {part: [] for part in dict.fromkeys(PARTS.values())}
        for name, parameter in self.named_parameters():
            parts[next(part for prefix, part in PARTS.items() if name.startswith(prefix))].append(parameter)
        return parts

    def _forward_padded(
        self, input_ids, attention_mask, labels, positions, pixels, image_features, return_logits, loss_reduction
    ) -> VLOutput:
        real, cu_seqlens = pack(attention_mask)
        packed = self.forward(
            input_ids.flatten()[real][None],
            pixels,
            None if labels is None else labels.flatten()[real][None],
            positions=None if positions is None else positions.flatten()[real][None],
            cu_seqlens=cu_seqlens,
            image_features=image_features,
            return_logits=return_logits,
            loss_reduction=loss_reduction,
        )
        logits = None if packed.logits is None else unpack(packed.logits[0], real, input_ids.shape)
        return VLOutput(packed.loss, logits, unpack(packed.hidden[0], real, input_ids.shape))

    def _check_features(self, image_features: Tensor) -> None:
        tokens, size = self.config.num_image_tokens, self.config.language.hidden_size
        if image_features.ndim != 3 or image_features.shape[1:] != (tokens, size):
            raise ValueError(
                f"image_features are {tuple(image_features.shape)}; this model needs (num_images, {tokens}, {size})."
            )

    def _check_placeholders(self, is_image: Tensor, num_images: int) -> None:
        if torch.compiler.is_compiling() and not is_image.is_meta:
            matches = is_image.sum() == num_images * self.config.num_image_tokens
            torch._assert_async(matches, "input_ids do not hold as many image placeholders as the images need.")
            return
        if not has_values(is_image):
            return
        needed, found = num_images * self.config.num_image_tokens, int(is_image.sum())
        if found != needed:
            raise ValueError(
                f"input_ids hold {found} image placeholders (id {self.config.image_token_id}), but "
                f"{num_images} images need {needed}, {self.config.num_image_tokens} each."
            )


def unwrapped(caller: str, model: nn.Module) -> DeepSeekVL:
    """The model that torch.compile was given, or that stands for itself.

    Raises:
        ValueError: another module, whose parts are not where `caller` looks for them.
    """
    model = getattr(model, "_orig_mod", model)
    if not isinstance(model, DeepSeekVL):
        raise ValueError(f"{caller}: it takes a DeepSeekVL, and this is a {type(model).__name__}.")
    return model
