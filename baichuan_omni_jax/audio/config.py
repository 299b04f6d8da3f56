"""Sizes of the audio tokenizer: Whisper encoder, bridge, residual quantizer, and the decoder back to mel."""

from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True, kw_only=True)
class AudioConfig:
    """`audio_config` of the released model. Rates in Hz; mel frames come every `hop_length` samples."""

    sampling_rate: int = 16000
    num_mel_bins: int = 128
    n_fft: int = 400
    hop_length: int = 160
    max_audio_seconds: int = 30
    split_overlap: float = 0.0
    d_model: int = 1280
    encoder_layers: int = 32
    encoder_attention_heads: int = 20
    encoder_ffn_dim: int = 5120
    kernel_size: int = 3
    stride_size: int = 2
    avg_pooler: int = 4
    decoder_layers: int = 8
    decoder_attention_heads: int = 20
    decoder_ffn_dim: int = 5120
    decoder_kernel_size: int = 3
    decoder_stride_size: int = 2
    codebook_sizes: tuple[int, ...] = (8192, 4096, 2048, 1024, 1024, 1024, 1024, 1024)
    norm_eps: float = 1e-5

    @property
    def head_dim(self) -> int:
        return self.d_model // self.encoder_attention_heads

    @property
    def code_dim(self) -> int:
        """Width of the bridge's output and of every codebook."""
        return self.d_model * self.avg_pooler

    @property
    def levels(self) -> int:
        return len(self.codebook_sizes)

    @property
    def code_rate(self) -> float:
        """Code frames a second: 12.5."""
        return self.sampling_rate / (self.hop_length * self.stride_size * self.avg_pooler)

    @property
    def state_rate(self) -> Fraction:
        """States of the decoder a second, which flow matching reads: 50."""
        return Fraction(self.sampling_rate, self.hop_length * self.stride_size)

    @property
    def max_mel_frames(self) -> int:
        return self.max_audio_seconds * self.sampling_rate // self.hop_length

    def encoder_length(self, mel_frames: int) -> int:
        """Frames after the strided convolution: 3000 -> 1500."""
        return (mel_frames - 1) // self.stride_size + 1 if mel_frames > 0 else 0

    def bridge_length(self, mel_frames: int) -> int:
        """Code frames (12.5 Hz) of a window with `mel_frames` valid frames, a partial group dropped: 3000 -> 375."""
        return self.encoder_length(mel_frames) // self.avg_pooler


@dataclass(frozen=True, kw_only=True)
class PostNetConfig:
    """`vocoder_config` of the released model: the 16 kHz mel that the audio decoder and its post-net produce."""

    sampling_rate: int = 16000
    n_fft: int = 1024
    hop_length: int = 256
    num_mel_bins: int = 80
    channels: tuple[int, ...] = (256, 256, 256, 256, 256)
