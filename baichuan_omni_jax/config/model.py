"""`OmniConfig`: the architecture, branch by branch, and its named variants."""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace

from baichuan_omni_jax.config.architecture import (
    AudioConfig,
    AudioHeadConfig,
    FlowConfig,
    LLMConfig,
    PixelLimits,
    PostNetConfig,
    VisionConfig,
)
from baichuan_omni_jax.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class SpecialTokens:
    """Token ids that the model gives a meaning to (defaults: the released vocabulary)."""

    end_of_text: int = 151643  # ends a document, or an answer
    audio_start: int = 151676  # stand around audio in a prompt
    audio_end: int = 151677
    audio_pad: int = 151678  # the place of one code frame, of the prompt or generated
    image_start: int = 151679  # stand around an image, or a video frame
    image_end: int = 151680
    image_pad: int = 151681  # the place of one visual token of an image
    video_place: int = 151694  # the place of one visual token of a video frame
    video_start: int = 151695  # stand around the frames of a video; the released processor drops them
    video_end: int = 151696
    audiogen_start: int = 151700  # stand around audio that is generated
    audiogen_end: int = 151701


@dataclass(frozen=True, kw_only=True)
class OmniConfig:
    """The whole model but its vocoder. The defaults are the released 7B sizes."""

    vision: VisionConfig = VisionConfig()  # tower and projector
    audio: AudioConfig = AudioConfig()  # the audio tokenizer: encoder, bridge, quantizer, and the decoder's layers
    post_net: PostNetConfig = PostNetConfig()  # the audio decoder's 16 kHz mel
    llm: LLMConfig = LLMConfig()  # the language model
    audio_head: AudioHeadConfig = AudioHeadConfig()  # what predicts code frames from the language model's states
    flow: FlowConfig = FlowConfig()  # the flow-matching decoder's 24 kHz mel
    tokens: SpecialTokens = SpecialTokens()

    def __post_init__(self):
        if self.vision.out_dim != self.llm.hidden_size:
            raise ConfigError(
                f"vision.out_dim {self.vision.out_dim} must equal llm.hidden_size {self.llm.hidden_size}: "
                "the projector writes into the language model's stream"
            )
        # What is shared out among heads, in equal parts.
        for section, width, heads in (
            ("llm", "num_heads", "num_kv_heads"),
            ("vision", "embed_dim", "num_heads"),
            ("audio", "d_model", "encoder_attention_heads"),
            ("audio", "d_model", "decoder_attention_heads"),
        ):
            part = getattr(self, section)
            if (size := getattr(part, width)) % (parts := getattr(part, heads)):
                raise ConfigError(f"{section}.{width} {size} is not a multiple of {section}.{heads} {parts}")
        if self.llm.hidden_size % self.audio_head.head_dim:
            raise ConfigError(
                f"llm.hidden_size {self.llm.hidden_size} is not a multiple of audio_head.head_dim "
                f"{self.audio_head.head_dim}"
            )
        for field, multiple in (("llm.head_dim", 2), ("vision.head_dim", 4)):
            section, name = field.split(".")
            if (size := getattr(getattr(self, section), name)) % multiple:
                raise ConfigError(f"{field} {size} is not a multiple of {multiple}, as rotary positions need it")
        for name in ("image_mean", "image_std"):
            if (count := len(getattr(self.vision, name))) != self.vision.in_channels:
                raise ConfigError(f"vision.{name} has {count} values, the images {self.vision.in_channels} channels")
        if not all(0 < spread < math.inf for spread in self.vision.image_std):
            raise ConfigError(
                f"vision.image_std {list(self.vision.image_std)} must be above 0: pixels are divided by it"
            )
        for field in fields(self.tokens):
            if getattr(self.tokens, field.name) >= self.llm.vocab_size:
                raise ConfigError(f"tokens.{field.name} lies outside llm.vocab_size {self.llm.vocab_size}")


def baichuan_omni_7b() -> OmniConfig:
    """Returns the released sizes: 7.6 B language model, 0.7 B vision tower, Whisper-large tokenizer."""
    return OmniConfig()


# Encoders of Whisper by its names: (mel bins, width, layers, heads of 64). The tokenizer's bridge, codebooks and
# decoder and the flow decoder's pre-net follow the width.
_WHISPER: dict[str, tuple[int, int, int, int]] = {
    "small": (80, 768, 12, 12),  # 0.09 B parameters
    "medium": (80, 1024, 24, 16),  # 0.31 B
    "large-v3": (128, 1280, 32, 20),  # 0.64 B, the released tokenizer's
}


def _from_parts(llm: LLMConfig, whisper: str) -> OmniConfig:
    """Joins a language model, Qwen2-VL's vision tower (the same in all its sizes) and a Whisper encoder.

    The encoder is the largest that has at most a fifth of the language model's parameters: every prompt with audio runs
    it, while training reads codes that were made once. All widths of Qwen2.5 divide into the audio head's heads of 128.
    """
    mels, width, layers, heads = _WHISPER[whisper]
    return OmniConfig(
        vision=VisionConfig(out_dim=llm.hidden_size),
        audio=AudioConfig(
            num_mel_bins=mels,
            d_model=width,
            encoder_layers=layers,
            encoder_attention_heads=heads,
            encoder_ffn_dim=4 * width,
            decoder_attention_heads=heads,
            decoder_ffn_dim=4 * width,
        ),
        llm=llm,
        flow=FlowConfig(prenet_in_dim=width),
    )


def omni_0b5() -> OmniConfig:
    """Returns the sizes of Qwen2.5-0.5B (0.63 B with its head untied), Qwen2-VL's tower and Whisper small."""
    llm = LLMConfig(
        vocab_size=151936,
        hidden_size=896,
        num_layers=24,
        num_heads=14,
        num_kv_heads=2,
        head_dim=64,
        intermediate_size=4864,
    )
    return _from_parts(llm, "small")


def omni_1b5() -> OmniConfig:
    """Returns the sizes of Qwen2.5-1.5B (1.78 B with its head untied), Qwen2-VL's tower and Whisper medium."""
    llm = LLMConfig(vocab_size=151936, hidden_size=1536, num_heads=12, num_kv_heads=2, intermediate_size=8960)
    return _from_parts(llm, "medium")


def omni_3b() -> OmniConfig:
    """Returns the sizes of Qwen2.5-3B (3.40 B with its head untied), Qwen2-VL's tower and Whisper large-v3."""
    llm = LLMConfig(
        vocab_size=151936, hidden_size=2048, num_layers=36, num_heads=16, num_kv_heads=2, intermediate_size=11008
    )
    return _from_parts(llm, "large-v3")


def omni_14b() -> OmniConfig:
    """Returns the sizes of Qwen2.5-14B (14.8 B), Qwen2-VL's tower and Whisper large-v3.

    Norms are those of Qwen2.5-14B-Instruct; the base model has an epsilon of 1e-5, as its converted config.json says.
    """
    llm = LLMConfig(hidden_size=5120, num_layers=48, num_heads=40, num_kv_heads=8, intermediate_size=13824)
    return _from_parts(llm, "large-v3")


# Special tokens come first in the vocabulary that the project trains on its own text
# (data_pipelines/tokenizers/special_tokens.json), so their ids do not depend on that text.
TRAINED_TOKENS = SpecialTokens(
    end_of_text=0,
    audio_start=33,
    audio_end=34,
    audio_pad=35,
    image_start=36,
    image_end=37,
    image_pad=38,
    video_place=51,
    video_start=52,
    video_end=53,
    audiogen_start=57,
    audiogen_end=58,
)


def tiny() -> OmniConfig:
    """Returns every part of the architecture at a size that a laptop trains in minutes (about 4 M parameters)."""
    return OmniConfig(
        vision=VisionConfig(
            depth=2,
            embed_dim=64,
            num_heads=2,
            out_dim=128,
            image_limits=PixelLimits(min_pixels=3136, max_pixels=12544),
            frame_limits=PixelLimits(min_pixels=3136, max_pixels=6272),
            max_frames=8,
        ),
        audio=AudioConfig(
            num_mel_bins=32,
            d_model=64,
            encoder_layers=2,
            encoder_attention_heads=4,
            encoder_ffn_dim=128,
            decoder_layers=2,
            decoder_attention_heads=4,
            decoder_ffn_dim=128,
            codebook_sizes=(64, 48, 32, 16, 16, 16, 16, 16),
        ),
        post_net=PostNetConfig(num_mel_bins=20, channels=(24, 24, 24, 24, 24)),
        llm=LLMConfig(
            vocab_size=1024,
            hidden_size=128,
            num_layers=3,
            num_heads=4,
            num_kv_heads=2,
            head_dim=32,
            intermediate_size=320,
        ),
        audio_head=AudioHeadConfig(num_layers=2),
        flow=FlowConfig(
            in_channels=20,
            channels=(128,),
            num_mid_blocks=1,
            n_blocks=1,
            num_heads=4,
            attention_head_dim=32,
            prenet_in_dim=64,
            prenet_out_dim=20,
            prenet_d_model=32,
            prenet_ffn_dim=64,
            prenet_layers=2,
            prenet_attention_heads=4,
        ),
        tokens=TRAINED_TOKENS,
    )


def small() -> OmniConfig:
    """Returns every part at a size that learns to see, hear and speak on two CPU cores (about 5 M parameters).

    Four levels of codes, not eight: each further level is one more step of the audio head for every frame.
    """
    return replace(
        tiny(),
        vision=VisionConfig(
            depth=3,
            embed_dim=96,
            num_heads=3,
            out_dim=128,
            image_limits=PixelLimits(min_pixels=3136, max_pixels=12544),
            frame_limits=PixelLimits(min_pixels=3136, max_pixels=7056),
            max_frames=8,
        ),
        audio=AudioConfig(
            num_mel_bins=40,
            d_model=96,
            encoder_layers=3,
            encoder_attention_heads=4,
            encoder_ffn_dim=256,
            decoder_layers=3,
            decoder_attention_heads=4,
            decoder_ffn_dim=256,
            codebook_sizes=(256, 128, 64, 32),
        ),
        llm=LLMConfig(
            vocab_size=1024,
            hidden_size=128,
            num_layers=4,
            num_heads=4,
            num_kv_heads=2,
            head_dim=32,
            intermediate_size=384,
        ),
        # A pre-net as wide as the states that it reads; no noise, which so small an estimator adds to what is heard.
        flow=replace(
            tiny().flow,
            prenet_in_dim=96,
            prenet_d_model=96,
            prenet_ffn_dim=256,
            channels=(64,),
            num_heads=2,
            temperature=0.0,
        ),
    )


# By their names in `RunConfig.model`, from the smallest to the largest.
MODELS: dict[str, Callable[[], OmniConfig]] = {
    function.__name__: function for function in (tiny, small, omni_0b5, omni_1b5, omni_3b, baichuan_omni_7b, omni_14b)
}
