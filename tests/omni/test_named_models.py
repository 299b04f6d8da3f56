"""The named models: their published sizes, and that each computes as it is described."""

import dataclasses
from collections import Counter

import jax
import numpy as np
import pytest

from baichuan_omni_jax.audio.encoder import AudioEncoderBranch
from baichuan_omni_jax.config import MODELS, OmniConfig
from baichuan_omni_jax.config.machines import language_parameters
from baichuan_omni_jax.config.model import TRAINED_TOKENS
from baichuan_omni_jax.nn.param import ComputePolicy, named_variables
from baichuan_omni_jax.omni.model import OmniModel
from tests.helpers.untrained import COMPUTE, KEY, untrained

# Billions of parameters that Qwen2.5 publishes, and whether its table of tokens is the head as well.
PUBLISHED = {
    "omni_0b5": (0.49, True),
    "omni_1b5": (1.54, True),
    "omni_3b": (3.09, True),
    "baichuan_omni_7b": (7.61, False),
    "omni_14b": (14.7, False),
}
# Millions of parameters of Whisper's encoder; 8.8, 30.7 and 63.7 % of a model with its text decoder.
WHISPER = {"omni_0b5": 87, "omni_1b5": 306, "omni_3b": 635, "baichuan_omni_7b": 635, "omni_14b": 635}


@pytest.mark.parametrize("name", PUBLISHED)
def test_language_models_have_the_published_sizes(name):
    omni = MODELS[name]()
    model = jax.eval_shape(lambda: OmniModel(KEY, omni, ComputePolicy()))
    counts = Counter()
    for path, variable in named_variables(model).items():
        counts[path.split(".")[0]] += variable.size
    published, tied = PUBLISHED[name]
    # Untying gives the head a table of its own.
    head = omni.llm.vocab_size * omni.llm.hidden_size
    assert counts["llm"] - tied * head == pytest.approx(published * 1e9, rel=0.01)
    assert counts["llm"] == language_parameters(omni.llm)


@pytest.mark.parametrize("name", PUBLISHED)
def test_audio_encoders_are_whispers(name):
    omni = MODELS[name]()
    branch = jax.eval_shape(lambda: AudioEncoderBranch(KEY, omni.audio, ComputePolicy()))
    encoder = sum(v.size for path, v in named_variables(branch).items() if path.startswith("encoder."))
    assert encoder == pytest.approx(WHISPER[name] * 1e6, rel=0.01)
    # The largest that is at most a fifth of the language model.
    assert encoder < language_parameters(omni.llm) / 5
    assert omni.flow.prenet_in_dim == omni.audio.d_model
    assert omni.audio.head_dim == 64


def depth_cut(omni: OmniConfig) -> OmniConfig:
    """One layer of each kind and a small vocabulary, all widths and heads as they are."""
    return dataclasses.replace(
        omni,
        vision=dataclasses.replace(omni.vision, depth=1),
        llm=dataclasses.replace(omni.llm, num_layers=1, vocab_size=128),
        audio=dataclasses.replace(omni.audio, codebook_sizes=(16, 8)),
        audio_head=dataclasses.replace(omni.audio_head, num_layers=1),
        tokens=TRAINED_TOKENS,
    )


def batch(patch_values: int) -> dict[str, np.ndarray]:
    """One document: an image of one visual token, a frame of audio heard and one to predict, and text."""
    rng = np.random.default_rng(0)
    row = lambda *values: np.array([values], np.int32)  # noqa: E731
    return {
        "tokens": rng.integers(0, 128, (1, 8)).astype(np.int32),
        "positions": row(*range(8)),
        "segment_ids": row(*[1] * 8),
        "patches": rng.integers(0, 256, (1, 4, patch_values)).astype(np.uint8),
        "patch_grid": np.array([[[0, 0], [0, 1], [1, 0], [1, 1]]], np.int32),
        "patch_segments": np.ones((1, 4), np.int32),
        "visual_index": row(1),
        "audio_codes": rng.integers(0, 8, (1, 1, 2)).astype(np.int32),
        "audio_index": row(4),
        "audio_targets": rng.integers(0, 8, (1, 1, 2)).astype(np.int32),
        "audio_target_index": row(6),
    }


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_size_traces(name):
    """Shapes alone: widths, heads and the parts' widths fit each other."""
    omni = depth_cut(MODELS[name]())
    inputs = batch(omni.vision.patch_values)
    hidden, *_ = jax.eval_shape(lambda batch: OmniModel(KEY, omni, COMPUTE)(batch), inputs)
    assert hidden.shape[-1] == omni.llm.hidden_size


def test_the_smallest_computes():
    omni = depth_cut(MODELS["omni_0b5"]())
    hidden, *_ = untrained(lambda: OmniModel(KEY, omni, COMPUTE))(batch(omni.vision.patch_values))
    assert np.isfinite(hidden).all()
    assert np.ptp(hidden, axis=-1).min() > 0
