"""The conversion tables give every parameter the values that a mapping spelled out by hand gives it."""

import jax
import numpy as np
import pytest

from baichuan_omni_jax.checkpoint import abstract_branches
from baichuan_omni_jax.config import MeshConfig
from baichuan_omni_jax.config.vocoder import read_vocoder_config
from baichuan_omni_jax.convert import SafetensorsFile, branch_rules, load_branch_from_safetensors
from baichuan_omni_jax.nn.param import named_values
from baichuan_omni_jax.sharding import make_mesh
from tests.helpers import golden_decoders, golden_weights
from tests.helpers.golden import golden_path

ORACLES = {
    "vision": golden_weights.vision,
    "audio_encoder": golden_weights.audio_tokenizer,
    "audio_head": golden_weights.audio_head,
    "llm": golden_weights.language_model,
    "audio_decoder": golden_decoders.audio_decoder,
    "flow": golden_decoders.flow,
    "vocoder": golden_decoders.vocoder,
}


@pytest.mark.parametrize("branch", ORACLES)
def test_values_equal_those_mapped_by_hand(branch: str) -> None:
    file = "vocoder" if branch == "vocoder" else "model"
    weights = SafetensorsFile(golden_path(f"omni_a/{file}.safetensors"))
    cfg, sizes = golden_weights.golden_config(), read_vocoder_config(golden_path("omni_a/vocoder_config.json"))
    abstract = abstract_branches(cfg, sizes, only=[branch])[branch]
    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
        module = load_branch_from_safetensors(weights, branch_rules(cfg, sizes)[branch], abstract)
    expected = ORACLES[branch](golden_weights.golden_arrays(file), sizes if branch == "vocoder" else cfg)
    found = named_values(module)
    assert set(found) == set(expected)
    for name, value in expected.items():
        np.testing.assert_array_equal(np.asarray(found[name]), value, err_msg=name)
