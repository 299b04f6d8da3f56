"""Answers of the engine on one device and on meshes: prints `equal NAME` for each mesh whose answers are the same.

Run by test_engine_mesh.py with eight CPU devices.
"""

from dataclasses import replace

import jax
import numpy as np

from baichuan_omni_jax.config import GenerationConfig, MeshConfig
from baichuan_omni_jax.generation.engine import Engine
from baichuan_omni_jax.generation.events import GenerationResult
from baichuan_omni_jax.sharding import make_mesh
from tests.helpers.engine_prompts import media_prompt, random_text, small_branches, small_config, text_prompt, tokenizer

CFG = small_config()
ALOUD = replace(GenerationConfig(speech=True).greedy(), max_tokens=9, segment_tokens=4, segment_frames=5)
DRAWN = replace(GenerationConfig(speech=True), max_tokens=9, segment_tokens=4, segment_frames=5)
MESHES = {"data2_tensor2": MeshConfig(data=2, tensor=2), "data2_fsdp2_tensor2": MeshConfig(data=2, fsdp=2, tensor=2)}


def answers(config: MeshConfig) -> list[tuple]:
    """Texts, pictures and sound on the mesh's devices: tokens and codes, and the log-probabilities."""
    devices = config.data * config.fsdp * config.tensor
    branches = small_branches(make_mesh(config, jax.devices()[:devices]), CFG)
    engine = Engine(branches, CFG, tokenizer(), slots=8, length=64, chunk=32)
    rng, key = np.random.default_rng(0), jax.random.key(0)
    asked = [(random_text(rng, CFG, n), how) for n, how in ((3, ALOUD), (40, DRAWN), (17, ALOUD), (9, DRAWN))]
    asked += [(media_prompt(rng, CFG, pictures=sizes), ALOUD) for sizes in ((4,), (8, 4, 16))]
    asked += [(media_prompt(rng, CFG, mels=90), ALOUD), (text_prompt([70, CFG.tokens.audiogen_start]), DRAWN)]
    asked += asked[:3]
    requests = [engine.submit(prompt, how, key) for prompt, how in asked]
    return [GenerationResult.from_events(request) for request in requests]


def main() -> None:
    alone = answers(MeshConfig())
    for name, config in MESHES.items():
        pairs = list(zip(alone, answers(config), strict=True))
        for a, b in pairs:
            assert a.finished.sequence.tolist() == b.finished.sequence.tolist(), name
            assert [x.tolist() for x in a.speech] == [x.tolist() for x in b.speech], name
            np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-3)
        print("equal", name)


if __name__ == "__main__":
    main()
