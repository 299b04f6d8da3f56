"""Sizes of the flow-matching decoder (`flow_matching_config`): hidden states at 50 Hz to 24 kHz mel."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class FlowConfig:
    """Pre-net, U-Net estimator and sampler of the conditional flow-matching decoder.

    `condition_dropout` and the two loss weights are what the released decoder was trained with, kept for its
    `config.json`; a run here has its own (`config.FlowTrainConfig`). `sigma_min` is the spread that is left at time 1.
    """

    sampling_rate: int = 24000
    hop_length: int = 480
    in_channels: int = 80
    channels: tuple[int, ...] = (256,)
    num_mid_blocks: int = 12
    n_blocks: int = 4
    num_heads: int = 8
    attention_head_dim: int = 64
    prenet_in_dim: int = 1280
    prenet_out_dim: int = 80
    prenet_d_model: int = 512
    prenet_ffn_dim: int = 2048
    prenet_layers: int = 12
    prenet_attention_heads: int = 8
    diffusion_steps: int = 10
    guidance: float = 0.7
    condition_dropout: float = 0.2
    sigma_min: float = 1e-6
    prenet_loss_weight: float = 1.0
    loss_weight: float = 1.0
