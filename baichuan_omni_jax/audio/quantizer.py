"""The residual vector quantizer (`audio_bridge_model.vq_list.*`): eight codebooks, each for what the last left over."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int32, PRNGKeyArray

from baichuan_omni_jax.audio.config import AudioConfig
from baichuan_omni_jax.audio.encoder import CLIPS
from baichuan_omni_jax.kernels.rvq_lookup import Prepared, prepare_codebooks, rvq_lookup
from baichuan_omni_jax.nn.param import Buffer, ComputePolicy, split_as, use

# Spread of the first random codebook, and of each next one relative to it. Codes as long as the vectors themselves
# would be chosen for being short, so these are shorter: half and more of each codebook is used on speech.
SPREAD, DECAY = 0.5, 0.9

Codebooks = tuple[Float[Array, "_ d"] | Prepared, ...]


class Codebook(nnx.Module):
    """`embed` (codes, d) and the running sums it is made of: `embed_avg` (codes, d), `cluster_size` (codes,)."""

    def __init__(self, key: PRNGKeyArray, size: int, width: int, std: float):
        embed = std * jax.random.normal(key, (size, width), jnp.float32)
        self.embed = Buffer(embed, axes=("codes", "embed"))
        self.embed_avg = Buffer(embed, axes=("codes", "embed"))
        self.cluster_size = Buffer(jnp.ones((size,), jnp.float32), axes=("codes",))


class ResidualQuantizer(nnx.Module):
    """`codebook_sizes` levels over vectors of `code_dim`. Untrained codebooks are normal, narrower level by level."""

    def __init__(self, key: PRNGKeyArray, cfg: AudioConfig, compute: ComputePolicy):
        keys = jax.random.split(key, cfg.levels)
        self.levels = nnx.List(
            [Codebook(keys[q], size, cfg.code_dim, SPREAD * DECAY**q) for q, size in enumerate(cfg.codebook_sizes)]
        )
        self.compute = compute

    def codebooks(self) -> tuple[Float[Array, "_ d"], ...]:
        """The codes of every level, fp32, whole on every device."""
        return tuple(use(level.embed, self.compute, jnp.float32) for level in self.levels)

    def prepared(self) -> Codebooks:
        """The codebooks for many calls of `quantize`: what their lookup needs of them is computed once."""
        return prepare_codebooks(self.codebooks())

    def quantize(
        self, x: Float[Array, "m g d"], codebooks: Codebooks | None = None
    ) -> tuple[Int32[Array, "m g q"], Float[Array, "m g d"], Float[Array, "m g q"]]:
        """Codes, the sum of the chosen codes, and the norm of what is left after each level. No gradient passes.

        `codebooks` are this quantizer's `prepared()` ones, where they were made before.
        """
        with jax.named_scope("quantize"):
            x = split_as(x, self.compute, CLIPS)
            m, g, d = x.shape
            results = rvq_lookup(_reshape(x, (m * g, d)), codebooks or self.codebooks())
            return tuple(_reshape(result, (m, g, result.shape[-1])) for result in results)

    def decode(self, codes: Int32[Array, "m g q"]) -> Float[Array, "m g d"]:
        """Sum of the chosen codes, fp32."""
        codes = split_as(codes, self.compute, CLIPS)
        spec = self.compute.rules.spec(CLIPS, None, None)
        with jax.named_scope("dequantize"):
            return sum(table.at[codes[..., q]].get(out_sharding=spec) for q, table in enumerate(self.codebooks()))


def _reshape(x: Array, shape: tuple[int, ...]) -> Array:
    """Joins or cuts the leading axis (clips, frames), which stays split as it was."""
    spec = jax.typeof(x).sharding.spec
    return x.reshape(shape, out_sharding=PartitionSpec(spec[0], *[None] * (len(shape) - 1)))
