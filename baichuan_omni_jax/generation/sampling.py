"""Samples one token of each row from its logits, every row by settings and a key of its own.

Settings are arrays, so that one program serves them all; a row's token is the same whatever the rows beside it ask for.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32, UInt32

from baichuan_omni_jax.config import SamplingConfig

# Rows whose `top_k` is at most this are sampled without their whole vocabulary being sorted.
MAX_FAST_TOP_K = 64
_LEAST_TEMPERATURE = 1e-6


class SamplingParams(NamedTuple):
    """`SamplingConfig` of several rows, an array a field."""

    temperature: Float[Array, " b"]
    top_k: Int32[Array, " b"]
    top_p: Float[Array, " b"]
    repetition_penalty: Float[Array, " b"]

    @classmethod
    def from_settings(cls, rows: Sequence[SamplingConfig]) -> "SamplingParams":
        """The settings of one row after the other, on the host."""
        # Numpy's arrays where JAX's are declared: a jitted function takes either.
        column: Callable[..., Any] = lambda name, dtype: np.array([getattr(row, name) for row in rows], dtype)  # noqa: E731
        floats = {name: column(name, np.float32) for name in ("temperature", "top_p", "repetition_penalty")}
        return cls(top_k=column("top_k", np.int32), **floats)


def key_data(key: Array) -> UInt32[np.ndarray, "2"]:
    """What `sample` takes for a row: two words made of any kind of JAX key."""
    return np.asarray(jax.random.bits(key, (2,), jnp.uint32))


def sample(
    logits: Float[Array, "b v"],
    seen_tokens: Bool[Array, "b v"],
    params: SamplingParams,
    keys: UInt32[Array, "b 2"],
    step: Int32[Array, " b"],
    allowed: Bool[Array, "#b v"] | None = None,
) -> tuple[Int32[Array, " b"], Float[Array, " b"]]:
    """Samples a token of each row.

    Args:
        logits: of the next token.
        seen_tokens: what the row's sequence already has, which `repetition_penalty` meets.
        params: the settings of each row; the order of the cuts is `SamplingConfig`'s.
        keys: two words of each row (`key_data`).
        step: counts the row's samples: the same key and step give the same token.
        allowed: tokens that may be chosen (default: all).

    Returns:
        The tokens, and their log-probabilities by the logits alone, before penalty and cuts.
    """
    # The repetition penalty, then what is forbidden; greedy rows are done with that.
    logits = logits.astype(jnp.float32)
    penalty = params.repetition_penalty[:, None]
    scores = jnp.where(seen_tokens, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)
    if allowed is not None:
        scores = jnp.where(allowed, scores, -jnp.inf)
    tokens = jnp.argmax(scores, -1).astype(jnp.int32)
    # Rows with a temperature, in two groups: sorting a vocabulary of 152064 takes longer than all else, so that is done
    # only where a row needs it, and neither group costs anything when it is empty.
    random = params.temperature > 0
    keys = jax.vmap(_step_key)(keys, step)
    few = random & (params.top_k > 0) & (params.top_k <= MAX_FAST_TOP_K)
    for rows, width in ((few, min(MAX_FAST_TOP_K, logits.shape[-1])), (random & ~few, logits.shape[-1])):
        chosen = jax.lax.cond(
            rows.any(),
            lambda width=width: _sample_among(scores, width, params, keys),
            lambda tokens=tokens: tokens,
        )
        tokens = jnp.where(rows, chosen, tokens)
    total = jax.nn.logsumexp(logits, -1)
    return tokens, jnp.take_along_axis(logits, tokens[:, None], -1)[:, 0] - total


def _sample_among(scores: Array, width: int, params: SamplingParams, keys: Array) -> Array:
    """A token of each row among its `width` likeliest, of which its settings leave some."""
    best, ids = jax.lax.top_k(scores, width)
    # The likeliest score 0, so that no temperature makes anything infinite.
    best = (best - best[:, :1]) / jnp.maximum(params.temperature, _LEAST_TEMPERATURE)[:, None]
    rank = jnp.arange(width)
    best = jnp.where((rank < params.top_k[:, None]) | (params.top_k[:, None] == 0), best, -jnp.inf)
    # The nucleus: tokens in front of which less than top_p lies. The likeliest always stays.
    likely = jax.nn.softmax(best, -1)
    before = jnp.cumsum(likely, -1) - likely
    kept = (before < params.top_p[:, None]) | (params.top_p[:, None] >= 1) | (rank == 0)
    # The largest score with Gumbel noise is a sample of the softmax over what was kept.
    noise = jax.vmap(lambda key: jax.random.gumbel(key, (width,), jnp.float32))(keys)
    place = jnp.argmax(jnp.where(kept, best + noise, -jnp.inf), -1)
    return jnp.take_along_axis(ids, place[:, None], -1)[:, 0].astype(jnp.int32)


def _step_key(data: Array, step: Array) -> Array:
    # A generator by name: JAX's default may be set otherwise, and the answer must not depend on it.
    return jax.random.fold_in(jax.random.wrap_key_data(data, impl="threefry2x32"), step)
