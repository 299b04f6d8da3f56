"""The branch `flow` (`audio_tokenizer.audio_flow_matching_decoder.*`): pre-net and velocity estimator.

    hidden (50 Hz) --PreNet--> mu, a first guess of the mel;  (noisy mel, mu, time) --Estimator--> velocity

The estimator (`conditional_decoder.*`) is a 1-D U-Net of one resolution. Everything in it is causal in chunks of 100
frames (2 s): convolutions read the past only, a query attends to the keys of its own chunk and earlier ones.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int32, PRNGKeyArray

from baichuan_omni_jax.config.architecture import FlowConfig
from baichuan_omni_jax.errors import ConfigError
from baichuan_omni_jax.nn.encoder import EncoderLayer, EncoderSizes, run_encoder
from baichuan_omni_jax.nn.layers import Conv1d, LayerNorm, RMSNorm, length_mask, mask_padding
from baichuan_omni_jax.nn.linear import Linear
from baichuan_omni_jax.nn.param import CLIPS, ComputePolicy, split_as, stack

# The two halves were trained with different ones.
PRENET_EPS = 1e-6


class PreNet(nnx.Module):
    """Guesses the mel from decoder states (`prenet.*`).

    Linear -> SiLU -> Linear (`in_mlp.0`, `in_mlp.2`), causal Whisper layers with RMSNorm, RMSNorm, Linear.

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
            eps=PRENET_EPS,
            rows=(CLIPS, None),
            key_bias=False,
            causal=True,
            norm=RMSNorm,
        )
        self.in_fc1 = linear(keys[0], (cfg.prenet_in_dim, 4 * d), ("embed", "small"))
        self.in_fc2 = linear(keys[1], (4 * d, d), ("small", "embed"))
        self.layers = stack(lambda k: EncoderLayer(k, self.sizes, compute), keys[2], cfg.prenet_layers)
        self.norm = RMSNorm(d, eps=PRENET_EPS, compute=compute)
        self.out_proj = linear(keys[3], (d, cfg.prenet_out_dim), ("embed", "small"), bias=False)
        self.cfg, self.compute = cfg, compute

    def __call__(self, hidden: Float[Array, "b t d"], lengths: Int32[Array, " b"]) -> Float[Array, "b t mels"]:
        """Returns mu (b, t, mels), zero past each length; as many frames as `hidden`.

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
            # A clip is one segment; causal by its frames' positions. There is no other positional signal.
            ids = length_mask(lengths, x.shape[1]).astype(jnp.int32)
            positions = jnp.zeros_like(ids) + jnp.arange(x.shape[1], dtype=jnp.int32)
            x = run_encoder(self.layers, x, ids, positions, sizes=self.sizes, compute=self.compute)
            return mask_padding(self.out_proj(self.norm(x)), lengths)


# Frames (2 s) that the estimator's attention sees ahead at most: what lets speech be streamed.
ATTENTION_CHUNK = 100
KERNEL = 3
NORM_EPS = 1e-5
TIME_SCALE = 1000.0


def time_features(time: Float[Array, " b"], width: int) -> Float[Array, "b width"]:
    """Returns [sin, cos] of 1000 t * 10000^(-i / (width/2 - 1)), fp32. width 4: frequencies 1 and 0.0001."""
    half = width // 2
    # fp32: angles reach 1000 radians, where bf16 steps by 4.
    frequency = 10000.0 ** (-jnp.arange(half, dtype=jnp.float32) / (half - 1))
    angles = TIME_SCALE * time.astype(jnp.float32)[:, None] * frequency
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)


def chunk_positions(frames: int) -> Int32[Array, " t"]:
    """Returns a frame's position for attention, its chunk: causal by chunks then means "own chunk or earlier".

    With chunks of 2, frames 0..4 have positions 0 0 1 1 2: frame 2 sees frames 0 to 3.
    """
    return jnp.arange(frames, dtype=jnp.int32) // ATTENTION_CHUNK


class CausalBlock(nnx.Module):
    """Computes causal convolution -> LayerNorm -> Mish (`block.0`, `.2`); zero past the length, in and out."""

    def __init__(self, key: PRNGKeyArray, width_in: int, width: int, compute: ComputePolicy):
        self.conv = _causal_conv(key, width_in, width, compute)
        self.norm = LayerNorm(width, eps=NORM_EPS, compute=compute)

    def __call__(self, x: Float[Array, "b t c"], lengths: Int32[Array, " b"]) -> Float[Array, "b t d"]:
        # Masked behind the norm as well: biases would turn padding into a signal for what comes next.
        return mask_padding(jax.nn.mish(self.norm(self.conv(mask_padding(x, lengths)))), lengths)


class ResnetBlock(nnx.Module):
    """Computes two causal blocks with the time added between them (`mlp.1`), plus a 1x1 shortcut (`res_conv`)."""

    def __init__(self, key: PRNGKeyArray, width_in: int, width: int, compute: ComputePolicy):
        keys = jax.random.split(key, 4)
        self.block1 = CausalBlock(keys[0], width_in, width, compute)
        self.block2 = CausalBlock(keys[1], width, width, compute)
        self.time_proj = _time_linear(keys[2], (4 * width, width), compute)
        self.shortcut = Conv1d(keys[3], (1, width_in, width), rows=CLIPS, compute=compute)

    def __call__(
        self, x: Float[Array, "b t c"], time: Float[Array, "b e"], lengths: Int32[Array, " b"]
    ) -> Float[Array, "b t d"]:
        # The time is the same for every frame of an item; the shortcut is linear, and masked as the blocks are.
        y = self.block1(x, lengths) + self.time_proj(jax.nn.mish(time))[:, None]
        return self.block2(y, lengths) + self.shortcut(mask_padding(x, lengths))


class Stage(nnx.Module):
    """Computes a ResNet block and `n_blocks` transformer layers: `{down,mid,up}_blocks.i.0` and `.1.j`, j stacked."""

    def __init__(self, key: PRNGKeyArray, width_in: int, sizes: EncoderSizes, n_blocks: int, compute: ComputePolicy):
        keys = jax.random.split(key)
        self.resnet = ResnetBlock(keys[0], width_in, sizes.width, compute)
        self.layers = stack(lambda k: EncoderLayer(k, sizes, compute), keys[1], n_blocks)
        self.sizes, self.compute = sizes, compute

    def __call__(
        self, x: Float[Array, "b t c"], time: Float[Array, "b e"], lengths: Int32[Array, " b"]
    ) -> Float[Array, "b t d"]:
        with jax.named_scope("resnet"):
            x = self.resnet(x, time, lengths)
        # One segment an item, and positions by chunk: every layer of the stage shares one attention plan.
        ids = length_mask(lengths, x.shape[1]).astype(jnp.int32)
        positions = jnp.zeros_like(ids) + chunk_positions(x.shape[1])
        return run_encoder(self.layers, x, ids, positions, sizes=self.sizes, compute=self.compute)


class Estimator(nnx.Module):
    """Estimates the velocity of a noisy mel, by a U-Net of one resolution.

    Down stage -> causal convolution -> mid stages -> up stage on [current, skip] -> causal convolution -> out. The skip
    is the down stage's output before its convolution. Raises ConfigError on more than one resolution.
    """

    def __init__(self, key: PRNGKeyArray, cfg: FlowConfig, compute: ComputePolicy):
        if len(cfg.channels) != 1:
            raise ConfigError(f"flow.channels {cfg.channels}: only one resolution is supported")
        keys = jax.random.split(key, 9)
        width, width_in = cfg.channels[0], 2 * cfg.in_channels
        # As released: biases on the output projection alone, and heads whose width is configured.
        sizes = EncoderSizes(
            width=width,
            heads=cfg.num_heads,
            ffn=4 * width,
            eps=NORM_EPS,
            rows=(CLIPS, None),
            key_bias=False,
            query_value_bias=False,
            causal=True,
            head_width=cfg.attention_head_dim,
        )
        self.time_fc1 = _time_linear(keys[0], (width_in, 4 * width), compute)
        self.time_fc2 = _time_linear(keys[1], (4 * width, 4 * width), compute)
        self.down = Stage(keys[2], width_in, sizes, cfg.n_blocks, compute)
        self.down_conv = _causal_conv(keys[3], width, width, compute)
        self.mid = stack(lambda k: Stage(k, width, sizes, cfg.n_blocks, compute), keys[4], cfg.num_mid_blocks)
        self.up = Stage(keys[5], 2 * width, sizes, cfg.n_blocks, compute)
        self.up_conv = _causal_conv(keys[6], width, width, compute)
        self.final_block = CausalBlock(keys[7], width, width, compute)
        self.final_proj = Conv1d(
            keys[8], (1, width, cfg.in_channels), rows=CLIPS, compute=compute, channels=("embed", "small")
        )
        self.cfg, self.compute = cfg, compute

    def __call__(
        self,
        x: Float[Array, "b t mels"],
        mu: Float[Array, "b t mels"],
        time: Float[Array, " b"],
        lengths: Int32[Array, " b"],
    ) -> Float[Array, "b t mels"]:
        """Estimates the velocity.

        Args:
            x: noisy mel (b, t, mels).
            mu: the pre-net's mel, its condition (b, t, mels); zero: no condition.
            time: of each item (b,), in [0, 1].
            lengths: valid frames (b,).

        Returns:
            (b, t, mels), zero past each length.

        Raises:
            ValueError: shapes that do not fit.
        """
        self._check(x, mu, time, lengths)
        x, mu, time, lengths = (split_as(a, self.compute, CLIPS) for a in (x, mu, time, lengths))
        with jax.named_scope("estimator"):
            # Noisy mel and condition side by side; the time's features are as wide as both, as released.
            x = jnp.concatenate([x, mu], -1).astype(self.compute.dtype)
            time = self.time_fc2(jax.nn.silu(self.time_fc1(time_features(time, x.shape[-1]))))
            with jax.named_scope("down"):
                # Parity quirk: the skip is taken before the convolution that ends the stage.
                skip = self.down(x, time, lengths)
                x = self.down_conv(mask_padding(skip, lengths))
            with jax.named_scope("mid"):
                # Twelve equal stages, their weights stacked: one is compiled, and gathered at a time.
                x, _ = jax.lax.scan(lambda x, stage: (stage(x, time, lengths), None), x, self.mid)
            with jax.named_scope("up"):
                # With one resolution the skip needs no resizing; it stands behind the stream, as released.
                x = self.up(jnp.concatenate([x, skip], -1), time, lengths)
                x = self.up_conv(mask_padding(x, lengths))
            return mask_padding(self.final_proj(self.final_block(x, lengths)), lengths)

    def _check(self, x: Array, mu: Array, time: Array, lengths: Array) -> None:
        if x.shape != mu.shape or x.shape[-1] != self.cfg.in_channels:
            raise ValueError(
                f"x {x.shape} and mu {mu.shape}: expected the same (items, frames, {self.cfg.in_channels})"
            )
        if time.shape != x.shape[:1] or lengths.shape != x.shape[:1]:
            raise ValueError(f"time {time.shape} and lengths {lengths.shape} do not fit {x.shape[0]} items")


def _causal_conv(key: PRNGKeyArray, width_in: int, width: int, compute: ComputePolicy) -> Conv1d:
    """Returns a convolution that reads the frame itself and the two before it."""
    return Conv1d(key, (KERNEL, width_in, width), causal=True, rows=CLIPS, compute=compute)


def _time_linear(key: PRNGKeyArray, shape: tuple[int, int], compute: ComputePolicy) -> Linear:
    """Returns a linear map of one vector an item."""
    return Linear(key, "bd,df->bf", shape, ("small", "embed"), out=(CLIPS, None), compute=compute, bias=True)


class FlowDecoder(nnx.Module):
    """Holds the branch `flow`: pre-net and estimator, which `flow_losses` trains and `sample_mel` samples with.

    `prenet(hidden, lengths)` gives mu, `estimator(x, mu, time, lengths)` the velocity.

    Raises ConfigError where the pre-net's output is not as wide as the mel.
    """

    def __init__(self, key: PRNGKeyArray, cfg: FlowConfig, compute: ComputePolicy):
        if cfg.prenet_out_dim != cfg.in_channels:
            raise ConfigError(
                f"flow.prenet_out_dim {cfg.prenet_out_dim} must equal flow.in_channels {cfg.in_channels}: "
                "the estimator reads the noisy mel and the pre-net's side by side"
            )
        keys = jax.random.split(key)
        self.prenet = PreNet(keys[0], cfg, compute)
        self.estimator = Estimator(keys[1], cfg, compute)
        self.cfg, self.compute = cfg, compute
