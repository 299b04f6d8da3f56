"""Every branch on a mesh of 8 devices against one device: outputs and parameter gradients. Prints one line a branch.

Run by tests/omni/test_model_sharding.py on 8 devices of the host platform; exits 1 on a difference.
"""

import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from baichuan_omni_jax.audio.encoder import AudioEncoderBranch
from baichuan_omni_jax.config import MeshConfig, tiny
from baichuan_omni_jax.llm.audio_head import AudioHeadBranch
from baichuan_omni_jax.llm.model import LanguageModel
from baichuan_omni_jax.nn.param import ComputePolicy, named_variables, with_values
from baichuan_omni_jax.sharding import ShardingRules, make_mesh, parameter_sharding
from baichuan_omni_jax.vision.model import VisionModel

# Compiling is nearly all of the time.
jax.config.update("jax_disable_most_optimizations", True)
TOLERANCE = 1e-5
CFG, COMPUTE, RULES = tiny(), ComputePolicy(attention_block=16), ShardingRules()
MESHES = (
    (MeshConfig(), slice(0, 1)),
    (MeshConfig(data=1, fsdp=2, context=2, tensor=2), slice(0, 8)),
)
MEDIA = ("batch", "media")
ROW = ("batch", "length")


def vision(rng: np.random.Generator):
    """Two rows of four quarters, one a shard: frames of 4x4 and 2x4 patches, padding in between."""
    quarters = np.array([[1] * 16 + [0] * 16, [2] * 16 + [3] * 8 + [0] * 8, [4] * 32, [0] * 32])
    ids = np.stack([quarters.reshape(-1), quarters[::-1].reshape(-1)]).astype(np.int32)
    inputs = (
        (rng.integers(0, 256, (*ids.shape, 588), np.uint8), MEDIA),
        (rng.integers(0, 6, (*ids.shape, 2)).astype(np.int32), MEDIA),
        (ids, MEDIA),
    )
    return lambda key: VisionModel(key, CFG.vision, COMPUTE), lambda model, *x: model(*x), inputs


def audio(rng: np.random.Generator):
    """Four clips, one of them an unused slot: features before and after the quantizer, and the codes."""
    mel = rng.standard_normal((4, 90, CFG.audio.num_mel_bins)).astype(np.float32)
    inputs = (mel, ("batch",)), (np.array([90, 37, 0, 64], np.int32), ("batch",))

    def run(model, mel, lengths):
        features, valid = model.features(mel, lengths)
        codes, quantized, _ = model.quantizer.quantize(features)
        decoded = model.quantizer.decode(codes)
        keep = valid[..., None]
        return tuple(jnp.where(keep, x, 0) for x in (features, codes.astype(jnp.float32), quantized, decoded))

    return lambda key: AudioEncoderBranch(key, CFG.audio, COMPUTE), run, inputs


def audio_head(rng: np.random.Generator):
    shape = (2, 8)
    hidden = rng.standard_normal((*shape, CFG.llm.hidden_size)).astype(np.float32)
    codes = np.stack([rng.integers(0, size, shape) for size in CFG.audio.codebook_sizes], -1).astype(np.int32)
    sizes = CFG.audio.codebook_sizes

    def run(model, hidden, codes):
        return model.embed(codes), *model(hidden, codes)

    make = lambda key: AudioHeadBranch(key, CFG.audio_head, sizes, CFG.llm.hidden_size, COMPUTE)  # noqa: E731
    return make, run, ((hidden, MEDIA), (codes, MEDIA))


def llm(rng: np.random.Generator):
    """Two rows of 64 with documents of several lengths, cut in blocks of 16 that lie in another order."""
    lengths = ((20, 30, 10), (5, 50))
    ids, positions = np.zeros((2, 64), np.int32), np.zeros((2, 64), np.int32)
    for row, documents in enumerate(lengths):
        start = 0
        for i, length in enumerate(documents):
            ids[row, start : start + length] = i + 1
            positions[row, start : start + length] = np.arange(length)
            start += length
    ids, positions = (x.reshape(2, 4, 16)[:, [2, 0, 3, 1]].reshape(2, 64) for x in (ids, positions))
    tokens = rng.integers(0, CFG.llm.vocab_size, (2, 64)).astype(np.int32)

    def run(model, tokens, positions, ids):
        hidden = model(model.embed(tokens), positions, ids)
        return jnp.where(ids[..., None] > 0, hidden, 0), jnp.where(ids[..., None] > 0, model.logits(hidden), 0)

    return lambda key: LanguageModel(key, CFG.llm, COMPUTE), run, tuple((x, ROW) for x in (tokens, positions, ids))


def draw(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """A parameter with no zeros to hide behind: biases too are random. numpy, because it compiles nothing."""
    return (name.endswith("scale") + 0.1 * rng.standard_normal(shape)).astype(np.float32)


def run_on(mesh, abstract, function: Callable, inputs) -> dict[str, np.ndarray]:
    """Outputs and the gradients of a fixed projection of them, as numpy arrays by name."""
    rng = np.random.default_rng(1)
    placed = {
        name: jax.device_put(draw(name, x.shape, rng), parameter_sharding(mesh, RULES, x, name))
        for name, x in named_variables(abstract).items()
    }
    model = with_values(abstract, placed)
    arrays = [
        jax.device_put(x, NamedSharding(mesh, RULES.spec(*names, *[None] * (x.ndim - len(names)))))
        for x, names in inputs
    ]

    @jax.jit
    def step(model, *arrays):
        def loss(model):
            outputs = jax.tree.leaves(function(model, *arrays))
            return sum((x * _pattern(x)).sum() for x in outputs) / len(outputs), outputs

        (_, outputs), gradients = jax.value_and_grad(loss, has_aux=True)(model)
        return outputs, gradients

    with jax.set_mesh(mesh), jax.default_matmul_precision("highest"):
        outputs, gradients = step(model, *arrays)
    results = {f"output {i}": np.asarray(x) for i, x in enumerate(outputs)}
    for name, gradient in named_variables(gradients).items():
        value = gradient[...]
        assert value.sharding.spec == placed[name].sharding.spec, f"gradient of {name}: {value.sharding.spec}"
        results[f"gradient of {name}"] = np.asarray(value)
    return results


def _pattern(x):
    """Fixed weights -6 .. 6, exact on any device."""
    place = sum(jax.lax.broadcasted_iota(jnp.int32, x.shape, i) * (2 * i + 3) for i in range(x.ndim))
    return jax.sharding.reshard((place % 13 - 6).astype(jnp.float32), jax.typeof(x).sharding.spec)


def main() -> int:
    failed = False
    for build in (vision, audio, audio_head, llm):
        make, function, inputs = build(np.random.default_rng(0))
        abstract = jax.eval_shape(make, jax.random.key(0))
        one, many = (
            run_on(make_mesh(config, jax.devices()[part]), abstract, function, inputs) for config, part in MESHES
        )
        # A gradient that is zero by symmetry (a key bias) is compared on the scale of the others.
        floor = 1e-2 * max(np.abs(x).max() for name, x in one.items() if name.startswith("gradient"))
        worst, name = max((_distance(many[name], one[name], floor), name) for name in one)
        print(f"{build.__name__}: {len(one)} arrays, largest difference {worst:.1e} ({name})", flush=True)
        failed |= not worst <= TOLERANCE
    return int(failed)


def _distance(value: np.ndarray, reference: np.ndarray, floor: float) -> float:
    return float(np.abs(value - reference).max() / max(np.abs(reference).max(), floor))


if __name__ == "__main__":
    sys.exit(main())
