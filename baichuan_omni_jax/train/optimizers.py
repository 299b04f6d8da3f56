"""How fast parameters train: schedules, and a group's optimizer: AdamW, Adafactor or Muon."""

from collections.abc import Hashable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from baichuan_omni_jax.config import GroupConfig, OptimizerConfig
from baichuan_omni_jax.errors import ConfigError
from baichuan_omni_jax.train.muon import is_matrix, scale_by_muon

# Adafactor's sums go over dimensions of at least this size: heads are wide enough, and no model has as many layers.
_FACTORED = 64


def schedule(config: OptimizerConfig, group: GroupConfig) -> optax.Schedule:
    """Makes the schedule: linear from 0 to the group's rate in `warmup_steps`, then cosine to `final_fraction` of it at
    `decay_steps`, then constant.

    Raises ConfigError when the warm-up is not shorter than the decay.
    """
    of = lambda name: getattr(config if getattr(group, name) is None else group, name)  # noqa: E731
    # Frozen groups have no schedule, so there is a rate here.
    peak, warmup, decay = group.learning_rate or 0.0, of("warmup_steps"), of("decay_steps")
    if not 0 <= warmup < decay:
        raise ConfigError(
            f"optimizer group {group.name!r}: warmup_steps {warmup} must be less than decay_steps {decay}"
        )
    return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, decay, peak * of("final_fraction"))


def make_optimizer(
    config: OptimizerConfig, labels: Mapping[str, str], weight_decay: float = 0.0
) -> optax.GradientTransformation:
    """Makes the optimizer of a flat dict of parameters, by group; the gradient is clipped to a global norm.

    `labels` maps a parameter's name to its group. Vectors (norm scales, biases) do not decay, others by
    `config.weight_decay`, or by `weight_decay` where that is None.
    """
    general = weight_decay if config.weight_decay is None else config.weight_decay
    # A transformation for each group that trains anything.
    by_group: dict[Hashable, optax.GradientTransformation] = {
        group.name: _of_group(config, group, _weight_decay(group, general))
        for group in config.groups
        if group.name in labels.values()
    }
    # Clipping by the norm of all groups together, before they part.
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.partition(by_group, lambda parameters: {name: labels[name] for name in parameters}),
    )


def _of_group(config: OptimizerConfig, group: GroupConfig, decay: float) -> optax.GradientTransformation:
    """Makes the group's: the direction of an update, weight decay, and the rate of the schedule."""
    kind, moments = group.optimizer or config.optimizer, jnp.dtype(config.moments_dtype)
    end = (optax.add_decayed_weights(decay, _decay_mask), optax.scale_by_learning_rate(schedule(config, group)))
    adam = optax.chain(optax.scale_by_adam(config.b1, config.b2, config.eps), *end)
    if kind == "adamw":
        return with_moments_in(moments, adam)
    if kind == "adafactor":
        # Its sums of squares stay fp32: the later a step, the less it changes them.
        return optax.chain(
            optax.scale_by_factored_rms(min_dim_size_to_factor=_FACTORED), optax.clip_by_block_rms(1.0), *end
        )
    muon = optax.chain(scale_by_muon(), *end)
    both = optax.partition({True: muon, False: adam}, lambda parameters: {n: is_matrix(n) for n in parameters})
    return with_moments_in(moments, both)


def learning_rates(config: OptimizerConfig, opt_state: Any) -> dict[str, Any]:
    """Computes the rate of the next update of each group that trains, from the optimizer's state (`make_optimizer`).

    By its own count of updates: a step that was not finite does not move the schedule.
    """
    is_count = lambda state: isinstance(state, optax.ScaleByScheduleState)  # noqa: E731
    states: Mapping[Hashable, Any] = opt_state[1].inner_states
    counts = {
        name: next(filter(is_count, jax.tree.leaves(state, is_leaf=is_count))).count for name, state in states.items()
    }
    rates = {group.name: schedule(config, group)(counts[group.name]) for group in config.groups if group.name in counts}
    return {name: jnp.asarray(rate, jnp.float32) for name, rate in rates.items()}


def with_moments_in(dtype: jnp.dtype, optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """Keeps an optimizer's fp32 state in `dtype` between steps, and computes with it in fp32 as before.

    Optax rounds the first moment alone (`mu_dtype`). The state has the same structure either way.
    """
    if dtype == jnp.float32:
        return optimizer

    def cast(state: Any, to: jnp.dtype) -> Any:
        return jax.tree.map(lambda leaf: leaf.astype(to) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, state)

    def init(params: optax.Params) -> optax.OptState:
        return cast(optimizer.init(params), dtype)

    def update(updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None) -> tuple[Any, Any]:
        updates, state = optimizer.update(updates, cast(state, jnp.dtype(jnp.float32)), params)
        return updates, cast(state, dtype)

    return optax.GradientTransformation(init, update)


def _decay_mask(parameters: Any) -> dict[str, bool]:
    return {name: decays(name) for name in parameters}


def _weight_decay(group: GroupConfig, general: float) -> float:
    """Returns the group's own, else the `general` one of the run."""
    if group.weight_decay is not None:
        return group.weight_decay
    # A row that no document of the batch reads would shrink towards 0.
    return 0.0 if group.special_tokens_only else general


def decays(name: str) -> bool:
    """Whether weight decay applies: matrices yes, norm scales and biases no."""
    return name.rsplit(".", 1)[-1] not in ("scale", "bias")
