"""Conditional flow matching, optimal-transport form (MODEL.md section 8): the loss of pre-net and estimator.

From noise to mel: Euler steps along the estimator's velocity, with classifier-free guidance.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32, PRNGKeyArray

from baichuan_omni_jax.flow.model import FlowDecoder
from baichuan_omni_jax.nn.conv import frames_before, keep
from baichuan_omni_jax.nn.param import CLIPS, ComputePolicy, split_as


def flow_losses(
    key: PRNGKeyArray,
    decoder: FlowDecoder,
    hidden: Float[Array, "b t d"],
    mel: Float[Array, "b t mels"],
    lengths: Int32[Array, " b"],
    *,
    condition_dropout: float | Float[Array, ""],
) -> tuple[Float32[Array, ""], Float32[Array, ""]]:
    """The flow-matching loss and the pre-net's L1 prior loss, means over valid frames and mels.

    `hidden` (50 Hz) and `mel` (24 kHz, hop 480) have a frame each, the first `lengths` valid. A clip's time is
    t = 1 - cos(pi/2 u), u even in [0, 1); its state x_t = (1 - (1 - s) t) noise + t mel; the estimator's target
    mel - (1 - s) noise, s the decoder's `sigma_min`. A share `condition_dropout` of the clips sees no condition, for
    guidance.
    """
    compute, sigma = decoder.compute, decoder.cfg.sigma_min
    mel, lengths = split_as(mel.astype(jnp.float32), compute, CLIPS), split_as(lengths, compute, CLIPS)
    mu = decoder.prenet(hidden, lengths)
    noise, time, dropped = _draw(key, mel, condition_dropout, compute)
    with jax.named_scope("flow_loss"):
        at = time[:, None, None]
        state = (1 - (1 - sigma) * at) * noise + at * mel
        condition = jnp.where(dropped[:, None, None], 0, mu)
        velocity = decoder.estimator(state, condition, time, lengths).astype(jnp.float32)
        target = mel - (1 - sigma) * noise
        flow = _mean((velocity - target) ** 2, lengths)
        prior = _mean(jnp.abs(mu.astype(jnp.float32) - mel), lengths)
    return flow, prior


def _draw(key, mel: Float32[Array, "b t mels"], dropout, compute: ComputePolicy):
    """Noise like `mel`, times and what is dropped, clip by clip: the same on any mesh."""

    def of_clip(clip):
        for_noise, for_time, for_dropout = jax.random.split(jax.random.fold_in(key, clip), 3)
        time = 1 - jnp.cos(0.5 * jnp.pi * jax.random.uniform(for_time))
        return jax.random.normal(for_noise, mel.shape[1:]), time, jax.random.uniform(for_dropout) < dropout

    return jax.vmap(of_clip)(split_as(jnp.arange(mel.shape[0]), compute, CLIPS))


def _mean(x: Float32[Array, "b t mels"], lengths: Int32[Array, " b"]) -> Float32[Array, ""]:
    count = frames_before(lengths, x.shape[1]).sum(dtype=jnp.float32) * x.shape[-1]
    return keep(x, lengths).sum() / jnp.maximum(count, 1.0)


def cosine_times(steps: int) -> Float[Array, " steps_and_one"]:
    """1 - cos(pi/2 * i / steps), i = 0..steps: short steps first. 2 steps: [0, 0.293, 1]."""
    return 1 - jnp.cos(jnp.linspace(0, 1, steps + 1, dtype=jnp.float32) * (0.5 * jnp.pi))


def sample_mel(
    decoder: FlowDecoder,
    hidden: Float[Array, "b t d"],
    lengths: Int32[Array, " b"],
    noise: Float[Array, "b t mels"],
    *,
    steps: int | None = None,
    guidance: float | None = None,
) -> Float[Array, "b t mels"]:
    """The 24 kHz mel (b, t, mels) of decoder states `hidden` (50 Hz, one mel frame each), fp32.

    `noise` is standard normal; past an item's length the result keeps it. `steps` and `guidance` are the config's
    (10, 0.7) by default: velocity = (1 + guidance) v(mu) - guidance v(0).
    """
    return sample_around(decoder, decoder.prenet(hidden, lengths), lengths, noise, steps=steps, guidance=guidance)


def sample_around(
    decoder: FlowDecoder,
    mu: Float[Array, "b t mels"],
    lengths: Int32[Array, " b"],
    noise: Float[Array, "b t mels"],
    *,
    steps: int | None = None,
    guidance: float | None = None,
) -> Float[Array, "b t mels"]:
    """As `sample_mel`, from the pre-net's mel `mu`."""
    steps = decoder.cfg.diffusion_steps if steps is None else steps
    guidance = decoder.cfg.guidance if guidance is None else guidance
    compute = decoder.compute
    mu, x, lengths = (split_as(x, compute, CLIPS) for x in (mu, noise.astype(jnp.float32), lengths))
    conditions, doubled = _side_by_side(mu, jnp.zeros_like(mu), compute), _side_by_side(lengths, lengths, compute)

    def step(x, times):
        start, end = times
        pairs = _side_by_side(x, x, compute)
        velocity = decoder.estimator(pairs, conditions, jnp.full_like(doubled, start, jnp.float32), doubled)
        spec = compute.spec(CLIPS, None, None, None)
        velocity = velocity.astype(jnp.float32).reshape(x.shape[0], 2, *x.shape[1:], out_sharding=spec)
        velocity = (1 + guidance) * velocity[:, 0] - guidance * velocity[:, 1]
        return x + (end - start) * velocity, None

    with jax.named_scope("flow_sampling"):
        times = cosine_times(steps)
        return jax.lax.scan(step, x, (times[:-1], times[1:]))[0]


def _side_by_side(x: Array, y: Array, compute: ComputePolicy) -> Array:
    """Rows x0, y0, x1, y1, …: every device keeps its own items."""
    spec = compute.spec(CLIPS, *[None] * (x.ndim - 1))
    return jnp.stack([x, y], 1).reshape(2 * x.shape[0], *x.shape[1:], out_sharding=spec)
