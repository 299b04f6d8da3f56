"""The post-net (`audio_tokenizer.audio_decoder.post_net`): convolutions that refine the coarse mel."""

from itertools import pairwise

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from baichuan_omni_jax.audio.config import PostNetConfig
from baichuan_omni_jax.nn.conv import Conv1d
from baichuan_omni_jax.nn.norm import GroupNorm
from baichuan_omni_jax.nn.param import ComputePolicy

CLIPS = "batch"
KERNEL = 5
WHOLE = ("small", "small")


class PostNetBlock(nnx.Module):
    """Convolution -> GroupNorm -> Mish (`layers.3i`, `layers.3i+1` of the checkpoint)."""

    def __init__(self, key: PRNGKeyArray, width_in: int, width: int, eps: float, compute: ComputePolicy):
        shape = (KERNEL, width_in, width)
        self.conv = Conv1d(key, shape, padding=KERNEL // 2, rows=CLIPS, compute=compute, channels=WHOLE)
        self.norm = GroupNorm(width, eps=eps, compute=compute)

    def __call__(self, x: Float[Array, "m t c"], real: Bool[Array, "m t"]) -> Float[Array, "m t d"]:
        return jax.nn.mish(self.norm(self.conv(x), real))


class PostNet(nnx.Module):
    """What to add to a coarse mel: blocks of widths `channels[:-1]`, then a 1x1 convolution (the last of `layers`)."""

    def __init__(self, key: PRNGKeyArray, cfg: PostNetConfig, eps: float, compute: ComputePolicy):
        widths = (cfg.num_mel_bins, *cfg.channels[:-1])
        keys = jax.random.split(key, len(widths))
        self.blocks = nnx.List([PostNetBlock(keys[i], *pair, eps, compute) for i, pair in enumerate(pairwise(widths))])
        out = (1, widths[-1], cfg.num_mel_bins)
        self.out = Conv1d(keys[-1], out, rows=CLIPS, compute=compute, channels=WHOLE)

    def __call__(self, mel: Float[Array, "m t mels"], real: Bool[Array, "m t"]) -> Float[Array, "m t mels"]:
        """`real` frames are those that statistics count and convolutions see; the result is not masked."""
        with jax.named_scope("post_net"):
            x = mel
            for block in self.blocks:
                x = block(jnp.where(real[..., None], x, 0), real)
            return self.out(x)
