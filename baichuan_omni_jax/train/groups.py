"""Which parameters train, and how fast: groups by path pattern, the schedule, the optimizer."""

import re
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from baichuan_omni_jax.config import GroupConfig, OmniConfig, OptimizerConfig, RunConfig
from baichuan_omni_jax.errors import ConfigError

# Tables with a row a token: in these, groups with `special_tokens_only` train some rows.
TOKEN_TABLES = ("llm.embedding", "llm.head")


@dataclass(frozen=True)
class Groups:
    """Names of parameters by group; `frozen` ones get no gradient and no optimizer state.

    `rows` maps a frozen table of which some rows train to the name these have among `trainable`.
    """

    trainable: dict[str, str]
    frozen: dict[str, str]
    rows: dict[str, str] = field(default_factory=dict)


def assign_groups(
    variables: Mapping[str, nnx.Variable], groups: tuple[GroupConfig, ...], *, special_token_rows: bool = True
) -> Groups:
    """Assigns each variable its group: the first whose pattern matches its dotted name from the start.

    Buffers (variables that are no `nnx.Param`) are frozen whatever matches. Without `special_token_rows`, groups with
    `special_tokens_only` are frozen whole. Raises ConfigError naming a parameter that no group covers, a group that
    matches nothing, a broken pattern, what is no table of tokens where only their rows may train, or that nothing is
    left to train.
    """
    # Order decides: a parameter belongs to the first group whose pattern matches.
    patterns = {group.name: _compile(group) for group in groups}
    rates = {group.name: group.learning_rate for group in groups}
    by_rows = {group.name for group in groups if group.special_tokens_only}
    trainable, frozen, rows, unused = {}, {}, {}, set(patterns)
    for name, variable in variables.items():
        group = next((g for g, pattern in patterns.items() if pattern.match(name)), None)
        if group is None:
            raise ConfigError(f"optimizer.groups cover no parameter called {name}")
        unused.discard(group)
        learns = isinstance(variable, nnx.Param) and rates[group] is not None
        # A table of which some rows train is frozen itself; its rows are a parameter of their own.
        if group in by_rows:
            if name not in TOKEN_TABLES:
                raise ConfigError(
                    f"optimizer group {group!r} is special_tokens_only, but {name} has no rows of tokens: "
                    f"only {' and '.join(TOKEN_TABLES)} have"
                )
            frozen[name] = group
            if learns and special_token_rows:
                rows[name] = f"{name}_rows"
                trainable[rows[name]] = group
            continue
        (trainable if learns else frozen)[name] = group
    if unused:
        raise ConfigError(f"optimizer group {sorted(unused)[0]!r} matches no parameter")
    if not trainable:
        raise ConfigError("optimizer.groups freeze every parameter: nothing is left to train")
    return Groups(trainable, frozen, rows)


def special_ids(run: RunConfig, omni: OmniConfig) -> tuple[int, ...]:
    """Lists the ids of the special tokens: `train.special_token_ids`, or the model's media marks.

    Raises ConfigError on an id outside the vocabulary.
    """
    # All marks of media; the end of text is a token that text models know.
    marks = (getattr(omni.tokens, mark.name) for mark in fields(omni.tokens) if mark.name != "end_of_text")
    ids = tuple(dict.fromkeys(run.train.special_token_ids or marks))
    outside = [each for each in ids if not 0 <= each < omni.llm.vocab_size]
    if outside:
        raise ConfigError(
            f"train.special_token_ids has {outside[0]}, which lies outside llm.vocab_size {omni.llm.vocab_size}"
        )
    return ids


def untrained_targets(run: RunConfig, omni: OmniConfig) -> tuple[int, ...]:
    """Lists special tokens that no text loss may have as a target, as their rows of the head do not train: all or none.

    Such a row is as it was drawn, or as another stage left it. What could still change is what comes before it, say
    the audio embeddings, and these would learn to bend hidden states towards a row that means nothing.
    """
    group = next((group for group in run.optimizer.groups if _compile(group).match("llm.head")), None)
    trains = group is not None and group.learning_rate is not None
    if trains and group is not None and group.special_tokens_only:
        trains = run.train.special_token_rows
    return () if trains else special_ids(run, omni)


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
    """Makes AdamW over a flat dict of parameters, a learning rate a group, the gradient clipped to a global norm.

    `labels` maps a parameter's name to its group. Vectors (norm scales, biases) do not decay, others by
    `config.weight_decay`, or by `weight_decay` where that is None.
    """
    # A transformation for each group that trains anything.
    by_group: dict[Hashable, optax.GradientTransformation] = {
        group.name: with_moments_in(
            jnp.dtype(config.moments_dtype),
            optax.adamw(
                schedule(config, group),
                b1=config.b1,
                b2=config.b2,
                eps=config.eps,
                weight_decay=_weight_decay(group, weight_decay if config.weight_decay is None else config.weight_decay),
                mask=_decay_mask,
            ),
        )
        for group in config.groups
        if group.name in labels.values()
    }
    # Clipping by the norm of all groups together, before they part.
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.partition(by_group, lambda parameters: {name: labels[name] for name in parameters}),
    )


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


def _compile(group: GroupConfig) -> re.Pattern:
    try:
        return re.compile(group.pattern)
    except re.error as error:
        raise ConfigError(f"optimizer group {group.name!r}: pattern {group.pattern!r} is broken: {error}") from error
