"""Sizes of the language model and of the audio head on top of it."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class LLMConfig:
    """A Qwen2.5 shaped decoder: GQA with biased Q, K, V; SwiGLU; RMSNorm; untied head."""

    vocab_size: int = 152064
    hidden_size: int = 3584
    num_layers: int = 28
    num_heads: int = 28
    num_kv_heads: int = 4
    head_dim: int = 128
    intermediate_size: int = 18944
    norm_eps: float = 1e-6
    rope_theta: float = 1e6
    qkv_pack: bool = True
    use_norm_head: bool = False


@dataclass(frozen=True, kw_only=True)
class AudioHeadConfig:
    """The audio embeddings and the depth transformer that predicts the codes of one frame, level by level."""

    num_layers: int = 3
    head_dim: int = 128
    norm_eps: float = 1e-6
