"""The three Transformer branches against Hugging Face's Qwen2, Qwen2-VL and Whisper: an oracle that is not the goldens.

Random sizes and weights, fp32; values, gradients of the input and gradients of every weight. Weights (and gradients of
weights) come over by the project's own conversion tables, so these are tested too. Needs the extra `parity`.

The most seen of max|difference| / max|reference| (transformers 5.23 and torch 2.13 on CPU, jax 0.10.2):

                    values    gradient of the input    worst gradient of a weight
    Qwen2           1.8e-6    2.6e-6                   3.4e-6
    Qwen2-VL        9.4e-7    1.6e-6                   2.2e-6
    Whisper         7.1e-7    9.9e-7                   2.1e-6
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from baichuan_omni_jax.audio.encoder import AudioEncoder, sinusoids
from baichuan_omni_jax.config import MeshConfig, tiny
from baichuan_omni_jax.config.architecture import AudioConfig, AudioHeadConfig, LLMConfig, VisionConfig
from baichuan_omni_jax.convert import branch_rules, load_branch_from_safetensors
from baichuan_omni_jax.llm.model import LanguageModel
from baichuan_omni_jax.nn.param import ComputePolicy, named_values
from baichuan_omni_jax.sharding import make_mesh
from baichuan_omni_jax.vision.model import VisionModel
from tests.helpers.state_dicts import Arrays, Tensors

WHY = "the second oracle needs torch and transformers: pip install -e '.[test,parity]'"
torch = pytest.importorskip("torch", reason=WHY)
transformers = pytest.importorskip("transformers", reason=WHY)
qwen2_vl = pytest.importorskip("transformers.models.qwen2_vl.modeling_qwen2_vl", reason=WHY)
whisper = pytest.importorskip("transformers.models.whisper.modeling_whisper", reason=WHY)

# An epsilon of the norms ten times too large or small shows at 1.2e-5 to 2.5e-5.
TOLERANCE = 1e-5
COMPUTE = ComputePolicy(attention_block=32, remat="none")
KEY = jax.random.key(0)
SEEDS = (0, 1)
FAST_TO_COMPILE = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
EAGER = {"attn_implementation": "eager"}
# What `check` prints in any case.
VALUES = ("hidden", "logits", "tokens", "input gradient")


@contextmanager
def fp32_on_one_device() -> Iterator[None]:
    """Modules' shapes are made outside, where they are bound to no mesh, and filled and run inside."""
    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])), jax.default_matmul_precision("highest"):
        yield


@dataclass(frozen=True)
class Pair:
    """A model of theirs with random weights, and how tensors of its names become one of our modules."""

    theirs: "torch.nn.Module"
    convert: Callable[[Tensors], nnx.Module | dict[str, nnx.Module]]

    @functools.cached_property
    def ours(self):
        return self.convert({name: x.detach().numpy() for name, x in self._trained()})

    def gradients(self) -> Mapping[str, jax.Array]:
        """Their weights' gradients since the model was made, under our names."""
        return named_values(self.convert({name: x.grad.numpy() for name, x in self._trained()}))

    def _trained(self):
        return ((name, x) for name, x in self.theirs.named_parameters() if x.requires_grad)


def randomised(model, seed: int):
    """Matrices that keep their input's spread, norm scales around 1, biases around 0. Frozen tables stay."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, x in model.named_parameters():
            if not x.requires_grad:
                continue
            noise = torch.randn(x.shape, generator=generator)
            if x.dim() > 1:
                x.copy_(noise * x[0].numel() ** -0.5)
            else:
                x.copy_((1.0 if name.endswith("weight") else 0.0) + 0.2 * noise)
    return model.eval()


def renamed(tensors: Tensors, prefixes: Mapping[str, str]) -> Tensors:
    """Names of tensors with the first prefix that fits exchanged."""
    found = {name: next(p for p in prefixes if name.startswith(p)) for name in tensors}
    return {prefixes[p] + name.removeprefix(p): tensors[name] for name, p in found.items()}


def distance(ours, reference) -> float:
    ours, reference = np.asarray(ours), np.asarray(reference)
    assert ours.shape == reference.shape, (ours.shape, reference.shape)
    return float(np.abs(ours - reference).max() / np.abs(reference).max())


def check(ours: Mapping[str, object], theirs: Mapping[str, object], sizes: object) -> None:
    """Every tensor within the tolerance; prints the worst (`pytest -s` shows it)."""
    assert ours.keys() == theirs.keys()
    far = {name: distance(ours[name], theirs[name]) for name in ours}
    worst = max(far, key=far.get)
    print({name: f"{x:.1e}" for name, x in far.items() if name.startswith(VALUES) or name == worst})
    too_far = {name: x for name, x in far.items() if not x <= TOLERANCE}
    assert not too_far, (too_far, sizes)


def run_ours(forward: Callable, module, inputs: jax.Array, *others: jax.Array, weights: np.ndarray):
    """What `forward(module, inputs, *others)` returns, and the gradients of sum(weights * its last part)."""

    @functools.partial(jax.jit, compiler_options=FAST_TO_COMPILE)
    def run(module, inputs, weights, *others):
        def loss(module, inputs):
            values = forward(module, inputs, *others)
            spec = jax.typeof(values[-1]).sharding.spec
            return jnp.sum(values[-1] * jax.reshard(weights, spec)), values

        (_, values), gradients = jax.value_and_grad(loss, (0, 1), has_aux=True)(module, inputs)
        return values, gradients

    values, (gradients, by_input) = run(module, inputs, weights, *others)
    return [np.asarray(x) for x in values], named_values(gradients), np.asarray(by_input)


def placed(x: np.ndarray, *axes: str | None) -> jax.Array:
    return jax.device_put(x, jax.NamedSharding(jax.sharding.get_mesh(), COMPUTE.rules.spec(*axes)))


# ---------------------------------------------------------------- language model


def qwen2(seed: int) -> tuple[Pair, LLMConfig, np.random.Generator]:
    """3 KV heads; Q, K and V apart, which is Qwen2's form of the checkpoint."""
    rng = np.random.default_rng(seed)
    heads, head_dim = 3 * int(rng.integers(2, 5)), int(rng.choice([24, 32, 40]))
    llm = LLMConfig(
        vocab_size=int(rng.integers(300, 400)),
        hidden_size=heads * head_dim,
        num_layers=int(rng.integers(3, 6)),
        num_heads=heads,
        num_kv_heads=3,
        head_dim=head_dim,
        intermediate_size=int(rng.integers(300, 800)),
        qkv_pack=False,
    )
    small = tiny()
    head, vision = AudioHeadConfig(head_dim=head_dim), replace(small.vision, out_dim=llm.hidden_size)
    cfg = replace(small, llm=llm, audio_head=head, vision=vision)
    theirs = transformers.Qwen2Config(
        vocab_size=llm.vocab_size,
        hidden_size=llm.hidden_size,
        num_hidden_layers=llm.num_layers,
        num_attention_heads=llm.num_heads,
        num_key_value_heads=llm.num_kv_heads,
        intermediate_size=llm.intermediate_size,
        rms_norm_eps=llm.norm_eps,
        rope_theta=llm.rope_theta,
        tie_word_embeddings=False,
        **EAGER,
    )
    abstract = jax.eval_shape(lambda: LanguageModel(KEY, llm, COMPUTE))
    rules = branch_rules(cfg)["llm"]
    model = randomised(transformers.Qwen2ForCausalLM(theirs), seed)
    return Pair(model, lambda w: load_branch_from_safetensors(Arrays(w), rules, abstract)), llm, rng


def run_qwen2(model, tokens: np.ndarray, ids: np.ndarray, positions: np.ndarray, weights: np.ndarray) -> Tensors:
    """Their values and input gradient at real tokens (ids > 0), one after the other."""
    tokens, mask, positions = (torch.from_numpy(x).long() for x in (tokens, ids > 0, positions))
    embedded = model.get_input_embeddings()(tokens)
    embedded.retain_grad()
    out = model(inputs_embeds=embedded, attention_mask=mask, position_ids=positions, output_hidden_states=True)
    (out.logits * torch.from_numpy(weights)).sum().backward()
    values = {"hidden": out.hidden_states[-1], "logits": out.logits, "input gradient": embedded.grad}
    return {name: x.detach()[mask == 1].numpy() for name, x in values.items()}


@pytest.mark.parametrize("seed", SEEDS)
def test_language_model(seed):
    """Four rows of ours: three of a left-padded batch of theirs, and one that packs documents they see one by one."""
    pair, llm, rng = qwen2(seed)
    length = int(rng.integers(60, 90))
    mask = (np.arange(length) >= np.array([[0], [1], [length // 2]])).astype(np.int32)
    documents = [length // 2 - 3, 1, length // 2 - 8]
    spans = [slice(end - size, end) for size, end in zip(documents, np.cumsum(documents), strict=True)]
    ids, positions = np.zeros((2, 4, length), np.int32)
    ids[:3], positions[:3] = mask, mask.cumsum(1) * mask
    for i, span in enumerate(spans):
        ids[3, span], positions[3, span] = i + 1, np.arange(span.stop - span.start)
    tokens = rng.integers(0, llm.vocab_size, ids.shape).astype(np.int32)
    weights = rng.normal(size=(*ids.shape, llm.vocab_size)).astype(np.float32) * (ids > 0)[..., None]

    everything = (tokens, ids, positions, weights)
    theirs = [run_qwen2(pair.theirs, *(x[:3] for x in everything))]
    theirs += [run_qwen2(pair.theirs, *(x[3:, span] for x in everything)) for span in spans]

    def forward(model, shift, tokens, positions, ids):
        hidden = model(model.embed(tokens) + shift, positions, ids)
        return hidden, model.logits(hidden)

    with fp32_on_one_device():
        rows = [placed(x, "batch", "length") for x in (tokens, positions, ids)]
        nothing = placed(np.zeros((*ids.shape, llm.hidden_size), np.float32), "batch", "length", "act_embed")
        (hidden, logits), gradients, by_input = run_ours(forward, pair.ours, nothing, *rows, weights=weights)
        reference = pair.gradients()
    np.testing.assert_array_equal(by_input[ids == 0], 0)
    ours = dict(zip(theirs[0], (hidden[ids > 0], logits[ids > 0], by_input[ids > 0]), strict=True))
    check(
        {**ours, **gradients}, {**{name: np.concatenate([x[name] for x in theirs]) for name in ours}, **reference}, llm
    )


# ---------------------------------------------------------------- vision tower and projector


def patch_places(images: np.ndarray, merge: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """(row, column) and frame id, from 1, of every patch of images (frames, height, width), 2x2 neighbors together."""
    places, ids = [], []
    for frames, height, width in images:
        for _ in range(frames):
            rows, columns = np.indices((height // merge, width // merge)).reshape(2, -1, 1) * merge
            within = np.indices((merge, merge)).reshape(2, 1, -1)
            places.append(np.stack([rows + within[0], columns + within[1]], -1).reshape(-1, 2))
            ids.append(np.full(height * width, len(ids) + 1))
    return np.concatenate(places), np.concatenate(ids)


@pytest.mark.parametrize("seed", SEEDS)
def test_vision_tower_and_projector(seed):
    rng = np.random.default_rng(seed)
    heads, head_dim = int(rng.integers(3, 7)), int(rng.choice([16, 20, 32]))
    sizes = VisionConfig(
        depth=int(rng.integers(3, 6)),
        embed_dim=heads * head_dim,
        num_heads=heads,
        mlp_ratio=int(rng.integers(2, 5)),
        out_dim=128 * int(rng.integers(1, 3)),
    )
    config = qwen2_vl.Qwen2VLVisionConfig(
        depth=sizes.depth,
        embed_dim=sizes.embed_dim,
        num_heads=sizes.num_heads,
        mlp_ratio=sizes.mlp_ratio,
        hidden_size=sizes.out_dim,
        **EAGER,
    )
    cfg = replace(tiny(), vision=sizes, llm=replace(tiny().llm, hidden_size=sizes.out_dim))
    names = {"merger.": "model.visual_bridge_model.", "": "model.visual_model."}
    abstract, rules = jax.eval_shape(lambda: VisionModel(KEY, sizes, COMPUTE)), branch_rules(cfg)["vision"]
    model = randomised(qwen2_vl.Qwen2VisionTransformerPretrainedModel(config), seed)
    pair = Pair(model, lambda w: load_branch_from_safetensors(Arrays(renamed(w, names)), rules, abstract))

    # A still, a strip of odd visual tokens, two slices of a video, and the smallest image.
    images = np.array([[1, 6, 10], [1, 2, 2 * int(rng.integers(4, 12)) + 2], [2, 10, 6], [1, 2, 2]])
    grid, ids = patch_places(images)
    count, padding = len(ids), -len(ids) % 16 + 16
    pixels = rng.normal(size=(count, 2 * sizes.patch_values)).astype(np.float32)
    weights = rng.normal(size=(count // 4, sizes.out_dim)).astype(np.float32)

    seen = {}
    model.merger.register_forward_hook(lambda _, args, out: seen.update(hidden=args[0], tokens=out))
    given = torch.from_numpy(pixels).requires_grad_()
    model(given, grid_thw=torch.from_numpy(images))
    (seen["tokens"] * torch.from_numpy(weights)).sum().backward()
    theirs = {name: x.detach().numpy() for name, x in seen.items()} | {"input gradient": given.grad.numpy()}

    def pad(x, value=0):
        return np.pad(x, ((0, padding), *[(0, 0)] * (x.ndim - 1)), constant_values=value)[None]

    with fp32_on_one_device():
        rows = ("batch", "media")
        grid, ids = placed(pad(grid.astype(np.int32)), *rows, None), placed(pad(ids.astype(np.int32)), *rows)

        def forward(model, pixels, grid, ids):
            hidden = model.tower(pixels, grid, ids)

            return hidden, model.projector(hidden)

        weights = np.pad(weights, ((0, padding // 4), (0, 0)))[None]
        values, gradients, by_input = run_ours(
            forward, pair.ours, placed(pad(pixels, 3.0), *rows, None), grid, ids, weights=weights
        )
        np.testing.assert_array_equal(by_input[0, count:], 0)
        ours = {
            "hidden": values[0][0, :count],
            "tokens": values[1][0, : count // 4],
            "input gradient": by_input[0, :count],
        }
        check({**ours, **gradients}, {**theirs, **pair.gradients()}, sizes)


# ---------------------------------------------------------------- audio encoder


@pytest.mark.parametrize("seed", SEEDS)
def test_audio_encoder(seed):
    """One batch of clips of different lengths; theirs takes only full windows, so each clip has a window of its own."""
    rng = np.random.default_rng(seed)
    heads, head_dim = int(rng.integers(3, 7)), int(rng.choice([16, 20, 32]))
    sizes = AudioConfig(
        num_mel_bins=int(rng.choice([80, 128])),
        d_model=heads * head_dim,
        encoder_layers=int(rng.integers(3, 6)),
        encoder_attention_heads=heads,
        encoder_ffn_dim=int(rng.integers(200, 500)),
    )
    longest = 2 * int(rng.integers(60, 90))
    lengths = [longest, 2 * int(rng.integers(10, 50)), longest - 2]

    def encoder(positions: int):
        config = transformers.WhisperConfig(
            num_mel_bins=sizes.num_mel_bins,
            d_model=sizes.d_model,
            encoder_layers=sizes.encoder_layers,
            encoder_attention_heads=heads,
            encoder_ffn_dim=sizes.encoder_ffn_dim,
            max_source_positions=positions,
            **EAGER,
        )
        return whisper.WhisperEncoder(config)

    cfg = replace(tiny(), audio=sizes)
    rules = [
        rule for rule in branch_rules(cfg)["audio_encoder"] if any(x.startswith("encoder.") for x in rule.parameters)
    ]
    abstract = jax.eval_shape(lambda: {"encoder": AudioEncoder(KEY, sizes, COMPUTE)})
    names = {"": "audio_tokenizer.audio_model."}
    model = randomised(encoder(longest // 2), seed)
    pair = Pair(model, lambda w: load_branch_from_safetensors(Arrays(renamed(w, names)), rules, abstract))
    table = model.embed_positions.weight
    assert distance(sinusoids(*table.shape), table.detach()) <= TOLERANCE

    mel = np.full((3, longest, sizes.num_mel_bins), 5.0, np.float32)
    weights = np.full((3, longest // 2, sizes.d_model), 9.0, np.float32)
    theirs = {}
    for i, length in enumerate(lengths):
        mel[i, :length] = rng.normal(size=(length, sizes.num_mel_bins))
        weights[i, : length // 2] = rng.normal(size=(length // 2, sizes.d_model))
        window = encoder(length // 2).eval()
        # The clip's own window, but the weights, and where their gradients are summed, are the model's.
        for name, module in model.named_children():
            if name != "embed_positions":
                setattr(window, name, module)
        given = torch.from_numpy(mel[i : i + 1, :length]).requires_grad_()
        out = window(given.transpose(1, 2)).last_hidden_state
        (out * torch.from_numpy(weights[i, : length // 2])).sum().backward()
        theirs |= {f"hidden {i}": out[0].detach().numpy(), f"input gradient {i}": given.grad[0].numpy()}

    with fp32_on_one_device():
        counts = placed(np.array(lengths, np.int32), "batch")

        def forward(module, mel, counts):
            return (module["encoder"](mel, counts),)

        (hidden,), gradients, by_input = run_ours(
            forward, pair.ours, placed(mel, "batch", None, None), counts, weights=weights
        )
        ours = {}
        for i, length in enumerate(lengths):
            ours |= {f"hidden {i}": hidden[i, : length // 2], f"input gradient {i}": by_input[i, :length]}
            np.testing.assert_array_equal(by_input[i, length:], 0)
        check({**ours, **gradients}, {**theirs, **pair.gradients()}, sizes)
