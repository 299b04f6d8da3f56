"""The language model with a cache against whole rows computed again; logits to 1e-4 where nothing else is said."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from baichuan_omni_jax.llm.decode_layout import DECODE_LAYOUT
from baichuan_omni_jax.llm.kv_cache import KVCache, init_cache
from baichuan_omni_jax.llm.model import LanguageModel
from baichuan_omni_jax.nn.param import named_values
from tests.helpers.decoding import LENGTH, PROMPTS, ROWS, STEPS, TOKENS, decode, distance, recompute, small_llm, step
from tests.helpers.micro import one_device


@pytest.fixture(scope="module", autouse=True)
def _mesh():
    with jax.set_mesh(one_device()), jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module")
def llm(_mesh):
    return small_llm()


@pytest.fixture(scope="module")
def model(llm):
    return llm.to_decode_layout()


@pytest.fixture(scope="module")
def expected(llm):
    return np.asarray(recompute(llm, TOKENS))


def empty(model: LanguageModel, dtype=jnp.float32) -> KVCache:
    return init_cache(model.cfg, len(ROWS), LENGTH, dtype, model.compute)


def filled(model: LanguageModel) -> KVCache:
    return decode(model, empty(model), (10,))[-1]


def assert_same(ours: KVCache, cache: KVCache) -> None:
    jax.tree.map(np.testing.assert_array_equal, ours, cache)


@pytest.mark.parametrize("parts", [(10,), (5, 5), (1,) * 9], ids=["whole", "in two parts", "one by one"])
def test_logits_of_unequal_rows_equal_full_recomputation(model, expected, parts):
    logits, known, _ = decode(model, empty(model), parts)
    assert (known.sum(1) == PROMPTS + STEPS).all()
    assert distance(logits[known], expected[known]) < 1e-4


def test_the_training_layout_takes_a_cache_too(llm, expected):
    logits, known, _ = decode(llm, empty(llm), (10,))
    assert distance(logits[known], expected[known]) < 1e-4


def test_a_row_filled_again_does_not_see_what_it_held(model, expected):
    """Row 0 is freed and given text 1, while the others go on."""
    cache = filled(model)
    positions = np.full((len(ROWS), 5), -1)
    positions[0] = np.arange(5)
    logits, cache = step(model, cache, TOKENS[[1, 1, 2, 3], :5], positions)
    assert distance(logits[0], expected[1, :5]) < 1e-4
    text, at = np.array([1, 1, 2, 3]), np.array([5, *(PROMPTS + STEPS)[1:]])
    for n in range(3):
        logits, cache = step(model, cache, TOKENS[text, at + n][:, None], (at + n)[:, None])
        assert distance(logits[:, 0], expected[text, at + n]) < 1e-4


@pytest.mark.parametrize("items", [1, 5])
def test_padding_writes_nothing_and_comes_out_as_zeros(model, items):
    cache = filled(model)
    logits, after = step(model, cache, TOKENS[:, :items], np.full((len(ROWS), items), -1))
    assert not logits.any()
    assert_same(after, cache)


def test_positions_past_the_end_write_nothing(model):
    cache = filled(model)
    assert_same(step(model, cache, TOKENS[:, :1], np.full((len(ROWS), 1), LENGTH))[1], cache)


def test_bf16_stays_near_fp32(llm, expected):
    """To 4e-2; one rounding to bf16 is 4e-3."""
    model = llm.to_decode_layout(jnp.bfloat16)
    assert model.embed(jnp.asarray(TOKENS)).dtype == jnp.bfloat16
    logits, known, _ = decode(model, empty(model, jnp.bfloat16), (1,) * 9)
    assert 1e-4 < distance(logits[known], expected[known]) < 4e-2


def test_int8_cache_stays_near_fp32_in_less_than_a_third_of_the_bytes(model, expected):
    """To 4e-2; one rounding is 1/254 of the head's largest value."""
    cache = empty(model, jnp.int8)
    assert cache.bytes < empty(model).bytes / 3
    logits, known, _ = decode(model, cache, (10,))
    assert 1e-4 < distance(logits[known], expected[known]) < 4e-2


def test_the_decode_layout_holds_the_training_weights(llm, model):
    """Bit for bit: per key head, its query heads' projections, its key's and its value's; else a transposition."""
    decoded, cfg = {name: np.asarray(x) for name, x in named_values(model).items()}, llm.cfg
    stored = {name: np.asarray(x) for name, x in named_values(llm).items()}
    groups = cfg.num_heads // cfg.num_kv_heads
    for layer in range(cfg.num_layers):
        get = lambda name, layer=layer: stored[f"layers.{name}"][layer]  # noqa: E731
        q, k, v = (get(f"attention.{x}_proj.weight") for x in "qkv")
        rows = [
            head.T
            for n in range(cfg.num_kv_heads)
            for head in (*(q[:, n * groups + g] for g in range(groups)), k[:, n], v[:, n])
        ]
        expected = {
            "attention.qkv_proj.weight": np.concatenate(rows),
            "attention.o_proj.weight": get("attention.o_proj.weight").reshape(-1, cfg.hidden_size).T,
            **{f"mlp.{x}_proj.weight": get(f"mlp.{x}_proj.weight").T for x in ("gate", "up", "down")},
            **{f"{x}_norm.scale": get(f"{x}_norm.scale") for x in ("attention", "mlp")},
        }
        assert {*DECODE_LAYOUT, "attention_norm.scale", "mlp_norm.scale"} == {*expected, "attention.qkv_proj.bias"}
        for name, value in expected.items():
            np.testing.assert_array_equal(decoded[f"layers.{layer}.{name}"], value, err_msg=name)


def test_the_head_is_the_models_own_or_normed(llm, model):
    assert model.head[...].unsafe_buffer_pointer() == llm.head[...].unsafe_buffer_pointer()
    normed = small_llm(use_norm_head=True)
    hidden = jax.random.normal(jax.random.key(1), (2, 1, llm.cfg.hidden_size))
    assert distance(normed.to_decode_layout().logits(hidden), normed.logits(hidden)) < 1e-5
