"""A small language model, four texts, and their logits with a cache and without, on whatever mesh is set."""

from collections.abc import Sequence
from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import reshard

from baichuan_omni_jax.config import tiny
from baichuan_omni_jax.config.architecture import LLMConfig
from baichuan_omni_jax.llm.kv_cache import KVCache
from baichuan_omni_jax.llm.model import LanguageModel
from baichuan_omni_jax.nn.param import ComputePolicy, named_variables, with_values
from baichuan_omni_jax.sharding import parameter_sharding

LENGTH, STEPS = 20, 6
SIZES = {"num_layers": 2, "vocab_size": 96, "hidden_size": 64, "head_dim": 16, "intermediate_size": 96}
TOKENS = np.random.default_rng(0).integers(0, SIZES["vocab_size"], (4, 16), dtype=np.int32)
# Items of each text that a prefill takes; the next ones are decoded one by one.
PROMPTS = np.array([9, 6, 3, 1])
FAST_TO_COMPILE = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
ROWS = np.arange(len(TOKENS))


def small_llm(**changes) -> LanguageModel:
    """Random weights for the mesh that is set; norm scales around 1, biases around 0."""
    cfg = LLMConfig(**{**vars(tiny().llm), **SIZES, **changes})
    compute, mesh = ComputePolicy(attention_block=8, remat="none"), jax.sharding.get_mesh()
    abstract, rng = jax.eval_shape(lambda: LanguageModel(jax.random.key(0), cfg, compute)), np.random.default_rng(1)

    def draw(name: str, variable) -> jax.Array:
        value = np.float32(0.15) * rng.standard_normal(variable.shape, np.float32) + name.endswith("scale")
        return jax.device_put(value, parameter_sharding(mesh, compute.rules, variable, name))

    return with_values(abstract, {name: draw(name, variable) for name, variable in named_variables(abstract).items()})


@partial(jax.jit, compiler_options=FAST_TO_COMPILE)
def recompute(llm: LanguageModel, tokens: jax.Array) -> jax.Array:
    """Logits of whole rows, without a cache."""
    tokens = reshard(tokens, llm.compute.rules.spec("batch", "length"))
    positions = tokens * 0 + jnp.arange(tokens.shape[1])
    return llm.logits(llm(llm.embed(tokens), positions, tokens * 0 + 1))


@partial(jax.jit, compiler_options=FAST_TO_COMPILE)
def _step(model: LanguageModel, cache: KVCache, tokens: jax.Array, positions: jax.Array) -> tuple[jax.Array, KVCache]:
    hidden, cache = model(model.embed(tokens), positions, cache=cache)
    return model.logits(hidden), cache


def step(model: LanguageModel, cache: KVCache, tokens: np.ndarray, positions: np.ndarray) -> tuple[np.ndarray, KVCache]:
    """Logits of the next items of each row, and the cache with them."""
    logits, cache = _step(model, cache, tokens, positions.astype(np.int32))
    return np.asarray(logits), cache


def decode(model: LanguageModel, cache: KVCache, parts: Sequence[int]) -> tuple[np.ndarray, np.ndarray, KVCache]:
    """Logits (b, t, v) of `TOKENS`, where they were computed (b, t), and the cache.

    `parts`: how many items each call of the prefill takes of every text; those beyond its prompt are padding.
    """
    logits, known = np.zeros((*TOKENS.shape, SIZES["vocab_size"]), np.float32), np.zeros(TOKENS.shape, bool)
    starts = np.cumsum([0, *parts])
    calls = [np.broadcast_to(np.arange(a, b), (len(ROWS), b - a)) for a, b in pairwise(starts)]
    calls = [np.where(items < PROMPTS[:, None], items, -1) for items in calls]
    for positions in [*calls, *(PROMPTS[:, None] + n for n in range(STEPS))]:
        tokens = np.take_along_axis(TOKENS, np.maximum(positions, 0), 1)
        made, cache = step(model, cache, tokens, positions)
        row, item = np.nonzero(positions >= 0)
        logits[row, positions[row, item]] = made[row, item]
        known[row, positions[row, item]] = True
    return logits, known, cache


def distance(ours: np.ndarray, reference: np.ndarray) -> float:
    ours, reference = np.asarray(ours, np.float64), np.asarray(reference, np.float64)
    assert ours.shape == reference.shape, (ours.shape, reference.shape)
    return float(np.abs(ours - reference).max() / np.abs(reference).max())
