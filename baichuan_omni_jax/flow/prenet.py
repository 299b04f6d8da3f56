"""The pre-net (`audio_flow_matching_decoder.prenet.*`): decoder states at 50 Hz -> mu, a first guess of the mel."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int32, PRNGKeyArray

from baichuan_omni_jax.flow.config import FlowConfig
from baichuan_omni_jax.nn.encoder import EncoderLayer, EncoderSizes, run_encoder
from baichuan_omni_jax.nn.lengths import frames_before, keep
from baichuan_omni_jax.nn.linear import Linear
from baichuan_omni_jax.nn.norm import RMSNorm
from baichuan_omni_jax.nn.param import ComputePolicy, split_as, stack

CLIPS = "batch"
NORM_EPS = 1e-6


class PreNet(nnx.Module):
    """Linear -> SiLU -> Linear (`in_mlp.0`, `in_mlp.2`), causal Whisper layers with RMSNorm, RMSNorm, Linear.

    The checkpoint's `positional_embedding` is not used by the released computation, and not kept here.
    """

    def __init__(self, key: PRNGKeyArray, cfg: FlowConfig, compute: ComputePolicy):
        keys = jax.random.split(key, 4)
        d, out = cfg.prenet_d_model, (CLIPS, None, None)

        def linear(key: PRNGKeyArray, shape: tuple[int, int], axes: tuple[str, str], bias: bool = True) -> Linear:
            return Linear(key, "btd,df->btf", shape, axes, out=out, compute=compute, bias=bias)

        self.sizes = EncoderSizes(
            width=d,
            heads=cfg.prenet_attention_heads,
            ffn=cfg.prenet_ffn_dim,
            eps=NORM_EPS,
            rows=(CLIPS, None),
            key_bias=False,
            causal=True,
            norm=RMSNorm,
        )
        self.in_fc1 = linear(keys[0], (cfg.prenet_in_dim, 4 * d), ("embed", "small"))
        self.in_fc2 = linear(keys[1], (4 * d, d), ("small", "embed"))
        self.layers = stack(lambda k: EncoderLayer(k, self.sizes, compute), keys[2], cfg.prenet_layers)
        self.norm = RMSNorm(d, eps=NORM_EPS, compute=compute)
        self.out_proj = linear(keys[3], (d, cfg.prenet_out_dim), ("embed", "small"), bias=False)
        self.cfg, self.compute = cfg, compute

    def __call__(self, hidden: Float[Array, "b t d"], lengths: Int32[Array, " b"]) -> Float[Array, "b t mels"]:
        """mu (b, t, mels), zero past each length; as many frames as `hidden`.

        Raises ValueError on shapes that do not fit.
        """
        if hidden.shape[-1] != self.cfg.prenet_in_dim or lengths.shape != hidden.shape[:1]:
            raise ValueError(
                f"hidden {hidden.shape} and lengths {lengths.shape}: expected (items, frames, "
                f"{self.cfg.prenet_in_dim}) and (items,)"
            )
        hidden, lengths = split_as(hidden, self.compute, CLIPS), split_as(lengths, self.compute, CLIPS)
        with jax.named_scope("flow_prenet"):
            x = self.in_fc2(jax.nn.silu(self.in_fc1(hidden)))
            ids = frames_before(lengths, x.shape[1]).astype(jnp.int32)
            positions = jnp.zeros_like(ids) + jnp.arange(x.shape[1], dtype=jnp.int32)
            x = run_encoder(self.layers, x, ids, positions, sizes=self.sizes, compute=self.compute)
            return keep(self.out_proj(self.norm(x)), lengths)
