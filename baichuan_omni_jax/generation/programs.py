"""The programs of the generating engine: images encoded, prompts prefilled, rows inserted, many decoding steps at once.

Rows of a batch are split over data x fsdp. Reading works on one row of every device, which goes by its number there;
what else the device holds goes on undisturbed.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int32, UInt8

from baichuan_omni_jax.config import SpecialTokens
from baichuan_omni_jax.generation.slots import OutputKind, SlotState, StepOutput, advance
from baichuan_omni_jax.llm.audio_head import AudioHeadBranch
from baichuan_omni_jax.llm.kv_cache import KVCache
from baichuan_omni_jax.llm.model import LanguageModel
from baichuan_omni_jax.nn.param import split_as
from baichuan_omni_jax.omni.merge import merge_media
from baichuan_omni_jax.vision.model import VisionModel
from data_pipelines.text.speech_segments import PieceTable


class DecodeModels(NamedTuple):
    """What a step computes with: the language model and, where the checkpoint has it, the audio head."""

    llm: LanguageModel
    audio_head: AudioHeadBranch | None


class EngineState(NamedTuple):
    """What all slots hold; every program takes it and gives it back. `hidden` is each row's last item's."""

    cache: KVCache
    hidden: Float[Array, "b d"]
    rows: SlotState


class Chunk(NamedTuple):
    """Up to t items of g prompts, one a device. `last` is the place of a prompt's last item, -1 where it is not here.

    `positions` are -1 at padding; `codes` count where `is_audio`; `visual_slots` is the position of a visual token,
    elsewhere the cache's length. Prompts of text alone have None for the three.
    """

    tokens: Int32[Array, "g t"]
    positions: Int32[Array, "g t"]
    last: Int32[Array, " g"]
    codes: Int32[Array, "g t q"] | None = None
    is_audio: Bool[Array, "g t"] | None = None
    visual_slots: Int32[Array, "g t"] | None = None


@jax.jit
def encode_images(
    vision: VisionModel,
    buffer: Float[Array, "g s d"],
    patches: UInt8[Array, "g p v"],
    grid: Int32[Array, "g p 2"],
    frames: Int32[Array, "g p"],
    slots: Int32[Array, "g n"],
) -> Float[Array, "g s d"]:
    """`buffer`, by position in the prompt, with the embeddings of each visual token at its slot (s: unused)."""
    rules = vision.compute.rules
    slots = split_as(slots, vision.compute, "batch", "media")
    return merge_media(buffer, [(vision(patches, grid, frames), slots)], rules)


@partial(jax.jit, donate_argnames="state")
def prefill(
    models: DecodeModels,
    state: EngineState,
    index: Int32[Array, ""],
    chunk: Chunk,
    buffer: Float[Array, "g s d"] | None,
) -> EngineState:
    """Row `index` of every device reads its part of a chunk. A row without items there stays as it is."""
    llm, audio_head = models
    x = llm.embed(chunk.tokens)
    chunk = jax.tree.map(lambda x: split_as(x, llm.compute, "batch"), chunk)
    rows = llm.compute.rules.spec("batch")
    if buffer is not None:
        buffer = split_as(buffer, llm.compute, "batch")
        x = _local(_place_media, (rows, rows, rows, P()), rows)(x, chunk, buffer, audio_head)
    specs = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, state.cache)
    part = _local(lambda whole, index: jax.tree.map(lambda x: _row(x, index), whole), (specs, P()), specs)(
        state.cache, index
    )
    hidden, part = llm(x, chunk.positions, cache=part)
    cache = _local(_put_rows, (specs, specs, P()), specs)(state.cache, part, index)
    last = _local(_last_hidden, (rows, rows, rows, P()), rows)(hidden, state.hidden, chunk.last, index)
    hidden = _local(_put_rows, (rows, rows, P()), rows)(state.hidden, last, index)
    return EngineState(cache, hidden, state.rows)


@partial(jax.jit, donate_argnames="rows")
def insert(rows: SlotState, slot: Int32[Array, ""], new: SlotState) -> SlotState:
    """Row `slot` begins anew as `new`, one row."""

    def put(old: Array, new: Array) -> Array:
        split = P(jax.typeof(old).sharding.spec[0])
        here = jax.sharding.reshard(jnp.arange(old.shape[0]) == slot, split)
        here = here.reshape(-1, *[1] * (old.ndim - 1), out_sharding=P(*split, *[None] * (old.ndim - 1)))
        return jnp.where(here, new, old)

    return jax.tree.map(put, rows, new)


@partial(jax.jit, static_argnames=("tokens", "size"), donate_argnames="state")
def decode_steps(
    models: DecodeModels,
    state: EngineState,
    alive: Bool[Array, " b"],
    steps: Int32[Array, ""],
    stop_early: Bool[Array, ""],
    table: PieceTable,
    *,
    tokens: SpecialTokens,
    size: int,
) -> tuple[EngineState, StepOutput, Int32[Array, " b"]]:
    """Up to `steps` (at most `size`) items of every active row: what they are (size, b, ..), and why rows ended.

    Ends before when no row is active, with `stop_early` when any row ends. Rows that are not `alive` are ended first.
    """
    llm, audio_head = models
    split = llm.compute.rules.spec("batch")
    rows = state.rows._replace(active=state.rows.active & split_as(alive, llm.compute, "batch"))
    started, b = rows.active, rows.active.shape[0]
    levels = rows.seen_codes.shape[1]
    step = _local(
        partial(_step, length=state.cache.length, tokens=tokens), (split, split, split, P(), P()), (split,) * 4
    )

    def go_on(carry):
        n, state, _ = carry
        ended = (started & ~state.rows.active).any()
        return (n < steps) & state.rows.active.any() & ~(stop_early & ended)

    def one_step(carry):
        n, state, log = carry
        rows, items, frames, positions = step(state.rows, _logits(llm, state), state.hidden, audio_head, table)
        is_frame = items.kind == OutputKind.FRAME
        x = llm.embed(items.token[:, None])
        if audio_head is not None:
            x = jnp.where(is_frame[:, None, None], frames[:, None].astype(x.dtype), x)
        hidden, cache = llm(x, positions[:, None], cache=state.cache)
        log = jax.tree.map(lambda log, item: log.at[n].set(item), log, items)
        return n + 1, EngineState(cache, hidden[:, 0].astype(state.hidden.dtype), rows), log

    empty = lambda dtype, *rest: jnp.zeros(  # noqa: E731
        (size, b, *rest), dtype, out_sharding=P(None, *split, *[None] * len(rest))
    )
    log = StepOutput(empty(jnp.int32), empty(jnp.int32), empty(jnp.float32), empty(jnp.int32, levels))
    _, state, log = jax.lax.while_loop(
        go_on, one_step, (jnp.int32(0), EngineState(state.cache, state.hidden, rows), log)
    )
    return state, log, state.rows.reason


def _step(
    rows: SlotState, logits: Array, hidden: Array, audio_head, table: PieceTable, *, length: int, tokens: SpecialTokens
):
    after, items = advance(rows, logits, hidden, audio_head, table, tokens, length)
    frames = (
        jnp.zeros(hidden.shape, hidden.dtype) if audio_head is None else audio_head.embed(items.codes[:, None])[:, 0]
    )
    return after, items, frames, jnp.where(after.active, rows.position, -1)


def _logits(llm: LanguageModel, state: EngineState) -> Array:
    """Of every row, whole on its device; zeros when no row is about to draw a token."""
    rows, split = state.rows, llm.compute.rules.spec("batch", None)
    wanted = (rows.active & ~rows.speaking & ~rows.turn).any()
    shape = (state.hidden.shape[0], rows.seen_tokens.shape[1])
    return jax.lax.cond(
        wanted,
        lambda: jax.sharding.reshard(llm.logits(state.hidden), split),
        lambda: jnp.zeros(shape, jnp.float32, out_sharding=split),
    )


def _place_media(x: Array, chunk: Chunk, buffer: Array, audio_head: AudioHeadBranch | None) -> Array:
    """Token embeddings (g, t, d) with those of code frames and of visual tokens in their places."""
    assert chunk.is_audio is not None
    assert chunk.codes is not None
    assert chunk.visual_slots is not None
    if audio_head is not None:
        x = jnp.where(chunk.is_audio[..., None], audio_head.embed(chunk.codes).astype(x.dtype), x)
    visual_slots = jax.vmap(lambda row, at: row.at[at].get(mode="fill", fill_value=0))(buffer, chunk.visual_slots)
    return jnp.where((chunk.visual_slots < buffer.shape[1])[..., None], visual_slots.astype(x.dtype), x)


def _row(x: Array, index: Array) -> Array:
    return jax.lax.dynamic_slice_in_dim(x, index, 1, 0)


def _put_rows(whole, part, index):
    return jax.tree.map(lambda x, y: jax.lax.dynamic_update_slice_in_dim(x, y, index, 0), whole, part)


def _last_hidden(hidden: Array, before: Array, last: Array, index: Array) -> Array:
    found = jnp.take_along_axis(hidden, jnp.maximum(last, 0)[:, None, None], 1)[:, 0]
    return jnp.where(last[:, None] < 0, _row(before, index), found.astype(before.dtype))


def _local(function: Callable, in_specs, out_specs) -> Callable:
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)
