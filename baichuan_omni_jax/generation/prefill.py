"""Prompts in chunks of few sizes, so that reading them compiles few programs; their pictures laid out likewise."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Bool, Int32

from baichuan_omni_jax.config import OmniConfig
from baichuan_omni_jax.generation.events import Prompt
from baichuan_omni_jax.generation.programs import Chunk
from baichuan_omni_jax.generation.requests import Job

LEAST_TOKENS, LEAST_PATCHES = 32, 256


def bucket(count: int, least: int) -> int:
    """The smallest of `least`, 2 `least`, 4 `least`, … that holds `count`."""
    return max(least, 1 << max(count - 1, 0).bit_length())


def chunk_sizes(length: int, most: int) -> list[int]:
    """All sizes of chunks of prompts for a cache of `length`, at most `most` (a power of two) items each."""
    sizes = [LEAST_TOKENS]
    while sizes[-1] < min(bucket(length - 1, LEAST_TOKENS), most):
        sizes.append(2 * sizes[-1])
    return sizes


class Media:
    """Where the media of a prompt stand, position by position: n tokens of a cache of `length`."""

    def __init__(self, prompt: Prompt, codes: Int32[np.ndarray, "a q"], length: int):
        n = len(prompt.tokens)
        self.heard: Bool[np.ndarray, " n"] = np.zeros(n, bool)
        self.codes: Int32[np.ndarray, "n q"] = np.zeros((n, codes.shape[1]), np.int32)
        self.seen: Int32[np.ndarray, " n"] = np.full(n, length, np.int32)
        self.heard[prompt.audio_slots] = True
        self.codes[prompt.audio_slots] = codes
        self.seen[prompt.visual_slots] = prompt.visual_slots


class Joining:
    """Jobs that read their prompts together: `jobs` by device, in row `index` of each, on `devices` in all."""

    def __init__(self, index: int, jobs: Mapping[int, Job], devices: int, length: int):
        self.index, self.jobs = index, dict(jobs)
        self._devices, self._length = devices, length
        self._media: dict[int, Media] = {}
        self._at = 0

    @property
    def done(self) -> bool:
        return self._at >= self._size

    @property
    def _size(self) -> int:
        """Of the longest prompt; jobs may be taken out while they read."""
        return max((job.size for job in self.jobs.values()), default=0)

    def place_media(self, codes: Mapping[int, Int32[np.ndarray, "a q"]]) -> None:
        """Makes chunks have media, with each prompt's `codes`."""
        self._media = {device: Media(job.prompt, codes[device], self._length) for device, job in self.jobs.items()}

    def chunk(self, most: int) -> Chunk:
        """The next at most `most` items of every prompt, on the host."""
        count = min(self._size - self._at, most)
        shape = (self._devices, bucket(count, LEAST_TOKENS))
        chunk = Chunk(
            tokens=np.zeros(shape, np.int32),
            positions=np.full(shape, -1, np.int32),
            last=np.full(self._devices, -1, np.int32),
        )
        for device, job in self.jobs.items():
            here = slice(self._at, min(self._at + count, job.size))
            n = max(here.stop - here.start, 0)
            chunk.tokens[device, :n] = job.prompt.tokens[here]
            chunk.positions[device, :n] = np.arange(here.start, here.start + n)
            if self._at < job.size <= self._at + count:
                chunk.last[device] = n - 1
        if self._media:
            chunk = self._with_media(chunk, slice(self._at, self._at + count))
        self._at += count
        return chunk

    def _with_media(self, chunk: Chunk, here: slice) -> Chunk:
        shape, levels = chunk.tokens.shape, next(iter(self._media.values())).codes.shape[1]
        codes, heard = np.zeros((*shape, levels), np.int32), np.zeros(shape, bool)
        seen = np.full(shape, self._length, np.int32)
        for device, media in self._media.items():
            for whole, part in ((codes, media.codes), (heard, media.heard), (seen, media.seen)):
                whole[device, : len(part[here])] = part[here]
        return chunk._replace(codes=codes, heard=heard, seen=seen)


def lay_pictures(
    prompts: Mapping[int, Prompt], devices: int, shards: int, cfg: OmniConfig, length: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Patches (g, p, v), their grid, their pictures' ids and the slots (g, p / 4) of their tokens, for `devices` rows.

    p is cut into `shards` equal parts, none of which cuts a picture. An unused slot is `length`.
    """
    sizes = {device: np.bincount(prompt.patch_frames)[1:] for device, prompt in prompts.items()}
    p = bucket(max(int(x.sum()) for x in sizes.values()), LEAST_PATCHES)
    while any(_starts(x, p, shards) is None for x in sizes.values()):
        p *= 2
    merged = cfg.vision.merged_patches
    patches = np.zeros((devices, p, cfg.vision.patch_values), np.uint8)
    grid, ids = np.zeros((devices, p, 2), np.int32), np.zeros((devices, p), np.int32)
    slots = np.full((devices, p // merged), length, np.int32)
    for device, prompt in prompts.items():
        pictures = sizes[device]
        starts = _starts(pictures, p, shards)
        at = np.repeat(starts - (np.cumsum(pictures) - pictures), pictures) + np.arange(pictures.sum())
        patches[device, at], grid[device, at], ids[device, at] = prompt.patches, prompt.patch_grid, prompt.patch_frames
        slots[device, at[::merged] // merged] = prompt.visual_slots
    return patches, grid, ids, slots


def _starts(sizes: np.ndarray, places: int, shards: int) -> np.ndarray | None:
    """The first place of each picture, in the first of `shards` equal parts that has room; None if one finds none."""
    room = places // shards
    used, starts = [0] * shards, []
    for size in sizes.tolist():
        shard = next((i for i, n in enumerate(used) if n + size <= room), None)
        if shard is None:
            return None
        starts.append(shard * room + used[shard])
        used[shard] += size
    return np.array(starts, np.int64)
