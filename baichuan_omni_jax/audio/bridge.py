"""The bridge of the audio tokenizer (`audio_tokenizer.audio_bridge_model.*`): four 50 Hz states -> one at 12.5 Hz."""

import jax
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from baichuan_omni_jax.audio.config import AudioConfig
from baichuan_omni_jax.audio.encoder import CLIPS
from baichuan_omni_jax.nn.linear import Linear
from baichuan_omni_jax.nn.norm import LayerNorm
from baichuan_omni_jax.nn.param import ComputePolicy


class AudioBridge(nnx.Module):
    """LayerNorm(down(silu(gate(x)) * up(x)) + the four states side by side).

    `gate_proj` and `up_proj` are (4, d, 4d); the checkpoint holds them as convolutions (4d, d, 4).
    """

    def __init__(self, key: PRNGKeyArray, cfg: AudioConfig, compute: ComputePolicy):
        keys = jax.random.split(key, 3)
        k, d, f, out = cfg.avg_pooler, cfg.d_model, cfg.code_dim, (CLIPS, None, None)
        axes = ("kernel", "embed", "small")
        self.gate_proj = Linear(keys[0], "mgkd,kdf->mgf", (k, d, f), axes, out=out, compute=compute)
        self.up_proj = Linear(keys[1], "mgkd,kdf->mgf", (k, d, f), axes, out=out, compute=compute)
        self.down_proj = Linear(keys[2], "mgf,fe->mge", (f, f), ("small", "embed"), out=out, compute=compute)
        self.norm = LayerNorm(f, eps=cfg.norm_eps, compute=compute)
        self.pool, self.compute = k, compute

    def __call__(self, x: Float[Array, "m t d"]) -> Float[Array, "m g f"]:
        """(m, t, d) -> (m, t // 4, 4d); a trailing partial group is dropped."""
        with jax.named_scope("audio_bridge"):
            m, t, d = x.shape
            groups = t // self.pool
            spec = self.compute.rules.spec(CLIPS, None, None)
            x = x[:, : groups * self.pool].reshape(m, groups, self.pool, d)
            y = self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))
            return self.norm(y + x.reshape(m, groups, self.pool * d, out_sharding=spec))
