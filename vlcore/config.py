"""What a DeepSeek-VL is made of: one frozen dataclass a part, and the presets.

Sizes of the presets are those of the released models (their public config.json and the paper, arXiv 2403.05525,
section 3); everything that follows from them, such as grids and token counts, is a property.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)

# Which part of the model a parameter belongs to, by the beginning of its name; the paper counts the two stride-2
# convolutions as the adaptor's.
PARTS = {
    "vision.sam.": "sam",
    "vision.siglip.": "siglip",
    "vision.downsample.": "adaptor",
    "adaptor.": "adaptor",
    "language.": "language",
    "lm_head.": "language",
}

# What both vision towers have that must be positive.
TOWER_SIZES = (
    "image_size",
    "patch_size",
    "hidden_size",
    "intermediate_size",
    "num_layers",
    "num_heads",
    "layer_norm_eps",
    "std",
)

ADAPTOR_KINDS = ("hybrid", "mlp_gelu", "shared", "separate")


@dataclass(frozen=True, kw_only=True)
class SiglipConfig:
    """The low-resolution tower: a pre-LN vision transformer without a class token."""

    image_size: int = 384
    patch_size: int = 16
    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_layers: int = 24
    num_heads: int = 16
    layer_norm_eps: float = 1e-6
    mean: tuple[float, float, float] = HALF
    std: tuple[float, float, float] = HALF

    def __post_init__(self):
        _check_positive(self, *TOWER_SIZES)
        _check_divides("SiglipConfig", "patch_size", self.patch_size, "image_size", self.image_size)
        _check_divides("SiglipConfig", "num_heads", self.num_heads, "hidden_size", self.hidden_size)

    @property
    def grid(self) -> int:
        """Patches along one side of the image."""
        return self.image_size // self.patch_size

    @property
    def num_tokens(self) -> int:
        return self.grid**2


@dataclass(frozen=True, kw_only=True)
class SamConfig:
    """The high-resolution tower: ViTDet with window attention, decomposed relative positions and a neck."""

    image_size: int = 1024
    patch_size: int = 16
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_layers: int = 12
    num_heads: int = 12
    window_size: int = 14
    global_layers: tuple[int, ...] = (2, 5, 8, 11)
    neck_channels: int = 256
    layer_norm_eps: float = 1e-6
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD

    def __post_init__(self):
        _check_positive(self, *TOWER_SIZES, "window_size", "neck_channels")
        _check_divides("SamConfig", "patch_size", self.patch_size, "image_size", self.image_size)
        _check_divides("SamConfig", "num_heads", self.num_heads, "hidden_size", self.hidden_size)
        if not self.global_layers or any(not 0 <= i < self.num_layers for i in self.global_layers):
            raise ValueError(
                f"SamConfig: global_layers {self.global_layers} must name layers of 0..{self.num_layers - 1}; "
                "the first one feeds the second neck."
            )

    @property
    def grid(self) -> int:
        """Patches along one side of the image."""
        return self.image_size // self.patch_size

    @property
    def output_size(self) -> int:
        """Channels after the two stride-2 convolutions, each of which doubles them."""
        return 4 * self.neck_channels


@dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """The language model. The defaults are DeepSeek-LLM's where the public configs leave them out.

    Attributes:
        other_eos_token_ids: end an answer as eos_token_id does, which is the one that training sets behind it.
    """

    vocab_size: int = 102400
    hidden_size: int = 2048
    intermediate_size: int = 5632
    num_layers: int = 24
    num_heads: int = 16
    num_kv_heads: int = 16
    head_dim: int = 128
    rope_theta: float = 1e4
    rms_norm_eps: float = 1e-6
    max_positions: int = 16384
    tie_embeddings: bool = False
    bos_token_id: int = 100000
    eos_token_id: int = 100001
    pad_token_id: int = 100001
    other_eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self):
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "max_positions", "rope_theta", "rms_norm_eps")
        _check_positive(self, *sizes, "num_layers", "num_heads", "num_kv_heads", "head_dim")
        special = ("bos_token_id", "eos_token_id", "pad_token_id", "other_eos_token_ids")
        _check_in_vocabulary(self, self.vocab_size, *special)
        _check_divides("LlamaConfig", "num_kv_heads", self.num_kv_heads, "num_heads", self.num_heads)
        if self.head_dim % 2:
            raise ValueError(f"LlamaConfig: head_dim {self.head_dim} is odd; rotary positions turn pairs.")


@dataclass(frozen=True, kw_only=True)
class VLConfig:
    """A whole model. `sam` is None where SigLIP sees the image alone, as in the released 1.3B.

    Attributes:
        adaptor: "hybrid" (one up-projection a tower, concatenated high first, GELU, output projection: the paper's),
            "mlp_gelu" (Linear, GELU, Linear on SigLIP's tokens), or the paper's ablations "shared" and "separate"
            (see models/adaptor.py). All but "mlp_gelu" need `sam`.
        pad_color: fills the square around an image that is not square, RGB in 0..255.
    """

    siglip: SiglipConfig = field(default_factory=SiglipConfig)
    sam: SamConfig | None = field(default_factory=SamConfig)
    language: LlamaConfig = field(default_factory=LlamaConfig)
    adaptor: str = "hybrid"
    image_token_id: int = 100015
    pad_color: tuple[int, int, int] = (122, 116, 104)

    def __post_init__(self):
        if self.adaptor not in ADAPTOR_KINDS:
            raise ValueError(f"VLConfig: adaptor {self.adaptor!r} is none of {ADAPTOR_KINDS}.")
        if (self.sam is None) != (self.adaptor == "mlp_gelu"):
            towers = "SigLIP alone" if self.sam is None else "two towers"
            raise ValueError(
                f"VLConfig: adaptor {self.adaptor!r} does not fit {towers}; 'mlp_gelu' is for SigLIP alone."
            )
        if self.sam and self.language.hidden_size % 2:
            raise ValueError(
                f"VLConfig: the language model's hidden_size {self.language.hidden_size} is odd; "
                f"adaptor {self.adaptor!r} gives each tower half of it."
            )
        if len(self.pad_color) != 3 or any(not 0 <= channel <= 255 for channel in self.pad_color):
            raise ValueError(f"VLConfig: pad_color {self.pad_color} is not RGB in 0..255.")
        _check_in_vocabulary(self, self.language.vocab_size, "image_token_id")

    @property
    def image_size(self) -> int:
        """The side of the square that the processor makes; SigLIP's own input is resized from it."""
        return self.sam.image_size if self.sam else self.siglip.image_size

    @property
    def num_image_tokens(self) -> int:
        """Language-model tokens an image: SigLIP's grid, to which SAM's features are brought."""
        return self.siglip.num_tokens


def _check_divides(where: str, part_name: str, part: int, whole_name: str, whole: int) -> None:
    if part <= 0 or whole % part:
        raise ValueError(f"{where}: {part_name} {part} does not divide {whole_name} {whole}.")


def _check_positive(config: Any, *names: str) -> None:
    """Each of these fields, or each number in it, must be positive and finite."""
    for name in names:
        value = getattr(config, name)
        if any(not 0 < number < math.inf for number in (value if isinstance(value, tuple) else (value,))):
            raise ValueError(f"{type(config).__name__}: {name} {value} needs to be positive and finite.")


def _check_in_vocabulary(config: Any, vocab_size: int, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if any(not 0 <= token_id < vocab_size for token_id in (value if isinstance(value, tuple) else (value,))):
            raise ValueError(f"{type(config).__name__}: {name} {value} is not in a vocabulary of {vocab_size}.")


def tiny() -> VLConfig:
    """For tests: a forward takes well under a second, and every path of the hybrid encoder is used."""
    return VLConfig(
        siglip=SiglipConfig(hidden_size=32, intermediate_size=64, num_layers=2, num_heads=4, image_size=64),
        sam=SamConfig(
            image_size=160,
            hidden_size=32,
            intermediate_size=64,
            num_layers=4,
            num_heads=4,
            window_size=4,
            global_layers=(1, 3),
            neck_channels=8,
        ),
        language=LlamaConfig(
            vocab_size=512,
            hidden_size=64,
            intermediate_size=160,
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
            head_dim=16,
            max_positions=512,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=2,
        ),
        image_token_id=3,
    )


def demo() -> VLConfig:
    """A few million parameters, hybrid, small images: what `make demo` trains from scratch on a CPU."""
    return VLConfig(
        siglip=SiglipConfig(
            image_size=48, patch_size=12, hidden_size=96, intermediate_size=384, num_layers=3, num_heads=3
        ),
        sam=SamConfig(
            image_size=96,
            patch_size=12,
            hidden_size=64,
            intermediate_size=256,
            num_layers=3,
            num_heads=2,
            window_size=5,
            global_layers=(1, 2),
            neck_channels=24,
        ),
        language=LlamaConfig(
            vocab_size=4096,
            hidden_size=160,
            intermediate_size=448,
            num_layers=4,
            num_heads=5,
            num_kv_heads=5,
            head_dim=32,
            max_positions=1024,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        ),
        image_token_id=2,
    )


def deepseek_vl_1_3b() -> VLConfig:
    """As released: SigLIP alone at 384."""
    return VLConfig(sam=None, adaptor="mlp_gelu", pad_color=(127, 127, 127))


def deepseek_vl_1_3b_hybrid() -> VLConfig:
    """As the paper describes the 1.3B: the hybrid encoder in front of the small language model."""
    return VLConfig()


def deepseek_vl_7b() -> VLConfig:
    """As released: SAM-B at 1024 and SigLIP-L at 384 in front of DeepSeek-LLM 7B."""
    return VLConfig(
        language=LlamaConfig(hidden_size=4096, intermediate_size=11008, num_layers=30, num_heads=32, num_kv_heads=32)
    )


PRESETS: dict[str, Callable[[], VLConfig]] = {
    preset.__name__: preset for preset in (tiny, demo, deepseek_vl_1_3b, deepseek_vl_1_3b_hybrid, deepseek_vl_7b)
}


def preset(name: str) -> VLConfig:
    """The preset called `name`.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in PRESETS:
        raise ValueError(f"There is no preset {name!r}; there are {', '.join(PRESETS)}.")
    return PRESETS[name]()
