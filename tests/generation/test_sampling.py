"""Drawing tokens: against the same rules written out in numpy, row by row."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baichuan_omni_jax.config import GenerationConfig, SamplingConfig
from baichuan_omni_jax.errors import ConfigError
from baichuan_omni_jax.generation.sampling import MAX_FAST_TOP_K, SamplingParams, key_data, sample
from tests.helpers.typecheck import unchecked

V = 100
ALL = np.ones((1, V), bool)
_run = jax.jit(sample)


def run(logits, seen_tokens, params, keys, steps, allowed=ALL):
    return _run(logits, seen_tokens, SamplingParams.from_settings(params), keys, np.asarray(steps, np.int32), allowed)


def kept_probabilities(logits: np.ndarray, seen_tokens: np.ndarray, params: SamplingConfig) -> np.ndarray:
    """The distribution that one row is drawn from, in double precision."""
    x = logits.astype(np.float64)
    x = np.where(seen_tokens, np.where(x > 0, x / params.repetition_penalty, x * params.repetition_penalty), x)
    order = np.argsort(-x, kind="stable")
    kept = np.zeros(len(x), bool)
    if params.temperature == 0:
        kept[order[0]] = True
        return kept.astype(float)
    p = np.exp((x - x.max()) / params.temperature)
    if params.top_k:
        p[order[params.top_k :]] = 0
    p /= p.sum()
    before = np.cumsum(p[order]) - p[order]
    kept[order[before < params.top_p]] = True
    return np.where(kept, p, 0) / p[kept].sum()


def rows_of(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    return 3 * rng.standard_normal((count, V)).astype(np.float32), rng.random((count, V)) < 0.2


def keys_of(seed: int, count: int) -> np.ndarray:
    return np.stack([key_data(key) for key in jax.random.split(jax.random.key(seed), count)])


samplings = st.builds(
    SamplingConfig,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.0]),
    top_k=st.sampled_from([0, 1, 5, MAX_FAST_TOP_K, MAX_FAST_TOP_K + 1, V, 10 * V]),
    top_p=st.sampled_from([0.05, 0.5, 0.85, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
)


@settings(max_examples=25)
@given(st.integers(0, 2**16), st.lists(samplings, min_size=4, max_size=4))
def test_draws_stay_within_the_kept_tokens_and_tell_the_model_s_probability(seed, params):
    rng = np.random.default_rng(seed)
    logits, seen_tokens = rows_of(rng, 4)
    tokens, logprobs = run(logits, seen_tokens, params, keys_of(seed, 4), range(4))
    log_p = logits - np.log(np.exp(logits.astype(np.float64)).sum(-1, keepdims=True))
    for row, token in enumerate(np.asarray(tokens)):
        assert kept_probabilities(logits[row], seen_tokens[row], params[row])[token] > 0
        assert abs(logprobs[row] - log_p[row, token]) < 1e-4


@pytest.mark.parametrize(
    "params",
    [
        SamplingConfig(temperature=0.8, top_k=20, top_p=0.85, repetition_penalty=1.1),
        SamplingConfig(temperature=1.0),
        SamplingConfig(temperature=1.5, top_p=0.7),
    ],
)
def test_draws_come_as_often_as_their_probability_says(params):
    logits, seen_tokens = (np.repeat(x, 4, 0) for x in rows_of(np.random.default_rng(3), 1))
    keys, n = np.repeat(keys_of(0, 1), 4, 0), 4000
    tokens = [run(logits, seen_tokens, [params] * 4, keys, range(step, step + 4))[0] for step in range(0, n, 4)]
    expected = kept_probabilities(logits[0], seen_tokens[0], params)
    found = np.bincount(np.concatenate(tokens), minlength=V) / n
    # Five standard deviations of a share of n draws; of rare tokens three draws more.
    assert (np.abs(found - expected) <= 5 * np.sqrt(expected * (1 - expected) / n) + 3 / n).all()
    assert not found[expected == 0].any()


@pytest.mark.parametrize(
    "change",
    [
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": float("inf")},
    ],
)
def test_settings_that_cannot_be_drawn_by_are_refused(change):
    with pytest.raises(ConfigError, match="finite"):
        SamplingConfig(**change)


@pytest.mark.parametrize("stop", ["###", ("",), (3,)])
def test_stop_strings_are_strings_and_not_empty(stop):
    with unchecked(), pytest.raises(ConfigError, match="must be a tuple of strings"):
        GenerationConfig(stop=stop)


def test_a_draw_depends_on_its_own_row_alone():
    rng = np.random.default_rng(5)
    logits, seen_tokens = rows_of(rng, 4)
    keys, steps = keys_of(1, 4), np.array([7, 7, 8, 9])
    params = [
        SamplingConfig(temperature=1.0, top_k=5),
        SamplingConfig(temperature=1.0),
        SamplingConfig(),
        SamplingConfig(temperature=2.0, top_k=70),
    ]
    together = np.asarray(run(logits, seen_tokens, params, keys, steps)[0])
    for row in range(4):
        others = [params[row]] + [SamplingConfig(temperature=1.0, top_p=0.5)] * 3
        order = [row, *(i for i in range(4) if i != row)]
        again = run(logits[order], seen_tokens[order], others, keys[order], steps[order])[0]
        assert int(again[0]) == together[row]


def test_what_is_not_allowed_is_never_chosen_and_ties_take_the_first():
    logits, none_held = np.zeros((4, V), np.float32), np.zeros((4, V), bool)
    allowed = np.arange(V)[None] >= 3
    params = [SamplingConfig(), SamplingConfig(temperature=1.0, top_k=1)] * 2
    tokens, _ = run(logits, none_held, params, keys_of(0, 4), range(4), allowed)
    assert np.asarray(tokens).tolist() == [3] * 4
