"""Which parameters train, and how fast: groups by path pattern, the schedule, the optimizer."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import optax
from flax import nnx

from baichuan_omni_jax.config import ConfigError, GroupConfig, OptimizerConfig


@dataclass(frozen=True)
class Groups:
    """Names of parameters by group; `frozen` ones get no gradient and no optimizer state."""

    trainable: dict[str, str]
    frozen: dict[str, str]


def assign_groups(variables: Mapping[str, nnx.Variable], groups: tuple[GroupConfig, ...]) -> Groups:
    """The group of each variable: the first whose pattern matches its dotted name from the start.

    Buffers (variables that are no `nnx.Param`) are frozen whatever matches. Raises ConfigError naming a parameter that
    no group covers, a group that matches nothing, a broken pattern, or that nothing is left to train.
    """
    patterns = {group.name: _compile(group) for group in groups}
    rates = {group.name: group.learning_rate for group in groups}
    trainable, frozen, unused = {}, {}, set(patterns)
    for name, variable in variables.items():
        group = next((g for g, pattern in patterns.items() if pattern.match(name)), None)
        if group is None:
            raise ConfigError(f"optimizer.groups cover no parameter called {name}")
        unused.discard(group)
        learns = isinstance(variable, nnx.Param) and rates[group] is not None
        (trainable if learns else frozen)[name] = group
    if unused:
        raise ConfigError(f"optimizer group {sorted(unused)[0]!r} matches no parameter")
    if not trainable:
        raise ConfigError("optimizer.groups freeze every parameter: nothing is left to train")
    return Groups(trainable, frozen)


def schedule(config: OptimizerConfig, group: GroupConfig) -> optax.Schedule:
    """Linear from 0 to the group's rate in `warmup_steps`, cosine to `final_fraction` of it at `decay_steps`, constant.

    Raises ConfigError when the warm-up is not shorter than the decay.
    """
    of = lambda name: getattr(config if getattr(group, name) is None else group, name)  # noqa: E731
    peak, warmup, decay = group.learning_rate, of("warmup_steps"), of("decay_steps")
    if not 0 <= warmup < decay:
        raise ConfigError(
            f"optimizer group {group.name!r}: warmup_steps {warmup} must be less than decay_steps {decay}"
        )
    return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, decay, peak * of("final_fraction"))


def make_optimizer(
    config: OptimizerConfig, labels: Mapping[str, str], weight_decay: float = 0.0
) -> optax.GradientTransformation:
    """AdamW over a flat dict of parameters, a learning rate a group, the gradient clipped to a global norm.

    `labels` maps a parameter's name to its group. Vectors (norm scales, biases) do not decay, others by
    `config.weight_decay`, or by `weight_decay` where that is None.
    """
    by_group = {
        group.name: optax.adamw(
            schedule(config, group),
            b1=config.b1,
            b2=config.b2,
            eps=config.eps,
            weight_decay=weight_decay if config.weight_decay is None else config.weight_decay,
            mask=lambda parameters: {name: decays(name) for name in parameters},
        )
        for group in config.groups
        if group.name in labels.values()
    }
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.partition(by_group, lambda parameters: {name: labels[name] for name in parameters}),
    )


def decays(name: str) -> bool:
    """Whether weight decay applies: matrices yes, norm scales and biases no."""
    return name.rsplit(".", 1)[-1] not in ("scale", "bias")


def _compile(group: GroupConfig) -> re.Pattern:
    try:
        return re.compile(group.pattern)
    except re.error as error:
        raise ConfigError(f"optimizer group {group.name!r}: pattern {group.pattern!r} is broken: {error}") from error
