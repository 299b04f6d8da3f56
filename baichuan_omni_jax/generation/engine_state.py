"""The device side of the generating engine: the models it computes with, the state of all slots, and what changes it.

Nothing here knows of requests or threads. Every method is called with the mesh set.
"""

from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Int32, UInt32

from baichuan_omni_jax.config import GenerationConfig, OmniConfig
from baichuan_omni_jax.errors import ConfigError
from baichuan_omni_jax.generation import programs
from baichuan_omni_jax.generation.events import Prompt
from baichuan_omni_jax.generation.prefill import chunk_sizes, lay_out_images
from baichuan_omni_jax.generation.prompt_audio import PromptAudioEncoder, count_programs
from baichuan_omni_jax.generation.slots import SlotState, StepOutput, idle_slots, init_slot
from baichuan_omni_jax.llm.audio_head import AudioHeadBranch
from baichuan_omni_jax.llm.kv_cache import init_cache
from baichuan_omni_jax.nn.param import named_values
from baichuan_omni_jax.sharding import axis_product
from data_pipelines.text.speech_segments import PieceTable

_PROGRAMS = (programs.encode_images, programs.prefill, programs.insert, programs.decode_steps)
_head_to_decode_layout = jax.jit(AudioHeadBranch.to_decode_layout)
Arrays = TypeVar("Arrays", bound=tuple)


class DeviceState:
    """`slots` rows of `length` items each, on the mesh of the branches; `devices` of it hold different rows."""

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
        self._table = jax.device_put(PieceTable(*table), NamedSharding(mesh, PartitionSpec()))
        self._slots, self._length, self._steps_per_call = slots, length, steps_per_call
        self._model = programs.DecodeModels(
            branches["llm"].to_decode_layout(), None if head is None else _head_to_decode_layout(head)
        )
        self._llm = self._model.llm
        self._vision = branches.get("vision")
        self._audio_encoder = None if encoder is None else PromptAudioEncoder(encoder, mesh)
        self._cache_dtype = jnp.dtype(cache_dtype or self._llm.compute.dtype)
        self._widths = cfg.llm.vocab_size, (cfg.audio.levels, max(cfg.audio.codebook_sizes) + 1)
        self._state: programs.EngineState | None = None
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
    def _live(self) -> programs.EngineState:
        assert self._state is not None  # None only while it is made anew
        return self._state

    def reset(self) -> None:
        """An empty cache and idle rows, whatever there was before."""
        # A step that failed may have left all of it, and its traceback still refers to it: there is no room for both.
        for array in jax.tree.leaves((self._state, self._buffer)):
            if not array.is_deleted():
                array.delete()
        self._state = self._buffer = None
        cache = init_cache(self._cfg.llm, self._slots, self._length, self._cache_dtype, self._llm.compute)
        hidden: Any = np.zeros((self._slots, self._cfg.llm.hidden_size), self._llm.compute.dtype)
        self._state = programs.EngineState(cache, *self._placed((hidden, self._idle_slots())))

    def encode_audio(self, prompt: Prompt) -> Int32[np.ndarray, "a q"]:
        """The prompt's code frames, those of its mel windows made of them."""
        if not prompt.mels:
            return np.asarray(prompt.audio_codes)
        assert self._audio_encoder is not None  # `check_prompt` lets none through else
        return self._audio_encoder.encode(prompt)

    def encode_images(self, device: int, prompt: Prompt) -> None:
        """Keeps the embeddings of the prompt's images, for `prefill` of a row of `device`."""
        assert self._vision is not None  # `check_prompt` lets none through else
        shards = axis_product(self._mesh, self._vision.compute.rules.axes("media"))
        images = lay_out_images({device: prompt}, self.devices, shards, self._cfg, self._length)
        self._buffer = programs.encode_images(self._vision, self._image_buffer(), *self._placed(images))

    def prefill(self, index: int, chunk: programs.Chunk) -> None:
        """Row `index` of every device reads its part of the chunk."""
        buffer = None if chunk.visual_slots is None else self._image_buffer()
        self._state = programs.prefill(self._model, self._live, np.int32(index), self._placed(chunk), buffer)

    def insert(self, slot: int, prompt: Prompt, settings: GenerationConfig, key: UInt32[np.ndarray, "2"]) -> None:
        """Row `slot`, which has read the prompt, begins to answer."""
        self._insert(slot, init_slot(prompt.tokens, settings, key, self._cfg.tokens, *self._widths))

    def decode_steps(
        self, alive: Bool[np.ndarray, " b"], count: int, stop_early: bool
    ) -> tuple[StepOutput, Int32[np.ndarray, " b"]]:
        """Up to `count` items of the rows that are `alive`, (n, b, ..), and why rows ended."""
        self._state, items, reasons = programs.decode_steps(
            self._model,
            self._live,
            *self._placed((alive,)),
            np.int32(count),
            np.bool_(stop_early),
            self._table,
            tokens=self._cfg.tokens,
            size=self._steps_per_call,
        )
        return jax.device_get((items, reasons))

    def warm_up(self, chunk: int) -> None:
        """Runs every program but those of images and sound once, on nothing."""
        for t in chunk_sizes(self._length, chunk):
            shape = (self.devices, t)
            tokens: Any = np.zeros(shape, np.int32)
            nowhere: Any = np.full(shape, -1, np.int32)
            text = programs.Chunk(tokens, nowhere, nowhere[:, 0])
            self.prefill(0, text)
            if self._vision is not None or self._model.audio_head is not None:
                codes = np.zeros((*shape, self._cfg.audio.levels), np.int32)
                visual_slots = np.full(shape, self._length, np.int32)
                self.prefill(0, text._replace(codes=codes, is_audio=np.zeros(shape, bool), visual_slots=visual_slots))
        self._insert(0, jax.tree.map(lambda x: x[:1], self._idle_slots()))
        self.decode_steps(np.zeros(self._slots, bool), 1, False)

    def _insert(self, slot: int, row: SlotState) -> None:
        self._state = self._live._replace(rows=programs.insert(self._live.rows, np.int32(slot), row))

    def _idle_slots(self) -> SlotState:
        return idle_slots(self._slots, self._cfg.tokens, *self._widths)

    def _image_buffer(self) -> Array:
        """Where visual embeddings lie by position, one prompt a device; made when it is first needed."""
        if self._buffer is None:
            shape, spec = (self.devices, self._length, self._cfg.llm.hidden_size), self._llm.compute.rules.spec
            self._buffer = jnp.zeros(shape, self._llm.compute.dtype, out_sharding=spec("batch", "length"))
        return self._buffer

    def _placed(self, arrays: Arrays) -> Arrays:
        """Host arrays on the devices, their first dim split as slots are."""

        def place(x: np.ndarray) -> Array:
            # Every dim is named, as in what programs return: else the same program is traced once more for those.
            spec = self._llm.compute.rules.spec("batch", *[None] * (x.ndim - 1))
            return jax.device_put(x, NamedSharding(self._mesh, spec))

        return jax.tree.map(place, arrays)


def mesh_of(llm: nnx.Module) -> Mesh:
    """The mesh that a branch lies on. Raises ConfigError where generating cannot work with it."""
    sharding = next(iter(named_values(llm).values())).sharding
    if not isinstance(sharding, NamedSharding) or sharding.mesh.shape.get("context") != 1:
        raise ConfigError("generating needs the branches on a mesh of this project (sharding.make_mesh) with context 1")
    assert isinstance(sharding.mesh, Mesh)
    return sharding.mesh


def _programs() -> int:
    return sum(count_programs(program) for program in _PROGRAMS)
