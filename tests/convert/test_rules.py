"""The engine of the conversion tables: what a row means, and everything it refuses, all at once."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from baichuan_omni_jax.convert.plan import plan_from_leaves, plan_from_tensors
from baichuan_omni_jax.convert.rules import Rule, expand
from baichuan_omni_jax.convert.safetensors_io import TensorInfo
from baichuan_omni_jax.errors import ConfigError

F32, BF16 = np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)
SHAPES = {"layers.q": (2, 6, 4, 3), "layers.k": (2, 6, 2, 3), "table.0": (5, 6), "table.1": (7, 6), "scale": (6,)}
PACK = Rule("m.{layer}.pack", ("layers.q", "layers.k"), "(n h) d -> d n h")
TABLE, SCALE = Rule("t.{q}.weight", "table.{q}"), Rule("norm.weight", "scale")
BUFFER = Rule("positions", restore=lambda: np.zeros((3, 2), np.float32))
RULES = (PACK, TABLE, SCALE, BUFFER)
TENSORS = {"m.0.pack": (18, 6), "m.1.pack": (18, 6), "t.0.weight": (5, 6), "t.1.weight": (7, 6), "norm.weight": (6,)}


def abstract(shapes: dict = SHAPES) -> dict[str, dict]:
    return {"b": {name: nnx.Param(jax.ShapeDtypeStruct(shape, jnp.float32)) for name, shape in shapes.items()}}


def infos(shapes: dict = TENSORS, dtype: np.dtype = BF16) -> dict[str, TensorInfo]:
    return {name: TensorInfo(shape, dtype) for name, shape in shapes.items()}


def test_names_and_shapes_follow_from_the_parameters() -> None:
    entries, problems = expand(RULES, SHAPES, "b")
    assert not problems
    assert {entry.name: entry.shape for entry in entries} == TENSORS
    second = next(entry for entry in entries if entry.name == "m.1.pack")
    assert (second.leaves, second.index, second.parts) == (
        ("layers.q", "layers.k"),
        (1,),
        (slice(0, 12), slice(12, 18)),
    )


@pytest.mark.parametrize(
    ("transform", "shape", "sizes", "keeps_rows"),
    [
        ("", (4, 3), (), True),
        ("o i -> i o", (4, 3), (), False),
        ("f (q d) -> f q d", (5, 2, 3), (), True),
        ("n 1 1 -> n", (4,), (), True),
        ("d c t y x -> t (c y x) d", (2, 12, 5), (("c", 3), ("y", 2), ("x", 2)), False),
    ],
)
def test_a_transform_and_its_inverse(transform: str, shape: tuple, sizes: tuple, keeps_rows: bool) -> None:
    rule = Rule("a", "b", transform, sizes)
    value = np.arange(np.prod(shape), dtype=np.float32).reshape(shape).astype(BF16)
    tensor = rule.backward(value)
    assert tensor.shape == rule.tensor_shape(shape)
    assert tensor.dtype == BF16
    np.testing.assert_array_equal(rule.forward(tensor, shape), value)
    assert rule.keeps_rows == keeps_rows


def test_names_are_matched_whole() -> None:
    assert PACK.pattern.fullmatch("m.12.pack")
    for name in ("m.x.pack", "m.01.pack", "m.1.pack.more", "n.m.1.pack", "mx1.pack"):
        assert not PACK.pattern.fullmatch(name), name


def test_a_buffer_may_be_there_or_not() -> None:
    for extra in ({}, {"positions": (3, 2)}):
        plan = plan_from_tensors(infos(TENSORS | extra), {"b": RULES}, abstract(), "file")
        assert set(plan.buffers) == set(extra)
        assert plan.leaves["b"] == infos(SHAPES)
        assert plan.nbytes == sum(np.prod(shape) for shape in TENSORS.values()) * 2


def refusal(tensors: dict[str, TensorInfo], rules: tuple = RULES, shapes: dict = SHAPES) -> str:
    with pytest.raises(ConfigError) as caught:
        plan_from_tensors(tensors, {"b": rules}, abstract(shapes), "file")
    return str(caught.value)


def test_a_few_offending_tensors_are_all_named() -> None:
    tensors = infos({name: shape for name, shape in TENSORS.items() if name != "norm.weight"})
    tensors |= infos({"m.2.pack": (18, 6), "stray": (1,), "t.0.weight": (6, 5)})
    tensors |= infos({"t.1.weight": (7, 6)}, np.dtype(np.int32))
    message = refusal(tensors)
    assert message.startswith("file cannot be converted, 5 problems: ")
    for part in (
        "tensor m.2.pack has no place in a model of this config",
        "tensor stray has no rule",
        "tensor t.0.weight has shape [6, 5], the config wants [5, 6]",
        "tensor t.1.weight has dtype int32, not a floating one",
        "tensor norm.weight [6] is missing",
    ):
        assert part in message


def test_layers_of_one_parameter_have_one_dtype() -> None:
    tensors = infos() | {"m.1.pack": TensorInfo((18, 6), F32)}
    message = refusal(tensors)
    assert "b.layers.q would join dtypes bfloat16 and float32" in message
    assert "b.layers.k would join dtypes" in message


@pytest.mark.parametrize(
    ("rules", "shapes", "part"),
    [
        ((*RULES, Rule("t.{any}.weight", "table.{any}")), SHAPES, "tensor t.0.weight has two rules"),
        ((*RULES, Rule("other", "scale")), SHAPES, "parameter b.scale is written twice: by norm.weight and other"),
        ((PACK, TABLE), SHAPES, "parameter b.scale is never written: no rule names it"),
        ((*RULES, Rule("x", "nothing")), SHAPES, "rule x names no parameter of b (nothing)"),
        (RULES, SHAPES | {"layers.k": (3, 6, 2, 3)}, "rule m.{layer}.pack does not fit b.layers.q"),
        (
            RULES,
            {n: s for n, s in SHAPES.items() if n != "layers.k"},
            "names b.layers.k, which the model does not have",
        ),
    ],
)
def test_a_table_must_cover_the_module_exactly(rules: tuple, shapes: dict, part: str) -> None:
    assert part in refusal(infos(), rules, shapes)


def test_two_branches_may_not_share_a_tensor() -> None:
    both = {"b": abstract()["b"], "c": abstract({"scale": (6,)})["b"]}
    with pytest.raises(ConfigError, match=r"tensor norm.weight has two rules, norm.weight and norm.weight"):
        plan_from_tensors(infos(), {"b": RULES, "c": (SCALE,)}, both, "file")


def test_the_way_back_is_checked_alike() -> None:
    plan = plan_from_leaves({"b": infos(SHAPES)}, {"b": RULES}, abstract(), "ckpt")
    assert plan.tensors == infos()
    assert set(plan.buffers) == {"positions"}
    stored = infos(
        {name: shape for name, shape in SHAPES.items() if name != "scale"} | {"more": (1,), "table.0": (6, 6)}
    )
    with pytest.raises(ConfigError, match="ckpt cannot be converted, 3 problems") as caught:
        plan_from_leaves({"b": stored}, {"b": RULES}, abstract(), "ckpt")
    for part in ("b.scale [6] is missing", "b.more has no place", "tensor b.table.0 has shape [6, 6]"):
        assert part in str(caught.value)
    mixed = infos(SHAPES) | {"layers.k": TensorInfo(SHAPES["layers.k"], F32)}
    wide = plan_from_leaves({"b": mixed}, {"b": RULES}, abstract(), "ckpt").tensors
    assert {name for name, info in wide.items() if info.dtype == F32} == {n for n in wide if n.endswith(".pack")}
    assert {name: info.shape for name, info in wide.items()} == {n: info.shape for n, info in infos().items()}
