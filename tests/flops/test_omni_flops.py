"""Model FLOPs against every matrix product of the traced step; counts against counting in numpy; chips by kind."""

from dataclasses import replace

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from jax.interpreters import partial_eval

from baichuan_omni_jax.config import Budgets, tiny
from baichuan_omni_jax.flops.terms import chip_of, flops_by_branch, flops_by_term, omni_terms, peak_flops
from baichuan_omni_jax.nn.param import ComputePolicy, named_values, with_values
from baichuan_omni_jax.omni.model import OmniModel
from baichuan_omni_jax.sharding import ShardingRules
from baichuan_omni_jax.train.tasks.task import count_batch
from data_pipelines.packing.batch import empty_rows
from tests.helpers.micro import one_device, place

TOKENS, PATCHES, FRAMES, TARGETS = 96, 64, 12, 10
ROWS = 2
# What trains: a prefix of the trainable parameters' names (their matrices, biases and norms).
STAGES = {
    "everything": ("vision.", "llm.", "audio_head."),
    "projector": ("vision.projector.",),
    "audio": ("audio_head.",),
    "last norm and logits": ("llm.norm.", "llm.head"),
}


@pytest.fixture(scope="module")
def omni():
    return tiny()


@pytest.fixture(scope="module")
def batch(omni):
    """Full budgets, with documents and images of several lengths."""
    budgets = Budgets(tokens=TOKENS, patches=PATCHES, audio_frames=FRAMES, audio_targets=TARGETS)
    return empty_rows(ROWS, budgets, omni)


def needed(traced: jax.extend.core.ClosedJaxpr) -> jax.extend.core.Jaxpr:
    """What a trace computes for its results: compilers drop the rest, such as gradients of what does not train."""
    return partial_eval.dce_jaxpr(traced.jaxpr, [True] * len(traced.jaxpr.outvars))[0]


def products(jaxpr) -> int:
    """FLOPs of every dot_general that a jaxpr runs, scans by their length."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            depth = int(np.prod([left[axis] for axis in contracted]))
            total += 2 * depth * equation.outvars[0].aval.size
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        total += times * sum(products(inner) for inner in inner_jaxprs(equation.params))
    return total


def inner_jaxprs(params: dict) -> list:
    leaves = jax.tree.leaves(list(params.values()), is_leaf=lambda x: hasattr(x, "eqns"))
    return [getattr(leaf, "jaxpr", leaf) for leaf in leaves if hasattr(leaf, "eqns")]


def traced(omni, batch, trainable_prefixes) -> tuple[int, list[str]]:
    """FLOPs of the gradient of a loss that reads all text and audio logits, with whole attention matrices."""
    mesh = one_device()
    with jax.set_mesh(mesh):
        compute = ComputePolicy(rules=ShardingRules(), remat="none", attention="reference")
        model = jax.eval_shape(lambda: OmniModel(jax.random.key(0), omni, compute))
        values = named_values(model)
        names = [name for name in values if name.startswith(trainable_prefixes) and "unused" not in name]

        def loss(trainable, frozen, batch):
            full = with_values(model, frozen | trainable)
            hidden, audio = full(batch)
            return full.llm.logits(hidden).sum() + sum(jnp.sin(level).sum() for level in audio)

        trainable = {name: values[name] for name in names}
        frozen = {name: value for name, value in values.items() if name not in trainable}
        jaxpr = jax.make_jaxpr(jax.value_and_grad(loss))(trainable, frozen, place(batch, mesh, compute.rules))
    return products(needed(jaxpr)), names


def whole_attention(omni) -> dict[str, float]:
    """Counts of full rows as `traced` computes them: every query with every key."""
    return {
        "tokens": ROWS * TOKENS,
        "causal_pairs": ROWS * TOKENS**2,
        "text_targets": ROWS * TOKENS,
        "patches": ROWS * PATCHES,
        "patch_pairs": ROWS * PATCHES**2,
        "audio_frames": ROWS * FRAMES,
        "audio_targets": ROWS * TARGETS,
    }


@pytest.mark.parametrize("stage", STAGES)
def test_flops_equal_the_products_of_the_traced_gradient(stage, omni, batch):
    expected, trainable = traced(omni, batch, STAGES[stage])
    counts = whole_attention(omni)
    parts = flops_by_term(omni_terms(omni), counts, trainable)
    # The trace holds 8 x 8 pairs of levels a frame, the count 8 x 9 / 2.
    parts["audio depth attention"] *= 64 / 36
    assert sum(parts.values()) == pytest.approx(expected, rel=1e-9)


def packed_rows(batch, seed=0):
    """Rows of documents, images and frames at random; token blocks of 8 in any order, as a context plan lays them."""
    rng, filled = np.random.default_rng(seed), {name: value.copy() for name, value in batch.items()}
    causal = pairs = 0
    for row in range(ROWS):
        documents, images = rng.integers(1, 20, 6), rng.integers(1, 8, 5) * 4
        used, seen = documents.sum(), images.sum()
        filled["segment_ids"][row, :used] = np.repeat(np.arange(1, 7), documents)
        filled["positions"][row, :used] = np.concatenate([np.arange(n) for n in documents])
        filled["patch_segments"][row, :seen] = np.repeat(np.arange(1, 6), images)[:PATCHES]
        causal += sum(n * (n + 1) // 2 for n in documents)
        order = np.concatenate([np.arange(b, b + 8) for b in rng.permutation(np.arange(0, TOKENS, 8))])
        for name in ("segment_ids", "positions"):
            filled[name][row] = filled[name][row, order]
        pairs += sum(int((filled["patch_segments"][row] == n).sum()) ** 2 for n in range(1, 6))
        filled["text_weights"][row, :7] = 0.5
        filled["audio_index"][row, :5] = np.arange(5)
        filled["audio_weights"][row, :3] = 1
        filled["audio_weights"][row, 3, 0] = 1
    tokens, patches = (filled["segment_ids"] > 0).sum(), (filled["patch_segments"] > 0).sum()
    expected = {
        "tokens": tokens,
        "causal_pairs": causal,
        "text_targets": 7 * ROWS,
        "patches": patches,
        "patch_pairs": pairs,
        "audio_frames": 5 * ROWS,
        "audio_targets": 4 * ROWS,
    }
    return filled, expected


def test_counts_of_a_packed_batch(batch):
    filled, expected = packed_rows({name: value for name, value in batch.items() if name != "patches"})
    mesh = one_device()
    with jax.set_mesh(mesh):
        found = jax.jit(count_batch)(place(filled, mesh, ShardingRules()))
    assert {name: int(value) for name, value in found.items()} == expected


def test_causal_pairs_of_one_long_document_do_not_overflow():
    """65536 tokens see 2^31 + 32768 pairs, more than an int32 holds. fp32 sums: 1e-6."""
    length = 65536
    row = np.ones((1, length), np.int32)
    batch = {name: jnp.asarray(row) for name in ("tokens", "segment_ids", "patch_segments")}
    batch |= {"positions": jnp.arange(length)[None], "text_weights": jnp.ones((1, length))}
    batch |= {"audio_index": jnp.asarray(row), "audio_weights": jnp.ones((1, 1, 8))}
    found = jax.jit(count_batch)(batch)
    assert float(found["causal_pairs"]) == pytest.approx(length * (length + 1) / 2, rel=1e-6)
    assert float(found["patch_pairs"]) == pytest.approx(length**2, rel=1e-6)


def test_branches_are_the_sums_of_their_parts(omni):
    counts = {name: value / 2 for name, value in whole_attention(omni).items()}
    trainable = ["llm.embedding", "llm.head"]
    parts, branches = (
        flops_by_term(omni_terms(omni), counts, trainable),
        flops_by_branch(omni_terms(omni), counts, trainable),
    )
    for branch, total in branches.items():
        assert total == pytest.approx(sum(value for name, value in parts.items() if name.startswith(branch)))
    assert set(branches) == {"llm", "vision", "audio"}


def test_a_larger_model_counts_its_own_sizes(omni):
    """Only what depends on the changed size changes, in proportion."""
    counts = whole_attention(omni)
    deeper = replace(omni, llm=replace(omni.llm, num_layers=2 * omni.llm.num_layers))
    small, large = (flops_by_term(omni_terms(cfg), counts, ()) for cfg in (omni, deeper))
    changed = {name: large[name] / small[name] for name in small if large[name] != small[name]}
    assert changed == {"llm layers linear": 2.0, "llm layers attention": 2.0}


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("TPU v5", "v5p"),
        ("TPU v5 lite", "v5e"),
        ("TPU v6 lite", "v6e"),
        ("TPU7x", "tpu7x"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA A100-SXM4-40GB", "A100 40GB"),
    ],
)
def test_chips_by_kind(kind, name):
    assert chip_of(kind).name == name


def test_an_unknown_chip_has_no_peak():
    assert peak_flops("cpu") is None
    assert peak_flops("TPU v5 lite") == 197e12
