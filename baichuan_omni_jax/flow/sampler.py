"""From noise to mel: Euler steps along the estimator's velocity, with classifier-free guidance."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from baichuan_omni_jax.flow.model import FlowDecoder
from baichuan_omni_jax.flow.unet import CLIPS
from baichuan_omni_jax.nn.param import ComputePolicy, split_as


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
        spec = compute.rules.spec(CLIPS, None, None, None)
        velocity = velocity.astype(jnp.float32).reshape(x.shape[0], 2, *x.shape[1:], out_sharding=spec)
        velocity = (1 + guidance) * velocity[:, 0] - guidance * velocity[:, 1]
        return x + (end - start) * velocity, None

    with jax.named_scope("flow_sampling"):
        times = cosine_times(steps)
        return jax.lax.scan(step, x, (times[:-1], times[1:]))[0]


def _side_by_side(x: Array, y: Array, compute: ComputePolicy) -> Array:
    """Rows x0, y0, x1, y1, …: every device keeps its own items."""
    spec = compute.rules.spec(CLIPS, *[None] * (x.ndim - 1))
    return jnp.stack([x, y], 1).reshape(2 * x.shape[0], *x.shape[1:], out_sharding=spec)
