"""Branches at sizes that compile in seconds, with random weights, for properties that hold of any weights.

No mesh is set: what a user gets who calls a branch in a program of their own.
"""

import jax
import jax.numpy as jnp
import numpy as np

from baichuan_omni_jax.config.architecture import AudioConfig, FlowConfig, PostNetConfig, VisionConfig
from baichuan_omni_jax.config.vocoder import VocoderConfig
from baichuan_omni_jax.nn.param import ComputePolicy, named_variables, with_values

COMPUTE, KEY = ComputePolicy(attention_block=16, remat="none"), jax.random.key(0)

VISION = VisionConfig(depth=2, embed_dim=16, num_heads=2, patch_size=4, out_dim=12)
AUDIO = AudioConfig(
    num_mel_bins=8,
    max_audio_seconds=2,
    d_model=16,
    encoder_layers=2,
    encoder_attention_heads=2,
    encoder_ffn_dim=32,
    decoder_layers=2,
    decoder_attention_heads=2,
    decoder_ffn_dim=32,
    codebook_sizes=(16, 8),
)
POST_NET = PostNetConfig(num_mel_bins=6, channels=(8, 8, 8))
FLOW = FlowConfig(
    in_channels=6,
    channels=(8,),
    num_mid_blocks=1,
    n_blocks=1,
    num_heads=2,
    attention_head_dim=4,
    prenet_in_dim=16,
    prenet_out_dim=6,
    prenet_d_model=8,
    prenet_ffn_dim=16,
    prenet_layers=1,
    prenet_attention_heads=2,
    diffusion_steps=2,
)
VOCODER = VocoderConfig(
    in_channels=20,
    base_channels=16,
    upsample_rates=(3, 2),
    upsample_kernel_sizes=(7, 4),
    resblock_kernel_sizes=(3,),
    resblock_dilation_sizes=((1, 3),),
    source_resblock_kernel_sizes=(3, 5),
    source_resblock_dilation_sizes=((1,), (3,)),
    f0_cond_channels=8,
)


def normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.normal(size=shape).astype(np.float32)


def untrained(make, seed: int = 0):
    """The module that `make` constructs, its weights drawn by numpy: nothing is compiled for them."""
    abstract, rng = jax.eval_shape(make), np.random.default_rng(seed)
    ones = ("scale", "alpha", "weight_g")
    return with_values(
        abstract,
        {
            name: jnp.ones(v.shape) if name.endswith(ones) else jnp.asarray(0.2 * normal(rng, *v.shape))
            for name, v in named_variables(abstract).items()
        },
    )


def assert_close(ours, theirs, tolerance: float = 1e-5) -> None:
    """Within `tolerance` of the largest value of `theirs`."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    np.testing.assert_allclose(ours, theirs, atol=tolerance * np.abs(theirs).max(), rtol=0)
