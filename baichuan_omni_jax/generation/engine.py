"""The generating engine: many requests at once, each answered in text and speech as it comes.

    engine = Engine(branches, cfg, tokenizer, slots=8, length=4096)
    for event in engine.submit(prompt, GenerationConfig(speech=True), jax.random.key(0)):
        ...                                     # TextDelta, AudioCodes, at last Finished

A request takes one of `slots` rows of the cache. Its prompt is read in chunks while other rows go on; then it takes
part in the steps of all rows, several of them in one program, until its answer ends and the row is free for the next.
The engine has no thread of its own: whoever waits for an event runs a step, for everybody.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jax
import numpy as np
from flax import nnx
from jaxtyping import PRNGKeyArray
from tokenizers import Tokenizer

from baichuan_omni_jax.branches import PROMPT_BRANCHES
from baichuan_omni_jax.config import GenerationConfig, OmniConfig
from baichuan_omni_jax.errors import ConfigError, RequestError
from baichuan_omni_jax.generation.events import GenerationResult, Prompt
from baichuan_omni_jax.generation.loglikelihood import ContinuationScore, LogLikelihoodScorer, ScoringRequest
from baichuan_omni_jax.generation.prefill import PrefillGroup, check_prompt
from baichuan_omni_jax.generation.programs import DeviceState, mesh_of
from baichuan_omni_jax.generation.requests import ActiveRequest, Request
from baichuan_omni_jax.generation.sampling import key_data
from data_pipelines.text.speech_segments import piece_table

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EngineMetrics:
    """What the engine is and was doing."""

    compiles: int  # programs compiled since the engine was made
    cache_bytes: int  # of all devices together
    slots: int
    in_use: int  # slots that a request has
    waiting: int  # requests in line
    tokens: int  # text tokens generated
    frames: int  # code frames generated
    tokens_per_s: float  # both, a second while at least one request was served


class Engine:
    """Serves requests with the branches of one checkpoint (`llm`, and any of vision, audio_head, audio_encoder).

    `slots` requests are answered at a time, each in a cache of `length` items (prompt and answer; one a token, visual
    token or code frame), kept in `cache_dtype` (a float type or int8; default: the language model's compute dtype).
    `chunk` items of prompts are read, and `steps_per_call` items of every answer made, before the engine looks around.

    The language model and the audio head are copied in the form that decoding reads; drop them where nothing else
    needs them. Works on the mesh that they lie on, slots over data x fsdp, heads over tensor; context must be 1.
    Safe to be used from several threads. Raises ConfigError for a mesh, or branches, that it cannot work with.
    """

    def __init__(
        self,
        branches: Mapping[str, nnx.Module],
        cfg: OmniConfig,
        tokenizer: Tokenizer | None,
        *,
        slots: int = 8,
        length: int = 4096,
        cache_dtype: str | None = None,
        chunk: int = 1024,
        steps_per_call: int = 8,
    ):
        if "llm" not in branches:
            raise ConfigError("generating needs the branch llm")
        for name, size in (("slots", slots), ("length", length), ("chunk", chunk), ("steps_per_call", steps_per_call)):
            if size < 1:
                raise ConfigError(f"{name} {size} must be at least 1")
        # Chunks are padded to powers of two: another limit would be one more size to compile.
        if chunk & (chunk - 1):
            raise ConfigError(f"chunk {chunk} is not a power of two")
        self.cfg, self.tokenizer = cfg, tokenizer
        self._slots, self._length, self._chunk, self._steps_per_call = slots, length, chunk, steps_per_call
        self._mesh = mesh_of(branches["llm"])
        self._branches = frozenset(branches) & frozenset(PROMPT_BRANCHES)
        table = piece_table(tokenizer, cfg.llm.vocab_size)
        sizes = {"slots": slots, "length": length, "steps_per_call": steps_per_call, "cache_dtype": cache_dtype}
        with jax.set_mesh(self._mesh):
            self._device = DeviceState(branches, cfg, table, self._mesh, **sizes)
        self._scorer = LogLikelihoodScorer(self._device, cfg, self._branches, length)
        # One lock for queues and device: whoever holds it runs a step for everybody.
        self._lock = threading.Lock()
        self._waiting: deque[ActiveRequest] = deque()
        self._prefill_group: PrefillGroup | None = None
        self._running: dict[int, ActiveRequest] = {}
        self._busy, self._tokens, self._frames = 0.0, 0, 0

    def submit(self, prompt: Prompt, settings: GenerationConfig, key: PRNGKeyArray) -> Request:
        """Puts a request in line; iterate it to have it served.

        Args:
            prompt: an encoded prompt.
            settings: of the answer.
            key: of its sampling; the same key gives the same answer in any company.

        Returns:
            The request, an iterator of events.

        Raises:
            RequestError: `too_long`, `no_branch`, `bad_media`, `bad_message`.
        """
        if settings.stop and self.tokenizer is None:
            raise RequestError("bad_message", "stop strings need a tokenizer, the engine has none")
        # Refused in the caller's thread: whatever is in line can be served.
        check_prompt(prompt, settings, self.cfg, self._branches, self._length)
        request = ActiveRequest(prompt, settings, key_data(key), self.cfg.tokens, self.tokenizer)
        with self._lock:
            self._waiting.append(request)
        return Request(request, self._serve)

    def generate(
        self, prompts: Sequence[Prompt], settings: GenerationConfig, keys: Sequence[PRNGKeyArray] | PRNGKeyArray
    ) -> list[GenerationResult]:
        """Answers several prompts, served together. Raises RequestError for the first it cannot serve."""
        # All are in line before the first is waited for, so they share steps.
        requests = [self.submit(prompt, settings, key) for prompt, key in zip(prompts, keys, strict=True)]
        return [GenerationResult.from_events(request) for request in requests]

    def log_likelihoods(self, requests: Sequence[ScoringRequest]) -> list[tuple[ContinuationScore, ...]]:
        """Computes what the model gives continuations of prompts; answers that are being made go on in between.

        Prompts may hold media, and are computed once for all their continuations; many requests at once share rows.
        A continuation's `log_likelihood` is minus the sum of the training loss over its tokens.

        Args:
            requests: prompts, each with continuations of at least one token; a prompt and a continuation together may
                have one token more than an engine's `length`.

        Returns:
            For each request, the scores of its continuations, in order.

        Raises:
            RequestError: as `submit`, before anything is computed.
        """
        for request in requests:
            self._scorer.check(request)
        found: list[dict[int, ContinuationScore]] = [{} for _ in requests]
        rows = self._scorer.score(requests)
        while True:
            # Row by row, so that answers wait for a row at most.
            with self._lock, jax.set_mesh(self._mesh):
                scored = next(rows, None)
            if scored is None:
                return [tuple(scores[number] for number in sorted(scores)) for scores in found]
            for request, number, score in scored:
                found[request][number] = score

    def warm_up(self) -> None:
        """Compiles every program of text and speech; those of images and audio wait for the first of their size.

        Does nothing while requests are served: they compile what they need.
        """
        with self._lock, jax.set_mesh(self._mesh):
            if not (self._running or self._prefill_group):
                self._device.warm_up(self._chunk)

    @property
    def length(self) -> int:
        """Items of a prompt and its answer together, at most."""
        return self._length

    @property
    def compiles(self) -> int:
        """Programs compiled since the engine was made (of all engines, while several live)."""
        return self._device.compiles + self._scorer.compiles

    @property
    def metrics(self) -> EngineMetrics:
        with self._lock:
            self._sweep()
            group = len(self._prefill_group.requests) if self._prefill_group else 0
            return EngineMetrics(
                compiles=self.compiles,
                cache_bytes=self._device.cache_bytes,
                slots=self._slots,
                in_use=len(self._running) + group,
                waiting=len(self._waiting),
                tokens=self._tokens,
                frames=self._frames,
                tokens_per_s=(self._tokens + self._frames) / self._busy if self._busy else 0.0,
            )

    def _serve(self, request: ActiveRequest) -> None:
        """Runs a step for everybody, unless another thread's step has served `request` meanwhile."""
        with self._lock:
            if request.events or request.over:
                return
            began = time.perf_counter()
            try:
                with jax.set_mesh(self._mesh):
                    self._step()
            except BaseException as error:
                # A failed program may have consumed the arrays donated to it: no row can go on with what is left.
                self._abandon(error)
                if not isinstance(error, Exception):
                    raise
            finally:
                self._busy += time.perf_counter() - began

    def _step(self) -> None:
        """Prefills as much as a chunk, then decodes a few items of every running answer: no answer waits for a prompt
        for longer than a chunk takes."""
        self._sweep()
        # Prefill: several short prompts, or the next chunk of a long one.
        budget = self._chunk
        while budget > 0 and (self._prefill_group or self._admit()):
            budget -= self._prefill_chunk()
        # Decoding: one item where somebody has had nothing yet, so that a first token leaves as soon as it is there.
        if self._running:
            new = not all(request.started for request in self._running.values())
            self._decode(self._running, 1 if new else self._steps_per_call)
            self._running = {slot: request for slot, request in self._running.items() if not request.over}

    def _sweep(self) -> None:
        """Ends what was cancelled."""
        group = self._prefill_group.requests if self._prefill_group else {}
        for request in (*self._waiting, *group.values(), *self._running.values()):
            if request.cancelled:
                request.finish("cancelled")
        self._waiting = deque(request for request in self._waiting if not request.over)
        self._running = {slot: request for slot, request in self._running.items() if not request.over}
        if self._prefill_group:
            self._prefill_group.requests = {device: request for device, request in group.items() if not request.over}

    def _admit(self) -> bool:
        """Gives free slots to those who waited longest, as many as can read together; False when there are none."""
        # A program prefills one row of each device, the same of all: only slots of one row number go together.
        free = [slot for slot in range(self._slots) if slot not in self._running]
        if not free or not self._waiting:
            return False
        devices = self._device.devices
        here = self._slots // devices
        index = free[0] % here
        requests = {}
        for slot in free:
            if slot % here == index and self._waiting:
                request = self._waiting.popleft()
                request.slot, requests[slot // here] = slot, request
        self._prefill_group = PrefillGroup(index, requests, devices, self._length)
        self._encode_media(self._prefill_group)
        return True

    def _encode_media(self, group: PrefillGroup) -> None:
        """Encodes the prompts' audio and images. A prompt whose media cannot be encoded is given up alone."""
        codes = {}
        for device, request in list(group.requests.items()):
            try:
                codes[device] = self._device.encode_audio(request.prompt)
                if len(request.prompt.patches):
                    self._device.encode_images(device, request.prompt)
            except Exception as error:
                log.exception("the media of a prompt could not be encoded")
                request.fail(f"the media of the prompt could not be encoded: {error}")
                del group.requests[device]
        # A group of text alone takes the program without media, which neither looks up codes nor reads the buffer.
        if any(len(request.prompt.audio_slots) or len(request.prompt.patches) for request in group.requests.values()):
            group.place_media(codes)

    def _prefill_chunk(self) -> int:
        """Prefills the next chunk of those that join, and inserts them after their last; returns the items it cost."""
        group, cost = self._prefill_group, 0
        assert group is not None
        if not group.done:
            chunk = group.chunk(self._chunk)
            self._device.prefill(group.index, chunk)
            cost = chunk.tokens.size
        if group.done:
            for request in group.requests.values():
                self._device.insert(request.slot, request.prompt, request.settings, request.key)
                self._running[request.slot] = request
            # Only now: what fails on the way must find them, or nobody would ever serve them.
            self._prefill_group = None
        return cost

    def _decode(self, requests: Mapping[int, ActiveRequest], count: int) -> None:
        # The only place where the host waits for the device: a call's items come back together.
        alive = np.zeros(self._slots, bool)
        alive[list(requests)] = True
        items, reasons = self._device.decode_steps(alive, count, stop_early=bool(self._waiting))
        # A stop string is found only here, on the host: its row ends by not being alive in the next call.
        for slot, request in requests.items():
            before = request.tokens, request.frames
            request.take(jax.tree.map(lambda x, slot=slot: x[:, slot], items), int(reasons[slot]))
            self._tokens += request.tokens - before[0]
            self._frames += request.frames - before[1]

    def _abandon(self, error: BaseException) -> None:
        """Gives up what was being served: the arrays that it lived in are lost. Those who wait are served next."""
        if isinstance(error, Exception):  # else somebody interrupted it, which is no error
            log.error("generating failed", exc_info=error)
        for request in (
            *self._running.values(),
            *(self._prefill_group.requests.values() if self._prefill_group else ()),
        ):
            if not request.over:
                request.fail(f"the engine failed while it served this request: {error}")
        self._running, self._prefill_group = {}, None
        with jax.set_mesh(self._mesh):
            self._device.reset()
