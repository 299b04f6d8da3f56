"""Twenty steps of quantizer training on one device and on eight: prints the largest difference of the codebooks, and
of mels masked for the encoder.

Run by test_quantizer_mesh.py with eight CPU devices. Each clip lies in a region of its own, so on eight
devices most codes are used by one device alone: restarts must go by what the others see.
"""

import jax
import jax.numpy as jnp
import numpy as np

from baichuan_omni_jax.audio.mel_training import spec_augment
from baichuan_omni_jax.audio.quantizer_training import CodebookState, quantize_in_training
from baichuan_omni_jax.config import MeshConfig, QuantizerConfig, SpecAugmentConfig
from baichuan_omni_jax.nn.param import ComputePolicy
from baichuan_omni_jax.sharding import make_mesh

WIDTH, SIZES, STEPS = 16, (64, 32), 20
CONFIG = QuantizerConfig(decay=0.9, init_steps=3, restart_after=4, temperature=(0.2, 0.0), temperature_steps=10)
MASKS = SpecAugmentConfig(mask_time_prob=0.2, mask_feature_prob=0.2, mask_feature_length=2)
run = jax.jit(quantize_in_training, static_argnums=(5, 6))
mask = jax.jit(spec_augment, static_argnums=(3, 4))


def train(mesh: jax.sharding.Mesh) -> tuple[CodebookState, ...]:
    """The codebooks after all steps."""
    rng = np.random.default_rng(0)
    regions = 5 * rng.standard_normal((8, 1, WIDTH))
    with jax.set_mesh(mesh):
        zeros = lambda size: jnp.zeros((size, WIDTH))  # noqa: E731
        states = tuple(
            CodebookState(zeros(size), zeros(size), jnp.zeros(size), jnp.zeros(size, jnp.int32)) for size in SIZES
        )
        for step in range(STEPS):
            x = (regions + rng.standard_normal((8, 30, WIDTH))).astype(np.float32)
            valid = np.arange(30) < rng.integers(5, 31, (8, 1))
            key = jax.random.fold_in(jax.random.key(0), step)
            made = run(key, jnp.asarray(x), jnp.asarray(valid), states, jnp.int32(step), CONFIG, ComputePolicy())
            states = made.states
    return jax.tree.map(np.asarray, states)


def masked(mesh: jax.sharding.Mesh) -> np.ndarray:
    """Ones, but for what is masked."""
    with jax.set_mesh(mesh):
        lengths = jnp.arange(30, 38, dtype=jnp.int32)
        return np.asarray(mask(jax.random.key(0), jnp.ones((8, 40, WIDTH)), lengths, MASKS, ComputePolicy()))


def main() -> None:
    meshes = make_mesh(MeshConfig(), jax.devices()[:1]), make_mesh(MeshConfig(data=2, fsdp=4))
    one, eight = (train(mesh) for mesh in meshes)
    pairs = list(zip(jax.tree.leaves(one), jax.tree.leaves(eight), strict=True))
    print("largest", max(float(np.abs(a - b).max() / max(np.abs(a).max(), 1e-9)) for a, b in pairs))
    masks = [masked(mesh) for mesh in meshes]
    print("masks", float(np.abs(masks[0] - masks[1]).max()), float(masks[0].mean()))
    print("used", *(float((state.unused < CONFIG.restart_after).mean()) for state in eight))


if __name__ == "__main__":
    main()
