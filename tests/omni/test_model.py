"""The joined model as a library: from a checkpoint, on one device, without a mesh; packing does not show in it."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from baichuan_omni_jax.checkpoint import save_branches
from baichuan_omni_jax.config import tiny
from baichuan_omni_jax.errors import ConfigError
from baichuan_omni_jax.omni.model import OmniModel
from tests.helpers.untrained import COMPUTE, KEY, VISION, assert_close, untrained

T, LEVELS = 16, 2
CFG = dataclasses.replace(
    tiny(),
    llm=dataclasses.replace(
        tiny().llm, vocab_size=64, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8
    ),
    audio=dataclasses.replace(tiny().audio, codebook_sizes=(16, 8)),
    audio_head=dataclasses.replace(tiny().audio_head, num_layers=1, head_dim=32),
    vision=dataclasses.replace(VISION, out_dim=32),
)


def batch() -> dict[str, np.ndarray]:
    """Two documents a row: an image of four visual tokens and text; audio of three frames, and three to predict."""
    rng = np.random.default_rng(0)
    row = lambda *values: np.array([values], np.int32)  # noqa: E731
    grid = [[2 * y + dy, 2 * x + dx] for y in range(2) for x in range(2) for dy in range(2) for dx in range(2)]
    return {
        "tokens": rng.integers(0, 64, (1, T)).astype(np.int32),
        "positions": row(*range(8), *range(7), 0),
        "segment_ids": row(*[1] * 8, *[2] * 7, 0),
        "patches": rng.integers(0, 256, (1, 16, CFG.vision.patch_values)).astype(np.uint8),
        "patch_grid": np.array([grid], np.int32),
        "patch_segments": np.ones((1, 16), np.int32),
        "visual_index": row(1, 2, 3, 4),
        "audio_codes": rng.integers(0, 8, (1, 4, LEVELS)).astype(np.int32),
        "audio_index": row(9, 10, 11, T),
        "audio_targets": rng.integers(0, 8, (1, 3, LEVELS)).astype(np.int32),
        "audio_target_index": row(8, 9, 10),
    }


@pytest.fixture(scope="module")
def model():
    return untrained(lambda: OmniModel(KEY, CFG, COMPUTE))


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("omni") / "checkpoint"
    save_branches(folder, {name: getattr(model, name) for name in model.branches}, CFG)
    return folder


def test_from_a_checkpoint_without_a_mesh(model, checkpoint):
    loaded = OmniModel.from_checkpoint(checkpoint)
    assert loaded.branches == ("vision", "llm", "audio_head")
    hidden, audio_logits = loaded(batch())
    expected, expected_logits = model(batch())
    assert_close(hidden, expected)
    assert [level.shape for level in audio_logits] == [(1, 3, 17), (1, 3, 9)]
    for level, wanted in zip(audio_logits, expected_logits, strict=True):
        assert_close(level, wanted)
    assert loaded.llm.logits(hidden).shape == (1, T, 64)
    assert OmniModel.from_checkpoint(checkpoint, dtype="bfloat16").llm.embedding[...].dtype == jnp.bfloat16


@pytest.mark.usefixtures("exact")
def test_packing_isolation_a_document_s_media_do_not_show_in_the_next(model):
    """The image belongs to the first document, the audio to the second."""
    whole, other = batch(), batch()
    other["patches"] = 255 - other["patches"]
    first, changed = (np.asarray(model(given)[0]) for given in (whole, other))
    np.testing.assert_array_equal(changed[:, 8:15], first[:, 8:15])
    assert np.abs(changed[:, 1:8] - first[:, 1:8]).max() > 1e-3
    other = batch() | {"audio_codes": (whole["audio_codes"] + 1) % 8}
    changed = np.asarray(model(other)[0])
    np.testing.assert_array_equal(changed[:, :9], first[:, :9])
    assert np.abs(changed[:, 9:15] - first[:, 9:15]).max() > 1e-3


def test_a_checkpoint_without_a_language_model_is_refused(model, tmp_path):
    save_branches(tmp_path / "vision", {"vision": model.vision}, CFG)
    with pytest.raises(ConfigError, match="has no branch llm; it has vision"):
        OmniModel.from_checkpoint(tmp_path / "vision")
