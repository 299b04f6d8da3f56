"""The generating engine: many requests at once, each answered in text and speech as it comes.

    engine = Engine(branches, cfg, tokenizer, slots=8, length=4096)
    for event in engine.submit(prompt, GenerationConfig(speech=True), jax.random.key(0)):
        ...                                     # TextPiece, Frames, at last Finished

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
from baichuan_omni_jax.generation.engine_state import BatchState, mesh_of
from baichuan_omni_jax.generation.events import Answer, Prompt
from baichuan_omni_jax.generation.prefill import Joining
from baichuan_omni_jax.generation.prompt_check import check_prompt
from baichuan_omni_jax.generation.requests import Job, Request
from baichuan_omni_jax.generation.sampling import key_data
from data_pipelines.text.speech_segments import piece_table

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EngineMetrics:
    """What the engine is and was doing. `compiles`: programs compiled since it was made; `tokens_per_s`: text tokens
    and code frames a second while at least one request was served."""

    compiles: int
    cache_bytes: int
    slots: int
    in_use: int
    waiting: int
    tokens: int
    frames: int
    tokens_per_s: float


class Engine:
    """Serves requests with the branches of one checkpoint (`llm`, and any of vision, audio_head, audio_encoder).

    `slots` requests are answered at a time, each in a cache of `length` items (prompt and answer; one a token, visual
    token or code frame), kept in `cache_dtype` (a float type or int8; default: the language model's compute dtype).
    `chunk` items of prompts are read, and `burst` items of every answer made, before the engine looks around.

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
        burst: int = 8,
    ):
        if "llm" not in branches:
            raise ConfigError("generating needs the branch llm")
        for name, size in (("slots", slots), ("length", length), ("chunk", chunk), ("burst", burst)):
            if size < 1:
                raise ConfigError(f"{name} {size} must be at least 1")
        if chunk & (chunk - 1):
            raise ConfigError(f"chunk {chunk} is not a power of two")
        self.cfg, self.tokenizer = cfg, tokenizer
        self._slots, self._length, self._chunk, self._burst = slots, length, chunk, burst
        self._mesh = mesh_of(branches["llm"])
        self._branches = frozenset(branches) & frozenset(PROMPT_BRANCHES)
        table = piece_table(tokenizer, cfg.llm.vocab_size)
        sizes = {"slots": slots, "length": length, "burst": burst, "cache_dtype": cache_dtype}
        with jax.set_mesh(self._mesh):
            self._batch = BatchState(branches, cfg, table, self._mesh, **sizes)
        self._lock = threading.Lock()
        self._waiting: deque[Job] = deque()
        self._joining: Joining | None = None
        self._running: dict[int, Job] = {}
        self._busy, self._tokens, self._frames = 0.0, 0, 0

    def submit(self, prompt: Prompt, settings: GenerationConfig, key: PRNGKeyArray) -> Request:
        """Puts a request in line; iterate it to have it served. The same key gives the same answer in any company.

        Raises RequestError: `too_long`, `no_branch`, `bad_media`, `bad_message`.
        """
        if settings.stop and self.tokenizer is None:
            raise RequestError("bad_message", "stop strings need a tokenizer, the engine has none")
        check_prompt(prompt, settings, self.cfg, self._branches, self._length)
        job = Job(prompt, settings, key_data(key), self.cfg.tokens, self.tokenizer)
        with self._lock:
            self._waiting.append(job)
        return Request(job, self._serve)

    def generate(
        self, prompts: Sequence[Prompt], settings: GenerationConfig, keys: Sequence[PRNGKeyArray] | PRNGKeyArray
    ) -> list[Answer]:
        """The whole answers to several prompts, served together. Raises RequestError for the first it cannot serve."""
        requests = [self.submit(prompt, settings, key) for prompt, key in zip(prompts, keys, strict=True)]
        return [Answer.of(request) for request in requests]

    def warm_up(self) -> None:
        """Compiles every program of text and speech; those of pictures and sound wait for the first of their size.

        Does nothing while requests are served: they compile what they need.
        """
        with self._lock, jax.set_mesh(self._mesh):
            if not (self._running or self._joining):
                self._batch.warm_up(self._chunk)

    @property
    def compiles(self) -> int:
        """Programs compiled since the engine was made (of all engines, while several live)."""
        return self._batch.compiles

    @property
    def metrics(self) -> EngineMetrics:
        with self._lock:
            self._sweep()
            joining = len(self._joining.jobs) if self._joining else 0
            return EngineMetrics(
                compiles=self.compiles,
                cache_bytes=self._batch.cache_bytes,
                slots=self._slots,
                in_use=len(self._running) + joining,
                waiting=len(self._waiting),
                tokens=self._tokens,
                frames=self._frames,
                tokens_per_s=(self._tokens + self._frames) / self._busy if self._busy else 0.0,
            )

    def _serve(self, job: Job) -> None:
        """Runs a step, unless another thread's step has served `job` meanwhile."""
        with self._lock:
            if job.events or job.over:
                return
            began = time.perf_counter()
            try:
                with jax.set_mesh(self._mesh):
                    self._step()
            except BaseException as error:
                self._abandon(error)
                if not isinstance(error, Exception):
                    raise
            finally:
                self._busy += time.perf_counter() - began

    def _step(self) -> None:
        self._sweep()
        budget = self._chunk
        while budget > 0 and (self._joining or self._let_in()):
            budget -= self._read_on()
        if self._running:
            new = not all(job.started for job in self._running.values())
            self._run_burst(self._running, 1 if new else self._burst)
            self._running = {slot: job for slot, job in self._running.items() if not job.over}

    def _sweep(self) -> None:
        """Ends what was cancelled."""
        joining = self._joining.jobs if self._joining else {}
        for job in (*self._waiting, *joining.values(), *self._running.values()):
            if job.cancelled:
                job.finish("cancelled")
        self._waiting = deque(job for job in self._waiting if not job.over)
        self._running = {slot: job for slot, job in self._running.items() if not job.over}
        if self._joining:
            self._joining.jobs = {device: job for device, job in joining.items() if not job.over}

    def _let_in(self) -> bool:
        """Gives free slots to those who waited longest, as many as can read together; False when there are none."""
        free = [slot for slot in range(self._slots) if slot not in self._running]
        if not free or not self._waiting:
            return False
        devices = self._batch.devices
        here = self._slots // devices
        index = free[0] % here
        jobs = {}
        for slot in free:
            if slot % here == index and self._waiting:
                job = self._waiting.popleft()
                job.slot, jobs[slot // here] = slot, job
        self._joining = Joining(index, jobs, devices, self._length)
        self._take_in_media(self._joining)
        return True

    def _take_in_media(self, joining: Joining) -> None:
        """Hears and sees what the prompts hold. A prompt whose media cannot be taken in is given up alone."""
        codes = {}
        for device, job in list(joining.jobs.items()):
            try:
                codes[device] = self._batch.hear(job.prompt)
                if len(job.prompt.patches):
                    self._batch.see(device, job.prompt)
            except Exception as error:
                log.exception("the media of a prompt could not be taken in")
                job.fail(f"the media of the prompt could not be taken in: {error}")
                del joining.jobs[device]
        if any(len(job.prompt.audio_slots) or len(job.prompt.patches) for job in joining.jobs.values()):
            joining.place_media(codes)

    def _read_on(self) -> int:
        """Reads the next chunk of those that join, and seats them after their last; returns the items it cost."""
        joining, cost = self._joining, 0
        if not joining.done:
            chunk = joining.chunk(self._chunk)
            self._batch.read(joining.index, chunk)
            cost = chunk.tokens.size
        if joining.done:
            for job in joining.jobs.values():
                self._batch.seat(job.slot, job.prompt, job.settings, job.key)
                self._running[job.slot] = job
            # Only now: what fails on the way must find them, or nobody would ever serve them.
            self._joining = None
        return cost

    def _run_burst(self, jobs: Mapping[int, Job], count: int) -> None:
        alive = np.zeros(self._slots, bool)
        alive[list(jobs)] = True
        items, reasons = self._batch.run(alive, count, hurry=bool(self._waiting))
        for slot, job in jobs.items():
            before = job.tokens, job.frames
            job.take(jax.tree.map(lambda x, slot=slot: x[:, slot], items), int(reasons[slot]))
            self._tokens += job.tokens - before[0]
            self._frames += job.frames - before[1]

    def _abandon(self, error: BaseException) -> None:
        """Gives up what was being served: the arrays that it lived in are lost. Those who wait are served next."""
        if isinstance(error, Exception):  # else somebody interrupted it, which is no error
            log.error("generating failed", exc_info=error)
        for job in (*self._running.values(), *(self._joining.jobs.values() if self._joining else ())):
            if not job.over:
                job.fail(f"the engine failed while it served this request: {error}")
        self._running, self._joining = {}, None
        with jax.set_mesh(self._mesh):
            self._batch.reset()
