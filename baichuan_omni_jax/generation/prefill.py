"""Prompts in chunks of few sizes, so that reading them compiles few programs; their images laid out likewise."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Bool, Int32

from baichuan_omni_jax.config import OmniConfig
from baichuan_omni_jax.generation.events import Prompt
from baichuan_omni_jax.generation.programs import Chunk
from baichuan_omni_jax.generation.requests import ActiveRequest
from baichuan_omni_jax.omni.batch import BatchSizes, empty_batch

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
        self.is_audio: Bool[np.ndarray, " n"] = np.zeros(n, bool)
        self.codes: Int32[np.ndarray, "n q"] = np.zeros((n, codes.shape[1]), np.int32)
        self.visual_slots: Int32[np.ndarray, " n"] = np.full(n, length, np.int32)
        self.is_audio[prompt.audio_slots] = True
        self.codes[prompt.audio_slots] = codes
        self.visual_slots[prompt.visual_slots] = prompt.visual_slots


class PrefillGroup:
    """Requests that read their prompts together: `requests` by device, in row `index` of each, on `devices` in all."""

    def __init__(self, index: int, requests: Mapping[int, ActiveRequest], devices: int, length: int):
        self.index, self.requests = index, dict(requests)
        self._devices, self._length = devices, length
        self._media: dict[int, Media] = {}
        self._at = 0

    @property
    def done(self) -> bool:
        return self._at >= self._size

    @property
    def _size(self) -> int:
        """Of the longest prompt; requests may be taken out while they read."""
        return max((request.size for request in self.requests.values()), default=0)

    def place_media(self, codes: Mapping[int, Int32[np.ndarray, "a q"]]) -> None:
        """Makes chunks have media, with each prompt's `codes`."""
        self._media = {
            device: Media(request.prompt, codes[device], self._length) for device, request in self.requests.items()
        }

    def chunk(self, most: int) -> Chunk:
        """The next at most `most` items of every prompt, on the host."""
        count = min(self._size - self._at, most)
        shape = (self._devices, bucket(count, LEAST_TOKENS))
        # Numpy's arrays where JAX's are declared: a jitted function takes either.
        tokens: Any = np.zeros(shape, np.int32)
        positions: Any = np.full(shape, -1, np.int32)
        last: Any = np.full(self._devices, -1, np.int32)
        for device, request in self.requests.items():
            here = slice(self._at, min(self._at + count, request.size))
            n = max(here.stop - here.start, 0)
            tokens[device, :n] = request.prompt.tokens[here]
            positions[device, :n] = np.arange(here.start, here.start + n)
            if self._at < request.size <= self._at + count:
                last[device] = n - 1
        chunk = Chunk(tokens, positions, last)
        if self._media:
            chunk = self._with_media(chunk, slice(self._at, self._at + count))
        self._at += count
        return chunk

    def _with_media(self, chunk: Chunk, here: slice) -> Chunk:
        shape, levels = chunk.tokens.shape, next(iter(self._media.values())).codes.shape[1]
        codes, is_audio = np.zeros((*shape, levels), np.int32), np.zeros(shape, bool)
        visual_slots = np.full(shape, self._length, np.int32)
        for device, media in self._media.items():
            for whole, part in ((codes, media.codes), (is_audio, media.is_audio), (visual_slots, media.visual_slots)):
                whole[device, : len(part[here])] = part[here]
        return chunk._replace(codes=codes, is_audio=is_audio, visual_slots=visual_slots)


def lay_out_images(
    prompts: Mapping[int, Prompt], devices: int, shards: int, cfg: OmniConfig, length: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Patches (g, p, v), their grid, their images' ids and the slots (g, p / 4) of their tokens, for `devices` rows.

    p is cut into `shards` equal parts, none of which cuts an image. An unused slot is `length`.
    """
    sizes = {device: np.bincount(prompt.patch_frames)[1:] for device, prompt in prompts.items()}
    p = bucket(max(int(x.sum()) for x in sizes.values()), LEAST_PATCHES)
    while any(_starts(x, p, shards) is None for x in sizes.values()):
        p *= 2
    merged = cfg.vision.merged_patches
    # The fields that the vision branch reads of a training batch, in the order of its program's arguments.
    names = ("patches", "patch_grid", "patch_segments", "visual_index")
    row = BatchSizes(tokens=length, patches=p, visual_tokens=p // merged, patch_values=cfg.vision.patch_values)
    patches, grid, ids, slots = empty_batch(names, devices, row).values()
    for device, prompt in prompts.items():
        images = sizes[device]
        starts = _starts(images, p, shards)
        assert starts is not None  # p was doubled until all found room
        at = np.repeat(starts - (np.cumsum(images) - images), images) + np.arange(images.sum())
        patches[device, at], grid[device, at], ids[device, at] = prompt.patches, prompt.patch_grid, prompt.patch_frames
        slots[device, at[::merged] // merged] = prompt.visual_slots
    return patches, grid, ids, slots


def _starts(sizes: np.ndarray, places: int, shards: int) -> np.ndarray | None:
    """The first place of each image, in the first of `shards` equal parts that has room; None if one finds none."""
    room = places // shards
    used, starts = [0] * shards, []
    for size in sizes.tolist():
        shard = next((i for i, n in enumerate(used) if n + size <= room), None)
        if shard is None:
            return None
        starts.append(shard * room + used[shard])
        used[shard] += size
    return np.array(starts, np.int64)
