"""Which parameters train: groups by path pattern."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields

from flax import nnx

from baichuan_omni_jax.config import GroupConfig, OmniConfig, RunConfig
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


def _compile(group: GroupConfig) -> re.Pattern:
    try:
        return re.compile(group.pattern)
    except re.error as error:
        raise ConfigError(f"optimizer group {group.name!r}: pattern {group.pattern!r} is broken: {error}") from error
