"""Conditional flow matching, optimal-transport form: the loss of pre-net and estimator, and sampling with them.

The probability path goes straight from noise to mel (arXiv:2210.02747): x_t = (1 - (1 - s) t) noise + t mel. Training
regresses the estimator on its velocity; sampling follows that velocity by Euler steps with classifier-free guidance.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32, PRNGKeyArray

from baichuan_omni_jax.flow.model import FlowDecoder
from baichuan_omni_jax.nn.layers import length_mask, mask_padding
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
    """Computes the flow-matching loss and the pre-net's L1 prior loss, means over valid frames and mels.

    A clip's time is t = 1 - cos(pi/2 u), u even in [0, 1); its state x_t = (1 - (1 - s) t) noise + t mel; the
    estimator's target mel - (1 - s) noise, s the decoder's `sigma_min`.

    Args:
        key: of noise, times and what is dropped; clip by clip, the same on any mesh.
        decoder: pre-net and estimator.
        hidden: the audio decoder's states (b, t, d) at 50 Hz.
        mel: log mel (b, t, mels) of 24 kHz, hop 480: a frame for each of `hidden`.
        lengths: valid frames (b,) of both.
        condition_dropout: the share of clips that see no condition, for guidance.

    Returns:
        The flow-matching loss and the prior loss.
    """
    compute, sigma = decoder.compute, decoder.cfg.sigma_min
    mel, lengths = split_as(mel.astype(jnp.float32), compute, CLIPS), split_as(lengths, compute, CLIPS)
    # The pre-net is trained by both losses: its mel conditions the estimator and is compared with the target itself.
    mu = decoder.prenet(hidden, lengths)
    noise, time, dropped = _draw(key, mel, condition_dropout, compute)
    with jax.named_scope("flow_loss"):
        # A point of the straight path, and the velocity along it, which is the same everywhere on the path.
        at = time[:, None, None]
        state = (1 - (1 - sigma) * at) * noise + at * mel
        # Some clips see no condition: one estimator learns both velocities that guidance combines.
        condition = jnp.where(dropped[:, None, None], 0, mu)
        velocity = decoder.estimator(state, condition, time, lengths).astype(jnp.float32)
        target = mel - (1 - sigma) * noise
        # In fp32: the target is a difference of noise and mel, of which bf16 would keep eight bits.
        flow = _mean((velocity - target) ** 2, lengths)
        prior = _mean(jnp.abs(mu.astype(jnp.float32) - mel), lengths)
    return flow, prior


def _draw(
    key: PRNGKeyArray, mel: Float32[Array, "b t mels"], dropout: float | Array, compute: ComputePolicy
) -> tuple[Array, Array, Array]:
    """Draws noise like `mel`, times and what is dropped, clip by clip: the same on any mesh."""

    def draw_clip(clip: Array) -> tuple[Array, Array, Array]:
        for_noise, for_time, for_dropout = jax.random.split(jax.random.fold_in(key, clip), 3)
        # Cosine times: more of training near noise, where the first and shortest steps of sampling are.
        time = 1 - jnp.cos(0.5 * jnp.pi * jax.random.uniform(for_time))
        return jax.random.normal(for_noise, mel.shape[1:]), time, jax.random.uniform(for_dropout) < dropout

    return jax.vmap(draw_clip)(split_as(jnp.arange(mel.shape[0]), compute, CLIPS))


def _mean(x: Float32[Array, "b t mels"], lengths: Int32[Array, " b"]) -> Float32[Array, ""]:
    """Returns the mean over valid frames and mels; 0 where no frame is valid."""
    # One count over all clips: a clip weighs by its frames, on however many devices they lie.
    count = length_mask(lengths, x.shape[1]).sum(dtype=jnp.float32) * x.shape[-1]
    return mask_padding(x, lengths).sum() / jnp.maximum(count, 1.0)


def cosine_times(steps: int) -> Float[Array, " steps_and_one"]:
    """Returns 1 - cos(pi/2 * i / steps), i = 0..steps: short steps first. 2 steps: [0, 0.293, 1]."""
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
    """Samples the 24 kHz mel of decoder states.

    Args:
        decoder: pre-net and estimator.
        hidden: states (b, t, d) at 50 Hz, one mel frame each.
        lengths: valid frames (b,).
        noise: standard normal (b, t, mels); past an item's length the result keeps it.
        steps: Euler steps; None: the configuration's (10).
        guidance: velocity = (1 + guidance) v(mu) - guidance v(0); None: the configuration's (0.7).

    Returns:
        Log mel (b, t, mels), fp32.
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
    """Does as `sample_mel`, from the pre-net's mel `mu`."""
    steps = decoder.cfg.diffusion_steps if steps is None else steps
    guidance = decoder.cfg.guidance if guidance is None else guidance
    compute = decoder.compute
    # A small estimator takes away noise worse than it adds detail: less of it to begin with is heard more clearly.
    noise = decoder.cfg.temperature * noise.astype(jnp.float32)
    mu, x, lengths = (split_as(x, compute, CLIPS) for x in (mu, noise, lengths))
    # Guided and unguided velocity of an item in one call of the estimator, side by side on the item's own device.
    conditions, doubled = _side_by_side(mu, jnp.zeros_like(mu), compute), _side_by_side(lengths, lengths, compute)

    def step(x: Array, times: tuple[Array, Array]) -> tuple[Array, None]:
        start, end = times
        pairs = _side_by_side(x, x, compute)
        velocity = decoder.estimator(pairs, conditions, jnp.full_like(doubled, start, jnp.float32), doubled)
        spec = compute.spec(CLIPS, None, None, None)
        # Back to pairs (guided, unguided); guidance pushes away from what is likely without the condition.
        velocity = velocity.astype(jnp.float32).reshape(x.shape[0], 2, *x.shape[1:], out_sharding=spec)
        velocity = (1 + guidance) * velocity[:, 0] - guidance * velocity[:, 1]
        # An Euler step; the state stays in fp32, since every step adds a little to it.
        return x + (end - start) * velocity, None

    with jax.named_scope("flow_sampling"):
        # Scanned over pairs of times: the estimator is compiled once, however many steps there are.
        times = cosine_times(steps)
        return jax.lax.scan(step, x, (times[:-1], times[1:]))[0]


def _side_by_side(x: Array, y: Array, compute: ComputePolicy) -> Array:
    """Interleaves rows, x0, y0, x1, y1, …: every device keeps its own items."""
    spec = compute.spec(CLIPS, *[None] * (x.ndim - 1))
    return jnp.stack([x, y], 1).reshape(2 * x.shape[0], *x.shape[1:], out_sharding=spec)
