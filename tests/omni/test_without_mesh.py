"""The whole model on one device where no mesh is set: what a user's own program gets."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from baichuan_omni_jax.config import tiny
from baichuan_omni_jax.nn.param import split_as
from baichuan_omni_jax.omni.model import OmniModel
from tests.helpers.micro import one_device
from tests.helpers.untrained import AUDIO, COMPUTE, KEY, VISION, untrained

LLM = dataclasses.replace(
    tiny().llm,
    hidden_size=32,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=16,
    intermediate_size=32,
)
CFG = dataclasses.replace(
    tiny(),
    llm=LLM,
    audio=AUDIO,
    vision=dataclasses.replace(VISION, depth=1, out_dim=32),
    audio_head=dataclasses.replace(tiny().audio_head, num_layers=1, head_dim=16),
)
# A document of 20 tokens with an image of two visual tokens and two code frames, and one of 8; 4 places of padding.
LENGTH = 32
BATCH = {
    "tokens": np.arange(LENGTH)[None] % 40,
    "positions": np.array([[*range(20), *range(8), 0, 0, 0, 0]]),
    "segment_ids": np.array([[1] * 20 + [2] * 8 + [0] * 4]),
    "patch_grid": np.stack(np.divmod(np.arange(8), 2), -1)[None],
    "patch_segments": np.ones((1, 8)),
    "visual_index": np.array([[2, 3]]),
    "audio_codes": np.array([[[1, 2], [3, 4], [0, 0]]]),
    "audio_index": np.array([[6, 7, LENGTH]]),
    "audio_targets": np.array([[[1, 2], [3, 4], [0, 0]]]),
    "audio_target_index": np.array([[5, 6, LENGTH]]),
}


@pytest.mark.usefixtures("exact")
def test_a_mesh_of_one_device_changes_nothing(rng):
    model = untrained(lambda: OmniModel(KEY, CFG, COMPUTE))
    batch = {name: jnp.asarray(values, jnp.int32) for name, values in BATCH.items()}
    batch["patches"] = jnp.asarray(rng.integers(0, 256, (1, 8, VISION.patch_values)), jnp.uint8)
    run = jax.jit(lambda model, batch: model(batch))
    plain, frames = run(model, batch)
    with jax.set_mesh(one_device()):
        by_token = ("tokens", "positions", "segment_ids")
        placed = {
            name: split_as(values, COMPUTE, "batch", "length" if name in by_token else "media")
            for name, values in batch.items()
        }
        meshed, meshed_frames = run(model, placed)
    np.testing.assert_allclose(plain, meshed, rtol=0, atol=1e-5)
    for ours, theirs in zip(frames, meshed_frames, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)
