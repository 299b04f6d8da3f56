"""Conversion rules: one rule a weight, read in both directions, and the groups of rules that branches share.

A rule pairs the name of a checkpoint tensor with the dotted name of a parameter:

    Rule("model.layers.{layer}.mlp.up_proj.weight", "layers.mlp.up_proj.weight", "f d -> d f")

`{word}` stands for a number. One that both names have counts a list (`heads.{q}`); one that only the tensor's name has
is stacked: the parameter has an axis for it, in front, in order of appearance. The transform is einops', from the
tensor's axes to those of one layer of the parameter; sizes are only needed where our side joins axes. A rule with
several parameters cuts the tensor along its first axis (a packed Q, K, V). A rule with `restore` is a buffer that the
released code computes: it is dropped on the way here and computed again on the way back.

What the tensors must be called and look like follows from the parameters' shapes alone (`expand`).
"""

import itertools
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod

import einops
import numpy as np

_FIELD = re.compile(r"\{(\w+)\}")
_AXES = re.compile(r"\([^)]*\)|\w+")


@dataclass(frozen=True)
class Rule:
    """How one checkpoint tensor, or one in each layer, becomes a parameter.

    Attributes:
        tensor: the checkpoint tensor's name; `{word}` stands for a number.
        parameter: the parameter's, or several, cut from the tensor's first axis in that order; none with `restore`.
        transform: einops' pattern from the tensor's axes to those of one layer of the parameter; "": the same axes.
        sizes: axes of `transform` that our side joins, as (name, size).
        restore: computes the exact fp32 values of a buffer.
    """

    tensor: str
    parameter: str | tuple[str, ...] = ()
    transform: str = ""
    sizes: tuple[tuple[str, int], ...] = ()
    restore: Callable[[], np.ndarray] | None = None

    @property
    def parameters(self) -> tuple[str, ...]:
        """Returns the parameters as a tuple, however many there are."""
        return (self.parameter,) if isinstance(self.parameter, str) else self.parameter

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """Matches the whole of a checkpoint tensor's name."""
        return _pattern(self.tensor)

    @property
    def stack(self) -> tuple[str, ...]:
        """Returns the fields that are leading axes of the parameter."""
        shared = _FIELD.findall(self.parameters[0]) if self.parameters else ()
        return tuple(field for field in _FIELD.findall(self.tensor) if field not in shared)

    @property
    def keeps_rows(self) -> bool:
        """Returns whether the first axis stays the first, so that blocks of rows can be moved one by one."""
        if len(self.parameters) != 1 or not self.transform:
            return len(self.parameters) == 1
        left, right = (_AXES.findall(side) for side in self.transform.split("->"))
        return left[0] == right[0] and left[0][0] != "("

    def restored(self) -> np.ndarray:
        """Computes a buffer's exact fp32 values; only for a rule with `restore`."""
        assert self.restore is not None, self.tensor
        return self.restore()

    def forward(self, tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """Returns a checkpoint tensor (or the rows of one part) as one layer of the parameter, of `shape`."""
        if not self.transform:
            return tensor
        # Plain axes of the parameter give einops the sizes that joined axes of the tensor leave open.
        right = _AXES.findall(self.transform.split("->")[1])
        plain = {axis: size for axis, size in zip(right, shape, strict=True) if axis[0] != "("}
        return einops.rearrange(tensor, self.transform, **plain, **dict(self.sizes))

    def backward(self, value: np.ndarray) -> np.ndarray:
        """Returns one layer of the parameter as the checkpoint tensor: the inverse of `forward`."""
        if not self.transform:
            return value
        left, right = self.transform.split("->")
        return einops.rearrange(value, f"{right.strip()} -> {left.strip()}", **dict(self.sizes))

    def tensor_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the checkpoint's shape of one layer's `shape`. Raises einops.EinopsError where they do not fit."""
        # An array of one byte stands for any size, so that einops itself decides, and nothing is allocated.
        return self.backward(np.broadcast_to(np.empty((), np.int8), shape)).shape

    def parts(self, shapes: Iterable[tuple[int, ...]]) -> list[slice]:
        """Returns the rows of the checkpoint tensor that each parameter (by its one layer's shape) takes."""
        # Side by side on the first axis, as many rows as each parameter makes.
        ends = np.cumsum([0, *(self.tensor_shape(shape)[0] for shape in shapes)]).tolist()
        return [slice(start, end) for start, end in itertools.pairwise(ends)]


@dataclass(frozen=True)
class Entry:
    """One checkpoint tensor and where it goes.

    Attributes:
        name: the tensor's name, its numbers filled in.
        shape: the tensor's shape.
        rule: the rule that it follows.
        leaves: the parameters that it fills.
        index: the layer of each of them.
        parts: the rows of the tensor for each of several parameters; empty for one.
    """

    name: str
    shape: tuple[int, ...]
    rule: Rule
    leaves: tuple[str, ...]
    index: tuple[int, ...]
    parts: tuple[slice, ...]

    @property
    def size(self) -> int:
        return prod(self.shape)


def expand(rules: Iterable[Rule], shapes: Mapping[str, tuple[int, ...]], branch: str) -> tuple[list[Entry], list[str]]:
    """Lists the checkpoint tensors of a branch whose parameters have `shapes`, in the table's order, and what is wrong.

    A rule without a parameter, a parameter without a rule or with two, and a tensor named twice are problems.
    """
    entries, problems = [], []
    written_by: dict[str, list[Rule]] = {name: [] for name in shapes}
    for rule in rules:
        if rule.restore:
            continue
        found, wrong = _expand_rule(rule, shapes, branch)
        entries += found
        problems += wrong
        # Once a rule, however many tensors it expands to.
        for leaf in {leaf for entry in found for leaf in entry.leaves}:
            written_by[leaf].append(rule)
    for leaf, wanted in written_by.items():
        if not wanted:
            problems.append(f"parameter {branch}.{leaf} is never written: no rule names it")
        elif len(wanted) > 1:
            writers = " and ".join(rule.tensor for rule in wanted)
            problems.append(f"parameter {branch}.{leaf} is written twice: by {writers}")
    names = [entry.name for entry in entries]
    problems += [
        f"two rules of {branch} name tensor {name}" for name in sorted({n for n in names if names.count(n) > 1})
    ]
    return entries, problems


def _expand_rule(rule: Rule, shapes: Mapping[str, tuple[int, ...]], branch: str) -> tuple[list[Entry], list[str]]:
    entries, problems = [], []
    # The first parameter's name finds the numbers (`heads.{q}`); the others must be there with the same ones.
    first = _pattern(rule.parameters[0])
    matches = [match for match in map(first.fullmatch, shapes) if match]
    if not matches:
        return [], [f"rule {rule.tensor} names no parameter of {branch} ({rule.parameters[0]})"]
    for match in matches:
        leaves = tuple(name.format(**match.groupdict()) for name in rule.parameters)
        absent = [leaf for leaf in leaves if leaf not in shapes]
        if absent:
            problems.append(f"rule {rule.tensor} names {branch}.{', '.join(absent)}, which the model does not have")
            continue
        try:
            entries += _expand_leaves(rule, leaves, [shapes[leaf] for leaf in leaves], match.groupdict())
        except (einops.EinopsError, ValueError) as error:
            cause = str(error).strip().splitlines()[0]
            problems.append(f"rule {rule.tensor} does not fit {branch}.{leaves[0]} {shapes[leaves[0]]}: {cause}")
    return entries, problems


def _expand_leaves(
    rule: Rule, leaves: tuple[str, ...], shapes: list[tuple[int, ...]], fields: dict[str, str]
) -> list[Entry]:
    # The leading axes of the parameters are layers: each is a checkpoint tensor of its own.
    depth = len(rule.stack)
    counts = shapes[0][:depth]
    if any(shape[:depth] != counts for shape in shapes):
        raise ValueError(f"stacked axes differ: {shapes}")
    inner = [shape[depth:] for shape in shapes]
    # Several parameters share a tensor by its rows, which need not be as many for each (fewer KV heads than heads).
    parts = tuple(rule.parts(inner)) if len(leaves) > 1 else ()
    whole = rule.tensor_shape(inner[0])
    if parts:
        whole = (parts[-1].stop, *whole[1:])
    return [
        Entry(
            rule.tensor.format(**fields, **dict(zip(rule.stack, index, strict=True))), whole, rule, leaves, index, parts
        )
        for index in np.ndindex(*counts)
    ]


def _pattern(template: str) -> re.Pattern[str]:
    """Compiles `a.{n}.b` to an expression with a group `n` of digits; a number is written without leading zeros."""
    pieces = _FIELD.split(template)
    return re.compile(
        "".join(rf"(?P<{piece}>0|[1-9]\d*)" if i % 2 else re.escape(piece) for i, piece in enumerate(pieces))
    )


# Torch linears are (out, in), ours (in, out), heads an axis of their own.


def linear(tensor: str, parameter: str, *, bias: bool = True) -> list[Rule]:
    """Lists the rules of `weight` (out, in) <-> (in, out), and `bias`."""
    return [Rule(f"{tensor}.weight", f"{parameter}.weight", "o i -> i o"), *_bias(tensor, parameter, bias)]


def into_heads(tensor: str, parameter: str, *, bias: bool = True) -> list[Rule]:
    """Lists the rules of Q, K or V: `weight` (heads * head_dim, d) <-> (d, heads, head_dim), and `bias`."""
    weight = Rule(f"{tensor}.weight", f"{parameter}.weight", "(n h) d -> d n h")
    return [weight, *([Rule(f"{tensor}.bias", f"{parameter}.bias", "(n h) -> n h")] if bias else [])]


def out_of_heads(tensor: str, parameter: str, *, bias: bool = True) -> list[Rule]:
    """Lists the rules of an attention output: `weight` (d, heads * head_dim) <-> (heads, head_dim, d), and `bias`."""
    return [Rule(f"{tensor}.weight", f"{parameter}.weight", "d (n h) -> n h d"), *_bias(tensor, parameter, bias)]


def packed_heads(weight: str, bias: str, parameter: str) -> list[Rule]:
    """Lists the rules of Q, K and V stacked on the output axis <-> `parameter.{q,k,v}_proj`."""
    names = [f"{parameter}.{which}_proj" for which in "qkv"]
    return [
        Rule(weight, tuple(f"{name}.weight" for name in names), "(n h) d -> d n h"),
        Rule(bias, tuple(f"{name}.bias" for name in names), "(n h) -> n h"),
    ]


def norm(tensor: str, parameter: str, *, bias: bool = True) -> list[Rule]:
    """Lists the rules of `weight` <-> `scale`, and the `bias` of a LayerNorm."""
    return [Rule(f"{tensor}.weight", f"{parameter}.scale"), *_bias(tensor, parameter, bias)]


def conv(tensor: str, parameter: str) -> list[Rule]:
    """Lists the rules of a `Conv1d`: `weight` (out, in, kernel) <-> `linear.weight` (kernel, in, out), and the bias."""
    return [
        Rule(f"{tensor}.weight", f"{parameter}.linear.weight", "o i k -> k i o"),
        Rule(f"{tensor}.bias", f"{parameter}.linear.bias"),
    ]


def upsample_block(tensor: str, parameter: str) -> list[Rule]:
    """Lists the rules of a transposed convolution, `weight` (in, out, kernel) <-> (kernel, in, out), and GroupNorm."""
    return [
        Rule(f"{tensor}.conv.weight", f"{parameter}.conv.weight", "i o k -> k i o"),
        Rule(f"{tensor}.conv.bias", f"{parameter}.conv.bias"),
        *norm(f"{tensor}.norm", f"{parameter}.norm"),
    ]


def whisper_layer(tensor: str, parameter: str, *, norm_bias: bool = True) -> list[Rule]:
    """Lists the rules of a Whisper layer <-> `nn.encoder.EncoderLayer`; K has no bias, RMSNorms have none either."""
    return [
        *norm(f"{tensor}.self_attn_layer_norm", f"{parameter}.attention_norm", bias=norm_bias),
        *into_heads(f"{tensor}.self_attn.q_proj", f"{parameter}.attention.q_proj"),
        *into_heads(f"{tensor}.self_attn.k_proj", f"{parameter}.attention.k_proj", bias=False),
        *into_heads(f"{tensor}.self_attn.v_proj", f"{parameter}.attention.v_proj"),
        *out_of_heads(f"{tensor}.self_attn.out_proj", f"{parameter}.attention.o_proj"),
        *norm(f"{tensor}.final_layer_norm", f"{parameter}.mlp_norm", bias=norm_bias),
        *linear(f"{tensor}.fc1", f"{parameter}.mlp.fc1"),
        *linear(f"{tensor}.fc2", f"{parameter}.mlp.fc2"),
    ]


def _bias(tensor: str, parameter: str, wanted: bool) -> list[Rule]:
    return [Rule(f"{tensor}.bias", f"{parameter}.bias")] if wanted else []
