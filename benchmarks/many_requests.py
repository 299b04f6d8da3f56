"""Two hundred requests to the generating engine, a fifth of them bad, eight at a time: who is answered, what it costs.

    JAX_PLATFORMS=cpu python benchmarks/many_requests.py [--requests 200] [--bad 0.2] [--at-once 8] [--json]

The tiny model with random weights: text, pictures and speech asked for and answered. Eight threads each take the next
request, as the page's sessions do; one good request in ten is dropped by its client in mid-answer. A bad one is too
long, holds a code or a token that there is not, or sound for a checkpoint that cannot hear. Memory is the process's
resident size, its median over each quarter of the requests; the first quarter fills allocators and is left out.
"""

import argparse
import dataclasses
import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
from rows import emit, row

from baichuan_omni_jax.config import GenerationConfig, MeshConfig, OmniConfig, tiny
from baichuan_omni_jax.errors import RequestError
from baichuan_omni_jax.generation.engine import Engine
from baichuan_omni_jax.generation.events import Finished, GenerationResult, Prompt
from baichuan_omni_jax.nn.param import ComputePolicy
from baichuan_omni_jax.omni.model import OmniModel
from baichuan_omni_jax.sharding import make_mesh

LENGTH = 256
# Resident size may wander by this much between the second and the last quarter.
FLAT_MIB = 16
CAUSES = ("too_long", "bad_media", "bad_message", "no_branch")


@dataclasses.dataclass(frozen=True)
class Asked:
    """A request; `cause`: why it must be refused, or None. `dropped`: its client goes after the first event."""

    prompt: Prompt
    settings: GenerationConfig
    cause: str | None
    dropped: bool


def make_prompt(rng: np.random.Generator, cfg: OmniConfig, tokens: int, pictures: int, codes: int) -> SimpleNamespace:
    """Random text with so many pictures (64 patches each) and code frames before it."""
    levels, slots = cfg.audio.levels, [16 * pictures, codes]
    ids = [cfg.tokens.image_pad] * slots[0] + [cfg.tokens.audio_pad] * slots[1]
    text = rng.integers(60, cfg.llm.vocab_size, tokens)
    place = np.arange(64)
    return SimpleNamespace(
        tokens=np.concatenate([ids, text]).astype(np.int32),
        audio_codes=rng.integers(0, cfg.audio.codebook_sizes, (codes, levels)).astype(np.int32),
        audio_slots=np.arange(slots[0], sum(slots), dtype=np.int32),
        patches=rng.integers(0, 256, (64 * pictures, cfg.vision.patch_values)).astype(np.uint8),
        patch_grid=np.tile(np.stack([place // 8, place % 8], -1), (pictures, 1)).astype(np.int32),
        patch_frames=np.repeat(np.arange(1, pictures + 1), 64).astype(np.int32),
        visual_slots=np.arange(slots[0], dtype=np.int32),
        mels=(),
        mel_places=(),
    )


def spoil(prompt: SimpleNamespace, cause: str, cfg: OmniConfig) -> None:
    """Makes the prompt one that must be refused for `cause`."""
    if cause == "too_long":
        prompt.tokens = np.resize(prompt.tokens, LENGTH)
    elif cause == "bad_media":
        prompt.audio_codes = np.full((1, cfg.audio.levels), max(cfg.audio.codebook_sizes) + 1, np.int32)
        prompt.audio_slots = np.array([0], np.int32)
    elif cause == "bad_message":
        prompt.tokens[-1] = cfg.llm.vocab_size
    else:
        prompt.mels, prompt.mel_places = (np.zeros((90, cfg.audio.num_mel_bins), np.float32),), (0,)


def make_requests(count: int, bad: float, cfg: OmniConfig) -> Iterator[Asked]:
    rng = np.random.default_rng(0)
    base = GenerationConfig(max_tokens=16, segment_tokens=6, segment_frames=12)
    spoilt = set(rng.choice(count, round(bad * count), replace=False).tolist())
    for n in range(count):
        pictures, codes = (int(x) for x in (rng.integers(0, 3), rng.integers(0, 20)))
        prompt = make_prompt(rng, cfg, int(rng.integers(1, 120)), pictures, codes)
        cause = CAUSES[n % len(CAUSES)] if n in spoilt else None
        if cause:
            spoil(prompt, cause, cfg)
        settings = dataclasses.replace(base, speech=bool(n % 2))
        yield Asked(prompt, settings, cause, dropped=cause is None and rng.random() < 0.1)


class Clients:
    """Threads that ask, and what came of it."""

    def __init__(self, engine: Engine, asked: list[Asked]):
        self._engine, self._asked, self._next = engine, asked, iter(range(len(asked)))
        self._lock = threading.Lock()
        self.outcomes: Counter[str] = Counter()
        self.first: list[float] = []
        self.resident: list[float] = []

    def run(self, at_once: int) -> None:
        threads = [threading.Thread(target=self._work) for _ in range(at_once)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _work(self) -> None:
        while True:
            with self._lock:
                n = next(self._next, None)
                self.resident.append(resident_mib())
            if n is None:
                return
            outcome, finished = self._ask(self._asked[n], jax.random.key(n))
            with self._lock:
                self.outcomes[outcome] += 1
                if finished:
                    self.first.append(min(x for x in (finished.first_token, finished.first_frame) if x))

    def _ask(self, asked: Asked, key: jax.Array) -> tuple[str, Finished | None]:
        try:
            request = self._engine.submit(asked.prompt, asked.settings, key)
        except RequestError as error:
            return ("refused" if error.cause == asked.cause else f"refused wrongly: {error.cause}"), None
        if asked.cause:
            return f"let in: {asked.cause}", None
        if asked.dropped:
            next(request)
            return "dropped", None
        return "answered", GenerationResult.from_events(request).finished


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


def measure(count: int, bad: float, at_once: int) -> list[dict]:
    cfg = tiny()
    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
        model = jax.jit(lambda key: OmniModel(key, cfg, ComputePolicy(remat="none", attention_block=64)))(
            jax.random.key(0)
        )
    branches = {"llm": model.llm, "vision": model.vision, "audio_head": model.audio_head}
    engine = Engine(branches, cfg, None, slots=8, length=LENGTH)
    engine.warm_up()
    warm = engine.compiles
    asked = list(make_requests(count, bad, cfg))
    clients, began = Clients(engine, asked), time.perf_counter()
    clients.run(at_once)
    seconds, metrics = time.perf_counter() - began, engine.metrics
    good, spoilt = (sum((one.cause is None) is ok and not one.dropped for one in asked) for ok in (True, False))
    quarter = len(clients.resident) // 4
    early, late = (statistics.median(x) for x in (clients.resident[quarter : 2 * quarter], clients.resident[-quarter:]))
    answered, refused = clients.outcomes["answered"], clients.outcomes["refused"]
    others = {key: n for key, n in clients.outcomes.items() if key not in ("answered", "refused", "dropped")}
    left = metrics.in_use + metrics.waiting
    return [
        row("answered", answered, "requests", goal=f"== {good}", ok=answered == good, note=f"{at_once} at a time"),
        row("refused", refused, "requests", goal=f"== {spoilt}", ok=refused == spoilt and not others,
            note=f"each with its cause {others or ''}".strip()),
        row("left_behind", left, "slots", goal="== 0", ok=left == 0,
            note=f"{clients.outcomes['dropped']} answers dropped by their clients"),
        row("memory_growth", late - early, "MiB", goal=f"<= {FLAT_MIB}", ok=late - early <= FLAT_MIB,
            note=f"from {early:.0f} MiB, second quarter to last"),
        row("first_item", statistics.median(clients.first), "s", note="median, waiting for a slot included"),
        row("items_per_s", (metrics.tokens + metrics.frames) / seconds, "tokens and frames/s",
            note=f"{seconds:.1f} s in all, compiling {metrics.compiles - warm} programs for pictures included"),
    ]  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--bad", type=float, default=0.2, help="share of requests that must be refused")
    parser.add_argument("--at-once", type=int, default=8)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    return emit(measure(options.requests, options.bad, options.at_once), options.json)


if __name__ == "__main__":
    sys.exit(main())
