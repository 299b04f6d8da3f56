"""Model FLOPs of a training step: what the mathematics asks for, counted from what the batch really holds.

A matrix product of m multiply-adds is 2 m FLOPs; norms, activations, softmax, rotary angles and table look-ups are left
out. Padding costs nothing, attention costs what each document or picture sees, and logits are counted where the loss
reads them. The backward pass adds 2 m for each trainable weight, 2 m where a gradient passes through to something
trainable before it (a stack of layers is taken as one: if any of it trains, gradients pass through all of it), and
8 h instead of 4 h FLOPs a pair of attention. Recomputation is not counted: this is what MFU divides by.

    document of 3 tokens: 3 tokens, 1 + 2 + 3 = 6 causal pairs; picture of 4 patches: 4 patches, 16 pairs
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from baichuan_omni_jax.branches import BRANCHES
from baichuan_omni_jax.config import OmniConfig
from baichuan_omni_jax.omni.batch import Batch

# Counted on the host, or on device.
Number = int | float | Float[Array, ""]


class Part(NamedTuple):
    """Matrix products that work on the same items.

    `weights`: multiply-adds an item of `items` (a count, times `per_item`), by the weight's path; `attention`:
    multiply-adds a pair of `pairs`. `before`: path prefixes of what lies upstream, the part's own layers included.
    """

    branch: str
    name: str
    before: tuple[str, ...]
    items: str
    weights: dict[str, int]
    per_item: float = 1.0
    pairs: str = ""
    attention: int = 0


def step_counts(batch: Batch) -> dict[str, Float[Array, ""]]:
    """What a packed batch holds, on device, whatever mesh it is split over: fp32 sums, good to 1e-6.

    `tokens`, `patches`, `audio_frames` are real ones, `text_targets` positions with a text loss, `audio_targets` frames
    to predict (end frames too); `causal_pairs` (query, key) pairs of tokens, `patch_pairs` pairs of patches of one
    picture. Positions restart with each document, so token blocks may lie in any order; a picture's patches lie
    together, on one shard. Fields of a branch that the run lacks may be missing: their counts are 0.
    """
    count = lambda condition: condition.sum(dtype=jnp.float32)  # noqa: E731
    real = batch["segment_ids"] > 0
    found = dict.fromkeys(("patches", "patch_pairs", "audio_frames", "audio_targets"), jnp.zeros(()))
    found |= {
        "tokens": count(real),
        "causal_pairs": jnp.where(real, batch["positions"] + 1, 0).sum(dtype=jnp.float32),
        "text_targets": count(batch["text_weights"] > 0),
    }
    if "patch_segments" in batch:
        found["patches"] = count(batch["patch_segments"] > 0)
        found["patch_pairs"] = _squared_runs(batch["patch_segments"])
    if "audio_index" in batch:
        found["audio_frames"] = count(batch["audio_index"] < batch["tokens"].shape[1])
    if "audio_weights" in batch:
        found["audio_targets"] = count(batch["audio_weights"][:, :, 0] > 0)
    return found


def flops_by_branch(
    parts: Iterable[Part], counts: Mapping[str, Number], trainable: Collection[str]
) -> dict[str, Number]:
    """FLOPs of a step by the parts' branches: of a language-model step `vision` (tower, projector), `llm` and `audio`
    (depth transformer, its heads).

    `parts` and `counts` (of the whole global batch) are the task's; `trainable` names the parameters that train
    (`Setup.groups.trainable`); empty counts a forward pass alone.
    """
    total: dict[str, Number] = {}
    for part, (linear, attention) in _flops(parts, counts, trainable):
        total[part.branch] = total.get(part.branch, 0.0) + linear + attention
    return total


def flops_by_part(parts: Iterable[Part], counts: Mapping[str, Number], trainable: Collection[str]) -> dict[str, Number]:
    """As `flops_by_branch`, split further: `llm layers linear`, `llm layers attention`, `llm logits`, ..."""
    found: dict[str, Number] = {}
    for part, (linear, attention) in _flops(parts, counts, trainable):
        name = f"{part.branch} {part.name}"
        of_part = {f"{name} linear": linear, f"{name} attention": attention} if part.pairs else {name: linear}
        found |= {key: found.get(key, 0.0) + value for key, value in of_part.items()}
    return found


def omni_parts(omni: OmniConfig) -> tuple[Part, ...]:
    """Every matrix product of a language-model step, in the order in which data flows."""
    return (*_vision(omni), *language_parts(omni), *_audio(omni))


def _flops(parts, counts, trainable) -> Iterator[tuple[Part, tuple]]:
    """Per part, the FLOPs of its weights and those of its attention."""
    for part in parts:
        passes = any(name.startswith(part.before) for name in trainable)
        products = sum(size * (1 + passes + (name in trainable)) for name, size in part.weights.items())
        linear = 2 * products * part.per_item * counts[part.items]
        attention = 2 * part.attention * (1 + 2 * passes) * counts[part.pairs] if part.pairs else 0
        yield part, (linear, attention)


def _vision(omni: OmniConfig) -> tuple[Part, ...]:
    cfg, g = omni.vision, omni.vision.merged_patches
    d, f = cfg.embed_dim, cfg.embed_dim * cfg.mlp_ratio
    tower, projector = BRANCHES["vision"].path("tower"), BRANCHES["vision"].path("projector")
    attention = {f"attention.{x}_proj.weight": d * d for x in "qkvo"}
    layer = attention | {"mlp.fc1.weight": d * f, "mlp.fc2.weight": f * d}
    norm, fc1 = f"{projector}norm.", f"{projector}fc1."
    return (
        Part("vision", "patches", (), "patches", {f"{tower}patch_embedding.kernel": cfg.patch_values * d}),
        Part(
            "vision",
            "tower",
            (tower,),
            "patches",
            {f"{tower}layers.{name}": cfg.depth * size for name, size in layer.items()},
            pairs="patch_pairs",
            attention=cfg.depth * 2 * d,
        ),
        Part("vision", "projector in", (tower, norm), "patches", {f"{fc1}weight": (g * d) ** 2}, per_item=1 / g),
        Part(
            "vision",
            "projector out",
            (tower, norm, fc1),
            "patches",
            {f"{projector}fc2.weight": g * d * cfg.out_dim},
            per_item=1 / g,
        ),
    )


# What writes into the language model's stream, and the stream up to its last norm.
_LLM = BRANCHES["llm"]
_MEDIA = tuple(branch.path() + branch.stream for branch in BRANCHES.values() if branch.stream is not None)
_STREAM = (*_MEDIA, "llm.embedding", _LLM.path("layers"))
_HIDDEN = (*_STREAM, _LLM.path("norm"))


def language_parts(omni: OmniConfig) -> tuple[Part, ...]:
    """The language model's layers and logits."""
    cfg = omni.llm
    d, wide, narrow = cfg.hidden_size, cfg.num_heads * cfg.head_dim, cfg.num_kv_heads * cfg.head_dim
    layer = {
        f"attention.{x}_proj.weight": d * size for x, size in zip("qkvo", (wide, narrow, narrow, wide), strict=True)
    }
    layer |= {f"mlp.{x}_proj.weight": d * cfg.intermediate_size for x in ("gate", "up", "down")}
    return (
        Part(
            "llm",
            "layers",
            _STREAM,
            "tokens",
            {f"{_LLM.path('layers')}{name}": cfg.num_layers * size for name, size in layer.items()},
            pairs="causal_pairs",
            attention=cfg.num_layers * 2 * wide,
        ),
        Part("llm", "logits", _HIDDEN, "text_targets", {f"{_LLM.path()}head": d * cfg.vocab_size}),
    )


def _audio(omni: OmniConfig) -> tuple[Part, ...]:
    """The depth transformer: a frame is a sequence of one position a level, with as many pairs for every frame.

    An end frame, of which the loss reads level 0 alone, counts as a whole one.
    """
    d, sizes, layers = omni.llm.hidden_size, omni.audio.codebook_sizes, omni.audio_head.num_layers
    levels = len(sizes)
    layer = {f"attention.{x}_proj.weight": d * d for x in "qkvo"}
    layer |= {f"linear{i}.weight": 2 * d * d for i in (1, 2)}
    head = BRANCHES["audio_head"].path("head")
    return (
        Part(
            "audio",
            "depth",
            (*_HIDDEN, f"{head}layers."),
            "audio_targets",
            {f"{head}layers.{name}": layers * levels * size for name, size in layer.items()},
            pairs="audio_targets",
            attention=layers * (levels * (levels + 1) // 2) * 2 * d,
        ),
        Part(
            "audio",
            "logits",
            (*_HIDDEN, f"{head}layers.", f"{head}norm."),
            "audio_targets",
            {f"{head}heads.{q}.weight": d * (size + 1) for q, size in enumerate(sizes)},
        ),
    )


def _squared_runs(ids: Int32[Array, "b p"]) -> Float[Array, ""]:
    """Sum of n^2 over runs of n equal non-zero ids; the run of a patch is read on its own shard.

    ids [1 1 1 2 0]: places in their run 0 1 2 0, so 1 + 3 + 5 + 1 = 3^2 + 1^2
    """

    def local(ids):
        place = jnp.arange(ids.shape[1])
        starts = jnp.where(ids != jnp.roll(ids, 1, 1), place, 0)
        in_run = place - jax.lax.cummax(starts, axis=1)
        return jnp.where(ids > 0, 2 * in_run + 1, 0).astype(jnp.float32)

    sharding = jax.typeof(ids).sharding
    if not sharding.mesh.empty:
        local = jax.shard_map(local, mesh=sharding.mesh, in_specs=(sharding.spec,), out_specs=sharding.spec)
    return local(ids).sum()
