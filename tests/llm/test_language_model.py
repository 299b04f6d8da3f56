"""The language model's options that no golden covers."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from baichuan_omni_jax.config import MeshConfig, tiny
from baichuan_omni_jax.llm.model import LanguageModel
from baichuan_omni_jax.nn.param import ComputePolicy
from baichuan_omni_jax.sharding import make_mesh


@pytest.mark.slow
def test_norm_head_divides_each_row_of_the_head_by_its_length():
    cfg = replace(tiny().llm, use_norm_head=True, num_layers=1, vocab_size=64)
    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
        model = LanguageModel(jax.random.key(0), cfg, ComputePolicy())
        hidden = jax.random.normal(jax.random.key(1), (1, 4, cfg.hidden_size))
        logits = model.logits(jax.device_put(hidden, jax.NamedSharding(jax.sharding.get_mesh(), jax.P())))
    rows = np.asarray(model.head[...], np.float64)
    expected = np.asarray(hidden, np.float64) @ (rows / np.linalg.norm(rows, axis=1, keepdims=True)).T
    assert np.abs(np.asarray(logits) - expected).max() / np.abs(expected).max() < 1e-5
