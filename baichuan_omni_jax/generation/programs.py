"""The device side of the generating engine: its programs, the models they compute with, and the state of all slots.

Four programs: images encoded, prompts prefilled, rows inserted, many decoding steps at once. Rows of a batch are split
over data x fsdp. Prefilling works on one row of every device, which goes by its number there; what else the device
holds goes on undisturbed. Nothing here knows of requests or threads.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int32, UInt8, UInt32

from baichuan_omni_jax.config import GenerationConfig, OmniConfig, SpecialTokens
from baichuan_omni_jax.errors import ConfigError
from baichuan_omni_jax.generation.events import Prompt
from baichuan_omni_jax.generation.prefill import Chunk, PromptAudioEncoder, chunk_sizes, count_programs, lay_out_images
from baichuan_omni_jax.generation.slots import OutputKind, SlotState, StepOutput, advance, idle_slots, init_slot
from baichuan_omni_jax.llm.audio_head import AudioHeadBranch
from baichuan_omni_jax.llm.kv_cache import KVCache, init_cache
from baichuan_omni_jax.llm.model import LanguageModel
from baichuan_omni_jax.nn.param import named_values, split_as
from baichuan_omni_jax.omni.merge import merge_media
from baichuan_omni_jax.sharding import axis_product
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


@jax.jit
def encode_images(
    vision: VisionModel,
    buffer: Float[Array, "g s d"],
    patches: UInt8[Array, "g p v"],
    grid: Int32[Array, "g p 2"],
    frames: Int32[Array, "g p"],
    slots: Int32[Array, "g n"],
) -> Float[Array, "g s d"]:
    """Encodes images and puts their embeddings where their tokens stand in the prompts.

    Args:
        vision: the branch `vision`.
        buffer: embeddings by position in the prompt, one prompt a device.
        patches: raw pixels of one temporal slice, v = 588 in released models.
        grid: row and column of each patch.
        frames: the image that a patch belongs to, from 1; 0 is padding.
        slots: the position of each visual token; s where there is none.

    Returns:
        The buffer with the images' embeddings in it.
    """
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
    """Reads a chunk of prompts into the cache, into one row of every device.

    Args:
        models: what computes it.
        state: of all slots; it is donated.
        index: the row, counted on each device. One whose chunk has no items stays as it is.
        chunk: the next items of each device's prompt.
        buffer: embeddings of the prompts' images by position; None for text alone.

    Returns:
        The state, the items' keys and values in the cache and a prompt's last hidden state in its row.
    """
    llm, audio_head = models
    x = llm.embed(chunk.tokens)
    chunk = jax.tree.map(lambda x: split_as(x, llm.compute, "batch"), chunk)
    rows = llm.compute.rules.spec("batch")

    # Embeddings: of tokens, then of code frames and images in their places.
    if buffer is not None:
        buffer = split_as(buffer, llm.compute, "batch")
        x = on_shards(place_media, (rows, rows, rows, P()), rows)(x, chunk, buffer, audio_head)

    # Row `index` is cut out of each device's part of the cache: the batch of this call is one row a device.
    specs = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, state.cache)
    part = on_shards(lambda whole, index: jax.tree.map(lambda x: _row(x, index), whole), (specs, P()), specs)(
        state.cache, index
    )
    hidden, part = llm(x, chunk.positions, cache=part)

    # And put back. A prompt that ends here leaves the state that its first answer's item is sampled from.
    cache = on_shards(_put_rows, (specs, specs, P()), specs)(state.cache, part, index)
    last = on_shards(_last_hidden, (rows, rows, rows, P()), rows)(hidden, state.hidden, chunk.last, index)
    hidden = on_shards(_put_rows, (rows, rows, P()), rows)(state.hidden, last, index)
    return EngineState(cache, hidden, state.rows)


@partial(jax.jit, donate_argnames="rows")
def insert(rows: SlotState, slot: Int32[Array, ""], new: SlotState) -> SlotState:
    """Puts `new`, one row, in the place of row `slot`."""

    def put(old: Array, new: Array) -> Array:
        split = P(jax.typeof(old).sharding.spec[0])
        # A select over all rows: they are split over devices, and the slot is known only when it runs.
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
    """Makes the next items of every active row, several of them in one program.

    Args:
        models: what computes them.
        state: of all slots; it is donated.
        alive: rows that are still wanted; the others are ended first.
        steps: how many items, at most `size`; fewer when no row is active any more.
        stop_early: ends when any row ends, since somebody waits for its slot.
        table: says where a segment of text ends.
        tokens: the special tokens.
        size: items that there is room for; static.

    Returns:
        The state; what was written (size, b, ..), `OutputKind.NONE` where nothing was; and why rows ended
        (`FinishReason`).
    """
    llm, audio_head = models
    split = llm.compute.rules.spec("batch")
    rows = state.rows._replace(active=state.rows.active & split_as(alive, llm.compute, "batch"))
    started, b = rows.active, rows.active.shape[0]
    levels = rows.seen_codes.shape[1]
    # Sampling is a row's own affair, so it runs where the row lies; the models' products run on the mesh.
    step = on_shards(
        partial(_step, length=state.cache.length, tokens=tokens), (split, split, split, P(), P()), (split,) * 4
    )

    def may_continue(carry):
        n, state, _ = carry
        ended = (started & ~state.rows.active).any()
        return (n < steps) & state.rows.active.any() & ~(stop_early & ended)

    def one_step(carry):
        n, state, log = carry
        # What comes next in each row: a token, a code frame, or a mark between text and speech.
        rows, items, frames, positions = step(state.rows, _logits(llm, state), state.hidden, audio_head, table)
        # Its embedding, through the language model: the state that the step after this one samples from.
        is_frame = items.kind == OutputKind.FRAME
        x = llm.embed(items.token[:, None])
        if audio_head is not None:
            x = jnp.where(is_frame[:, None, None], frames[:, None].astype(x.dtype), x)
        hidden, cache = llm(x, positions[:, None], cache=state.cache)
        log = jax.tree.map(lambda log, item: log.at[n].set(item), log, items)
        return n + 1, EngineState(cache, hidden[:, 0].astype(state.hidden.dtype), rows), log

    # Room for `size` items whatever is asked for: one program serves a single item and a full call.
    empty = lambda dtype, *rest: jnp.zeros(  # noqa: E731
        (size, b, *rest), dtype, out_sharding=P(None, *split, *[None] * len(rest))
    )
    log = StepOutput(empty(jnp.int32), empty(jnp.int32), empty(jnp.float32), empty(jnp.int32, levels))
    _, state, log = jax.lax.while_loop(
        may_continue, one_step, (jnp.int32(0), EngineState(state.cache, state.hidden, rows), log)
    )
    return state, log, state.rows.reason


def _step(
    rows: SlotState, logits: Array, hidden: Array, audio_head, table: PieceTable, *, length: int, tokens: SpecialTokens
):
    after, items = advance(rows, logits, hidden, audio_head, table, tokens, length)
    # A frame is embedded where its row lies, by a head that is whole on every device.
    frames = (
        jnp.zeros(hidden.shape, hidden.dtype) if audio_head is None else audio_head.embed(items.codes[:, None])[:, 0]
    )
    # Position -1 for rows that are over: they go through the model and write nothing.
    return after, items, frames, jnp.where(after.active, rows.position, -1)


def _logits(llm: LanguageModel, state: EngineState) -> Array:
    """Logits of every row, whole on its device; zeros when no row is about to sample a token."""
    rows, split = state.rows, llm.compute.rules.spec("batch", None)
    wanted = (rows.active & ~rows.speaking & ~rows.turn).any()
    shape = (state.hidden.shape[0], rows.seen_tokens.shape[1])
    return jax.lax.cond(
        wanted,
        lambda: jax.sharding.reshard(llm.logits(state.hidden), split),
        lambda: jnp.zeros(shape, jnp.float32, out_sharding=split),
    )


def place_media(x: Array, chunk: Chunk, buffer: Array, audio_head: AudioHeadBranch | None) -> Array:
    """Token embeddings (g, t, d) with those of code frames and of visual tokens in their places."""
    assert chunk.is_audio is not None
    assert chunk.codes is not None
    assert chunk.visual_slots is not None
    if audio_head is not None:
        x = jnp.where(chunk.is_audio[..., None], audio_head.embed(chunk.codes).astype(x.dtype), x)
    # Every position reads the buffer, those without an image out of range: shapes do not depend on images.
    visual = jax.vmap(lambda row, at: row.at[at].get(mode="fill", fill_value=0))(buffer, chunk.visual_slots)
    return jnp.where((chunk.visual_slots < buffer.shape[1])[..., None], visual.astype(x.dtype), x)


def _row(x: Array, index: Array) -> Array:
    return jax.lax.dynamic_slice_in_dim(x, index, 1, 0)


def _put_rows(whole, part, index):
    return jax.tree.map(lambda x, y: jax.lax.dynamic_update_slice_in_dim(x, y, index, 0), whole, part)


def _last_hidden(hidden: Array, before: Array, last: Array, index: Array) -> Array:
    found = jnp.take_along_axis(hidden, jnp.maximum(last, 0)[:, None, None], 1)[:, 0]
    return jnp.where(last[:, None] < 0, _row(before, index), found.astype(before.dtype))


def on_shards(function: Callable, in_specs, out_specs) -> Callable:
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)


_PROGRAMS = (encode_images, prefill, insert, decode_steps)
_head_to_decode_layout = jax.jit(AudioHeadBranch.to_decode_layout)
PlacedTuple = TypeVar("PlacedTuple", bound=tuple)


class DeviceState:
    """Holds `slots` rows of `length` items each, on the mesh of the branches; `devices` of it hold different rows.

    Every method is called with the mesh set.
    """

    def __init__(
        self,
        branches: Mapping[str, Any],
        cfg: OmniConfig,
        table: PieceTable,
        mesh: Mesh,
        *,
        slots: int,
        length: int,
        steps_per_call: int,
        cache_dtype: str | None,
    ):
        head, encoder = branches.get("audio_head"), branches.get("audio_encoder")
        self._cfg, self._mesh = cfg, mesh
        # Once, not with each call: it is some megabytes for a large vocabulary.
        self._table = jax.device_put(PieceTable(*table), NamedSharding(mesh, P()))
        self._slots, self._length, self._steps_per_call = slots, length, steps_per_call
        # Copies in the layout of decoding; whoever made the engine drops the branches that nothing else needs.
        self.models = DecodeModels(
            branches["llm"].to_decode_layout(), None if head is None else _head_to_decode_layout(head)
        )
        self._llm = self.models.llm
        # Those of the branches; the decode layout's rules do not split rows over `context`.
        self._rules = branches["llm"].compute.rules
        self._vision = branches.get("vision")
        self._audio_encoder = None if encoder is None else PromptAudioEncoder(encoder, mesh)
        self._cache_dtype = jnp.dtype(cache_dtype or self._llm.compute.dtype)
        self._widths = cfg.llm.vocab_size, (cfg.audio.levels, max(cfg.audio.codebook_sizes) + 1)
        self._state: EngineState | None = None
        self._buffer: Array | None = None
        self._compiled_before = _programs()
        self.devices = axis_product(mesh, self._llm.compute.rules.axes("batch"))
        self.reset()

    @property
    def compiles(self) -> int:
        """Programs compiled since this was made (of all engines, while several live)."""
        audio = self._audio_encoder.programs if self._audio_encoder else 0
        return _programs() - self._compiled_before + audio

    @property
    def cache_bytes(self) -> int:
        return self._live.cache.bytes

    @property
    def _live(self) -> EngineState:
        assert self._state is not None  # None only while it is made anew
        return self._state

    def reset(self) -> None:
        """Makes an empty cache and idle rows, whatever there was before."""
        # A step that failed may have left all of it, and its traceback still refers to it: there is no room for both.
        for array in jax.tree.leaves((self._state, self._buffer)):
            if not array.is_deleted():
                array.delete()
        self._state = self._buffer = None
        cache = init_cache(self._cfg.llm, self._slots, self._length, self._cache_dtype, self._llm.compute)
        hidden: Any = np.zeros((self._slots, self._cfg.llm.hidden_size), self._llm.compute.dtype)
        self._state = EngineState(cache, *self.placed((hidden, self._idle_slots())))

    def encode_audio(self, prompt: Prompt) -> Int32[np.ndarray, "a q"]:
        """Returns the prompt's code frames, those of its mel windows made of them."""
        if not prompt.mels:
            return np.asarray(prompt.audio_codes)
        assert self._audio_encoder is not None  # `check_prompt` lets none through else
        return self._audio_encoder.encode(prompt)

    def encode_images(self, device: int, prompt: Prompt) -> None:
        """Keeps the embeddings of the prompt's images, for `prefill` of a row of `device`."""
        self._buffer = self.embed_images({device: prompt})

    def embed_images(self, prompts: Mapping[int, Prompt]) -> Float[Array, "g s d"]:
        """Returns the buffer of images by position, with those of `prompts` (by device) in it."""
        assert self._vision is not None  # `check_prompt` lets none through else
        shards = axis_product(self._mesh, self._vision.compute.rules.axes("media"))
        images = lay_out_images(prompts, self.devices, shards, self._cfg, self._length)
        return encode_images(self._vision, self.image_buffer(), *self.placed(images))

    def prefill(self, index: int, chunk: Chunk) -> None:
        """Reads the chunk into row `index` of every device."""
        buffer = None if chunk.visual_slots is None else self.image_buffer()
        self._state = prefill(self.models, self._live, np.int32(index), self.placed(chunk), buffer)

    def insert(self, slot: int, prompt: Prompt, settings: GenerationConfig, key: UInt32[np.ndarray, "2"]) -> None:
        """Starts the answer in row `slot`, which has read the prompt."""
        self._insert(slot, init_slot(prompt.tokens, settings, key, self._cfg.tokens, *self._widths))

    def decode_steps(
        self, alive: Bool[np.ndarray, " b"], count: int, stop_early: bool
    ) -> tuple[StepOutput, Int32[np.ndarray, " b"]]:
        """Makes up to `count` items of the rows that are `alive`, (n, b, ..); returns them and why rows ended."""
        self._state, items, reasons = decode_steps(
            self.models,
            self._live,
            *self.placed((alive,)),
            np.int32(count),
            np.bool_(stop_early),
            self._table,
            tokens=self._cfg.tokens,
            size=self._steps_per_call,
        )
        # One transfer for all of it; until it is there, the host waits.
        return jax.device_get((items, reasons))

    def warm_up(self, chunk: int) -> None:
        """Runs every program but those of images and audio once, on nothing."""
        # All sizes, without and with media: which ones requests will need is not known yet.
        for t in chunk_sizes(self._length, chunk):
            shape = (self.devices, t)
            tokens: Any = np.zeros(shape, np.int32)
            nowhere: Any = np.full(shape, -1, np.int32)
            text = Chunk(tokens, nowhere, nowhere[:, 0])
            self.prefill(0, text)
            if self._vision is not None or self.models.audio_head is not None:
                codes = np.zeros((*shape, self._cfg.audio.levels), np.int32)
                visual_slots = np.full(shape, self._length, np.int32)
                self.prefill(0, text._replace(codes=codes, is_audio=np.zeros(shape, bool), visual_slots=visual_slots))
        self._insert(0, jax.tree.map(lambda x: x[:1], self._idle_slots()))
        self.decode_steps(np.zeros(self._slots, bool), 1, False)

    def _insert(self, slot: int, row: SlotState) -> None:
        self._state = self._live._replace(rows=insert(self._live.rows, np.int32(slot), row))

    def _idle_slots(self) -> SlotState:
        return idle_slots(self._slots, self._cfg.tokens, *self._widths)

    def image_buffer(self) -> Array:
        """Where visual embeddings lie by position, one prompt a device; made when it is first needed."""
        if self._buffer is None:
            shape = (self.devices, self._length, self._cfg.llm.hidden_size)
            spec = self._rules.spec("batch", "length")
            self._buffer = jnp.zeros(shape, self._llm.compute.dtype, out_sharding=spec)
        return self._buffer

    def placed(self, arrays: PlacedTuple) -> PlacedTuple:
        """Host arrays on the devices, their first dim split as slots are."""

        def place(x: np.ndarray) -> Array:
            # Every dim is named, as in what programs return: else the same program is traced once more for those.
            spec = self._llm.compute.rules.spec("batch", *[None] * (x.ndim - 1))
            return jax.device_put(x, NamedSharding(self._mesh, spec))

        return jax.tree.map(place, arrays)


def mesh_of(llm: nnx.Module) -> Mesh:
    """Returns the mesh that a branch lies on. Raises ConfigError where generating cannot work with it."""
    # A row's cache lies whole on its device, so `context` must not split rows.
    sharding = next(iter(named_values(llm).values())).sharding
    if not isinstance(sharding, NamedSharding) or sharding.mesh.shape.get("context") != 1:
        raise ConfigError("generating needs the branches on a mesh of this project (sharding.make_mesh) with context 1")
    assert isinstance(sharding.mesh, Mesh)
    return sharding.mesh


def _programs() -> int:
    return sum(count_programs(program) for program in _PROGRAMS)
