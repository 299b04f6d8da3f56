"""Prompts on the way into the cache: checked, their audio encoded, their images laid out, their tokens in chunks.

Chunks and image batches come in few sizes, so that reading prompts compiles few programs.
"""

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Int32

from baichuan_omni_jax.audio.encoder import AudioEncoderBranch, WindowEncoder
from baichuan_omni_jax.config import GenerationConfig, OmniConfig
from baichuan_omni_jax.errors import RequestError
from baichuan_omni_jax.generation.events import Prompt
from baichuan_omni_jax.generation.requests import ActiveRequest
from baichuan_omni_jax.omni.batch import BatchSizes, empty_batch


def check_prompt(
    prompt: Prompt, settings: GenerationConfig, cfg: OmniConfig, branches: Collection[str], length: int
) -> None:
    """Raises RequestError: `too_long` for the cache of `length`, `no_branch`, `bad_media`, `bad_message`."""
    # All on the host: a program clamps or drops an index out of range, and answers something else.
    tokens = np.asarray(prompt.tokens)
    if not len(tokens) or tokens.min() < 0 or tokens.max() >= cfg.llm.vocab_size:
        raise RequestError("bad_message", f"a prompt has at least one token, all in 0 .. {cfg.llm.vocab_size - 1}")
    if len(tokens) + 1 > length:
        raise RequestError(
            "too_long", f"the prompt has {len(tokens)} tokens; the cache holds {length}, one of the answer included"
        )
    _check_branches(prompt, settings, cfg, branches)
    _check_audio(prompt, cfg)
    _check_images(prompt, cfg)


def _check_branches(prompt: Prompt, settings: GenerationConfig, cfg: OmniConfig, branches: Collection[str]) -> None:
    speech = settings.speech or int(prompt.tokens[-1]) == cfg.tokens.audiogen_start
    needs = (
        ("vision", len(prompt.patches), "images"),
        ("audio_encoder", len(prompt.mels), "audio"),
        ("audio_head", len(prompt.audio_codes), "audio"),
        ("audio_head", speech, "an answer in speech"),
    )
    for branch, needed, what in needs:
        if needed and branch not in branches:
            raise RequestError("no_branch", f"the request has or asks for {what}, the checkpoint has no {branch}")


def _check_audio(prompt: Prompt, cfg: OmniConfig) -> None:
    codes, sizes = np.asarray(prompt.audio_codes), np.array(cfg.audio.codebook_sizes)
    if codes.shape != (len(prompt.audio_slots), len(sizes)):
        raise RequestError(
            "bad_media", f"audio codes {codes.shape} do not fit {len(prompt.audio_slots)} slots of {len(sizes)} levels"
        )
    if len(codes) and not ((codes >= 0) & (codes < sizes)).all():
        raise RequestError("bad_media", f"an audio code lies outside its codebook (sizes {tuple(sizes.tolist())})")
    _check_slots("audio", prompt.audio_slots, len(prompt.tokens))
    if len(prompt.mels) != len(prompt.mel_places):
        raise RequestError("bad_media", f"{len(prompt.mels)} mel windows have {len(prompt.mel_places)} places")
    for mel, place in zip(prompt.mels, prompt.mel_places, strict=True):
        frames, most = len(mel), cfg.audio.max_mel_frames
        if mel.shape[1:] != (cfg.audio.num_mel_bins,) or frames > most:
            raise RequestError(
                "bad_media", f"a mel window {mel.shape} is not (at most {most}, {cfg.audio.num_mel_bins})"
            )
        if not 0 <= place <= len(codes) - cfg.audio.bridge_length(frames):
            raise RequestError("bad_media", f"code frames of a mel window at {place} lie outside the {len(codes)}")
        # The values too: they would spoil the codes of the whole window without an error.
        if not np.isfinite(mel).all():
            raise RequestError("bad_media", "a mel window holds values that are not finite")


def _check_images(prompt: Prompt, cfg: OmniConfig) -> None:
    patches, merged = np.asarray(prompt.patches), cfg.vision.merged_patches
    if len(prompt.visual_slots) * merged != len(patches):
        raise RequestError(
            "bad_media", f"{len(patches)} patches do not fit {len(prompt.visual_slots)} visual slots of {merged}"
        )
    if len(patches) and patches.shape[1] != cfg.vision.patch_values:
        raise RequestError("bad_media", f"a patch has {patches.shape[1]} values, not {cfg.vision.patch_values}")
    frames = np.asarray(prompt.patch_frames)
    if prompt.patch_grid.shape != (len(patches), 2) or frames.shape != (len(patches),):
        raise RequestError("bad_media", f"patch_grid and patch_frames do not fit {len(patches)} patches")
    if len(frames) and (frames[0] < 1 or (np.diff(frames) < 0).any() or (np.bincount(frames) % merged).any()):
        raise RequestError("bad_media", f"patch_frames must ascend from 1, each image a multiple of {merged} patches")
    _check_slots("visual", prompt.visual_slots, len(prompt.tokens))


def _check_slots(kind: str, slots: np.ndarray, tokens: int) -> None:
    slots = np.asarray(slots)
    if len(slots) and (slots.min() < 0 or slots.max() >= tokens or len(np.unique(slots)) < len(slots)):
        raise RequestError("bad_media", f"{kind} slots are not different positions among the {tokens} tokens")


class PromptAudioEncoder:
    """`AudioEncoderBranch` for prompts, on `mesh`. One program for each of the lengths that windows are padded to."""

    def __init__(self, tokenizer: AudioEncoderBranch, mesh: Mesh):
        self._cfg = tokenizer.cfg
        # One window a device: a prompt has few, and empty places cost as much as taken ones.
        self._encode = WindowEncoder(tokenizer, mesh, windows_per_device=1)

    @property
    def programs(self) -> int:
        """Compiled so far."""
        return count_programs(self._encode.encode)

    def encode(self, prompt: Prompt) -> Int32[np.ndarray, "a q"]:
        """The prompt's `audio_codes`, those of its `mels` filled in. Call it with the mesh set."""
        codes = np.array(prompt.audio_codes, np.int32)
        windows = ((place, mel.T) for place, mel in zip(prompt.mel_places, prompt.mels, strict=True))
        for place, frames in self._encode(windows):
            codes[place : place + len(frames)] = frames
        return codes


def count_programs(jitted: Any) -> int:
    """How many programs a jitted function was compiled to; JAX has no public name for it."""
    return jitted._cache_size()


LEAST_TOKENS, LEAST_PATCHES = 32, 256


def bucket(count: int, least: int) -> int:
    """Returns the smallest of `least`, 2 `least`, 4 `least`, … that holds `count`."""
    return max(least, 1 << max(count - 1, 0).bit_length())


def chunk_sizes(length: int, most: int) -> list[int]:
    """Lists all sizes of chunks of prompts for a cache of `length`, at most `most` (a power of two) items each."""
    sizes = [LEAST_TOKENS]
    while sizes[-1] < min(bucket(length - 1, LEAST_TOKENS), most):
        sizes.append(2 * sizes[-1])
    return sizes


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


class Media:
    """Says where the media of a prompt stand, position by position: n tokens of a cache of `length`."""

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
        """Adds media to the chunks, with each prompt's `codes`."""
        self._media = {
            device: Media(request.prompt, codes[device], self._length) for device, request in self.requests.items()
        }

    def chunk(self, most: int) -> Chunk:
        """Takes the next at most `most` items of every prompt, on the host."""
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
            # Where the prompt ends stands the state that the answer's first item is sampled from.
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
    """Lays out the images of prompts, one prompt a device.

    p, the number of patches, is a power of two and is cut into `shards` equal parts, none of which cuts an image: so
    the vision tower needs no communication.

    Args:
        prompts: by device; devices without one have padding.
        devices: how many rows to lay out.
        shards: parts of a row's patches that lie on different devices.
        cfg: the model's sizes.
        length: of the cache; an unused slot has this number.

    Returns:
        Patches (g, p, v), their rows and columns (g, p, 2), the image of each (g, p), from 1, and the slots (g, p / 4)
        of the tokens that they become.
    """
    # The smallest power of two in whose parts every device's images find room.
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
        # Where each patch goes: its image's first place, and its own place within the image.
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
