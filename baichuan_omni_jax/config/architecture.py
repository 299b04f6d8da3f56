"""Sizes of each branch of the model; the defaults are the released 7B's (arXiv:2501.15368). `model.py` joins them.

`hf.py` has the keys of the released `config.json` that they are read from.
"""

from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True, kw_only=True)
class PixelLimits:
    """Area limits that smart resizing keeps: `min_pixels <= height * width <= max_pixels`."""

    min_pixels: int = 3136  # 56 x 56: four visual tokens
    max_pixels: int = 3211264  # 4096 visual tokens of 28 x 28 pixels


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """The Qwen2-VL style tower (`visual_model`) and the projector into the language model (`visual_bridge_model`)."""

    depth: int = 32  # layers of the tower
    embed_dim: int = 1280  # the tower's width
    num_heads: int = 16
    mlp_ratio: int = 4  # inner width of its MLPs, in widths of the tower
    patch_size: int = 14  # pixels a side
    temporal_patch_size: int = 2  # frames that the patch embedding reads; a still is repeated
    spatial_merge_size: int = 2  # patches a side that become one visual token
    in_channels: int = 3
    out_dim: int = 3584  # width of a visual token: the language model's
    norm_eps: float = 1e-6
    image_mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)  # of RGB in 0..1: CLIP's
    image_std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
    image_limits: PixelLimits = PixelLimits()  # of stills
    frame_limits: PixelLimits = PixelLimits(max_pixels=602112)  # of video frames: 768 visual tokens
    max_frames: int = 32  # of a video; of more, so many are taken at even distances
    frames_per_second: float = 1.0  # that a video is read at

    @property
    def head_dim(self) -> int:
        """Returns the width of a head."""
        return self.embed_dim // self.num_heads

    @property
    def patch_values(self) -> int:
        """Returns the values of one temporal slice of a patch: channels x 14 x 14 = 588."""
        return self.in_channels * self.patch_size**2

    @property
    def merged_patches(self) -> int:
        """Returns the number of patches that become one visual token."""
        return self.spatial_merge_size**2


@dataclass(frozen=True, kw_only=True)
class AudioConfig:
    """The audio tokenizer (`audio_config`): Whisper encoder, bridge, residual quantizer, and the decoder's layers."""

    sampling_rate: int = 16000  # Hz
    num_mel_bins: int = 128  # of the log mel that the encoder reads
    n_fft: int = 400  # samples of a window
    hop_length: int = 160  # samples between mel frames: 100 frames a second
    max_audio_seconds: int = 30  # of a window; longer audio is several
    split_overlap: float = 0.0  # seconds that windows of longer audio share
    d_model: int = 1280  # width of encoder and decoder
    encoder_layers: int = 32
    encoder_attention_heads: int = 20
    encoder_ffn_dim: int = 5120  # inner width of the encoder's MLPs
    kernel_size: int = 3  # of the encoder's two convolutions
    stride_size: int = 2  # of the second of them: 50 states a second
    avg_pooler: int = 4  # states that the bridge joins to one code frame: 12.5 a second
    decoder_layers: int = 8
    decoder_attention_heads: int = 20
    decoder_ffn_dim: int = 5120
    decoder_kernel_size: int = 3  # of the decoder's two transposed convolutions
    decoder_stride_size: int = 2  # of the second of them; the first undoes `avg_pooler`
    # Codes of each level of the residual quantizer: eight levels, the first the largest.
    codebook_sizes: tuple[int, ...] = (8192, 4096, 2048, 1024, 1024, 1024, 1024, 1024)
    norm_eps: float = 1e-5

    @property
    def head_dim(self) -> int:
        """Returns the width of an encoder's head."""
        return self.d_model // self.encoder_attention_heads

    @property
    def code_dim(self) -> int:
        """Returns the width of the bridge's output and of every codebook."""
        return self.d_model * self.avg_pooler

    @property
    def levels(self) -> int:
        """Returns the number of codes in a code frame: 8."""
        return len(self.codebook_sizes)

    @property
    def code_rate(self) -> float:
        """Returns the code frames a second: 12.5."""
        return self.sampling_rate / (self.hop_length * self.stride_size * self.avg_pooler)

    @property
    def state_rate(self) -> Fraction:
        """Returns the states of the decoder a second, which flow matching reads: 50."""
        return Fraction(self.sampling_rate, self.hop_length * self.stride_size)

    @property
    def max_mel_frames(self) -> int:
        """Returns the mel frames of a whole window: 3000."""
        return self.max_audio_seconds * self.sampling_rate // self.hop_length

    def encoder_length(self, mel_frames: int) -> int:
        """Returns the frames after the strided convolution: 3000 -> 1500."""
        return (mel_frames - 1) // self.stride_size + 1 if mel_frames > 0 else 0

    def bridge_length(self, mel_frames: int) -> int:
        """Returns the code frames of a window with `mel_frames` valid frames, a partial group dropped: 3000 -> 375."""
        return self.encoder_length(mel_frames) // self.avg_pooler


@dataclass(frozen=True, kw_only=True)
class PostNetConfig:
    """The 16 kHz mel that the audio decoder and its post-net produce (`vocoder_config` of the released model)."""

    sampling_rate: int = 16000  # Hz
    n_fft: int = 1024  # samples of a window
    hop_length: int = 256  # samples between frames: 62.5 a second
    num_mel_bins: int = 80
    channels: tuple[int, ...] = (256, 256, 256, 256, 256)  # of the post-net's convolutions


@dataclass(frozen=True, kw_only=True)
class LLMConfig:
    """A Qwen2.5 shaped decoder: grouped-query attention with biased Q, K, V; SwiGLU; RMSNorm; untied head."""

    vocab_size: int = 152064
    hidden_size: int = 3584  # the model's width
    num_layers: int = 28
    num_heads: int = 28  # query heads
    num_kv_heads: int = 4  # key and value heads, each shared by seven query heads
    head_dim: int = 128
    intermediate_size: int = 18944  # inner width of the MLPs
    norm_eps: float = 1e-6
    rope_theta: float = 1e6  # base of the rotary positions
    qkv_pack: bool = True  # whether Q, K and V lie in one matrix of the PyTorch checkpoint
    use_norm_head: bool = False  # whether the output head's rows are scaled to length 1


@dataclass(frozen=True, kw_only=True)
class AudioHeadConfig:
    """The audio embeddings and the depth transformer that predicts the codes of one frame, level by level."""

    num_layers: int = 3
    head_dim: int = 128  # the released code derives the number of heads from it
    norm_eps: float = 1e-6


@dataclass(frozen=True, kw_only=True)
class FlowConfig:
    """The flow-matching decoder (`flow_matching_config`): states at 50 Hz to a 24 kHz mel."""

    sampling_rate: int = 24000  # Hz
    hop_length: int = 480  # samples between mel frames: 50 a second, as many as states
    in_channels: int = 80  # mel bins
    channels: tuple[int, ...] = (256,)  # width of the U-Net's stages
    num_mid_blocks: int = 12
    n_blocks: int = 4  # transformer layers of a stage
    num_heads: int = 8
    attention_head_dim: int = 64
    prenet_in_dim: int = 1280  # width of the audio decoder's states
    prenet_out_dim: int = 80  # mel bins of the condition
    prenet_d_model: int = 512
    prenet_ffn_dim: int = 2048
    prenet_layers: int = 12
    prenet_attention_heads: int = 8
    diffusion_steps: int = 10  # Euler steps of the sampler
    guidance: float = 0.7  # of classifier-free guidance: 1.7 x with - 0.7 x without condition
    temperature: float = 1.0  # scales the noise that sampling starts from; 0: always the same, and the smoothest, mel
    # What the released decoder was trained with, kept for its config.json; a run has its own (`FlowTrainConfig`).
    condition_dropout: float = 0.2
    sigma_min: float = 1e-6  # the spread of the path that is left at time 1
    prenet_loss_weight: float = 1.0  # see `condition_dropout`
    loss_weight: float = 1.0  # see `condition_dropout`
