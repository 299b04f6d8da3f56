"""`OmniConfig`: the architecture, branch by branch, and its named variants."""

from collections.abc import Callable
from dataclasses import dataclass, fields

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
        if self.llm.num_heads % self.llm.num_kv_heads:
            raise ConfigError(
                f"llm.num_heads {self.llm.num_heads} is not a multiple of llm.num_kv_heads {self.llm.num_kv_heads}"
            )
        if self.llm.hidden_size % self.audio_head.head_dim:
            raise ConfigError(
                f"llm.hidden_size {self.llm.hidden_size} is not a multiple of audio_head.head_dim "
                f"{self.audio_head.head_dim}"
            )
        for field in fields(self.tokens):
            if getattr(self.tokens, field.name) >= self.llm.vocab_size:
                raise ConfigError(f"tokens.{field.name} lies outside llm.vocab_size {self.llm.vocab_size}")


def baichuan_omni_7b() -> OmniConfig:
    """Returns the released sizes: 7.6 B language model, 0.7 B vision tower, Whisper-large tokenizer."""
    return OmniConfig()


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


MODELS: dict[str, Callable[[], OmniConfig]] = {"tiny": tiny, "baichuan_omni_7b": baichuan_omni_7b}
