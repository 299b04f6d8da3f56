"""What a layer keeps for its backward pass changes no value, only what is computed twice."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from baichuan_omni_jax.config import tiny
from baichuan_omni_jax.errors import ConfigError
from baichuan_omni_jax.llm.model import LanguageModel
from baichuan_omni_jax.nn.param import ComputePolicy, named_values, with_values
from baichuan_omni_jax.nn.remat import VALUE_NAMES, KeptValues, parse_remat
from baichuan_omni_jax.vision.model import VisionModel

ALL = "+".join(VALUE_NAMES)
CFG, LENGTH = tiny(), 64


@pytest.mark.parametrize("text", ["", "ful", "qkv+qkv", "qkv@host+qkv", "attention_out+fit", "full+qkv", "qkv@disk"])
def test_policies_that_are_none_are_refused(text):
    with pytest.raises(ConfigError, match=r"compute\.remat .*attention_out, kv_gathered, qkv, mlp_in, mlp_gate_up"):
        parse_remat(text)


def test_names_are_kept_where_they_say():
    assert parse_remat("full") == KeptValues((), ())
    assert parse_remat("none") is None
    assert parse_remat("qkv@host+mlp_in") == KeptValues(("mlp_in",), ("qkv",))


def gradient_program(branch: str, policy: str) -> tuple[Any, Any]:
    """A compiled function of the parameters, a loss and its gradients by name in fp32, and parameters."""
    # The language model's MLP goes in pieces: what is kept leaves two loops.
    compute = ComputePolicy(remat=policy, mlp_chunk=16, attention_block=16)
    model: LanguageModel | VisionModel
    if branch == "llm":
        model = LanguageModel(jax.random.key(0), CFG.llm, compute)
        tokens = jax.random.randint(jax.random.key(1), (1, LENGTH), 0, CFG.llm.vocab_size)
        ids, places = jnp.asarray([[1] * 40 + [2] * 16 + [0] * 8]), jnp.arange(LENGTH)[None] % 40
        run = lambda model: model(model.embed(tokens), places, ids)  # noqa: E731
    else:
        model = VisionModel(jax.random.key(0), CFG.vision, compute)
        patches = jax.random.randint(jax.random.key(1), (1, LENGTH, 588), 0, 255).astype(jnp.uint8)
        # Eight whole images of 2 x 4 patches.
        images, places = jnp.arange(LENGTH) // 8 + 1, jnp.arange(LENGTH)
        at = jnp.stack([places % 8 // 4, places % 4], -1)
        run = lambda model: model(patches, at[None], images[None])  # noqa: E731

    def loss(values):
        out = run(with_values(model, values))
        return (out * jnp.cos(jnp.arange(out.size).reshape(out.shape))).sum()

    return jax.jit(jax.value_and_grad(loss)), named_values(model)


@pytest.mark.parametrize(("branch", "policies"), [("llm", (ALL, "attention_out@host+qkv", "none")), ("vision", (ALL,))])
def test_no_policy_changes_a_value(branch, policies):
    """Loss and gradients, to 1e-6 of each array's largest value."""
    with jax.default_matmul_precision("highest"):
        program, values = gradient_program(branch, "full")
        expected = jax.tree.leaves(program(values))
        for policy in policies:
            found = jax.tree.leaves(gradient_program(branch, policy)[0](values))
            for one, other in zip(found, expected, strict=True):
                assert np.abs(one - other).max() <= 1e-6 * np.abs(other).max(), policy


@pytest.mark.parametrize(
    ("branch", "saved"),
    [
        # On one device what is gathered is a layer's own keys and values.
        ("llm", {"qkv": 3, "kv_gathered": 2, "mlp_in": 1, "mlp_gate_up": 2, ALL: 8}),
        ("vision", {"qkv": 3, "kv_gathered": 0, "mlp_in": 1, "mlp_gate_up": 1, ALL: 7}),
    ],
)
def test_what_is_kept_is_not_computed_again(branch, saved):
    """Products that a layer's backward pass does without, two of them in the reference's attention."""

    def products(policy: str) -> int:
        program, values = gradient_program(branch, policy)
        return str(program.trace(values).jaxpr).count("dot_general")

    everything = products("full")
    assert {policy: everything - products(policy) for policy in saved} == saved
