"""Rows of prompts and their continuations: requests cut into parts, parts packed into rows, rows laid out in arrays.

A row of the training forward holds a prompt, then all tokens of each continuation but the last, which predicts nothing:

    tokens     p0 p1 p2 | a0 a1 | b0         continuations a0 a1 a2, b0 b1 and c0, which needs no token
    positions   0  1  2    3  4    3
    keys       p0 p1 p2 | p0 p1 p2 a0 a1 | p0 p1 p2 b0

Each continuation is a segment whose keys are the prompt's and its own (`RowKeys`): attention reads a prompt's keys as
often as it has continuations, everything else computes them once. First tokens are all predicted by p2. Several
questions stand side by side.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Int32

from baichuan_omni_jax.generation.events import Prompt
from baichuan_omni_jax.generation.prefill import LEAST_TOKENS, Chunk, Media, bucket

# Rows that are still filled while later ones are.
OPEN_ROWS = 32


class ScoringRow(NamedTuple):
    """g rows of t tokens, s keys and room for m targets, of which row by row the first `used` count.

    `chunk` has tokens, positions (-1 at padding) and media; `q_ids`, `kv_ids`, `kv_pos` are ids and positions of
    `RowKeys`, `key_places` its places. Target j is predicted by the token at `target_places[:, j]`.
    """

    chunk: Chunk
    q_ids: Int32[Array, "g t"]
    kv_ids: Int32[Array, "g s"]
    kv_pos: Int32[Array, "g s"]
    key_places: Int32[Array, "g s"]
    targets: Int32[Array, "g m"]
    target_places: Int32[Array, "g m"]
    used: Int32[Array, " g"]


class RowSizes(NamedTuple):
    """What something takes of a row, or a row holds: tokens, keys, targets."""

    tokens: int
    keys: int
    targets: int

    def plus(self, other: "RowSizes") -> "RowSizes":
        return RowSizes(self.tokens + other.tokens, self.keys + other.keys, self.targets + other.targets)

    def fit(self, limits: "RowSizes") -> bool:
        return self.tokens <= limits.tokens and self.keys <= limits.keys and self.targets <= limits.targets


class Part(NamedTuple):
    """Some continuations of a request, `numbers` of them, that stand behind one prompt in a row."""

    request: int
    prompt: Prompt
    numbers: tuple[int, ...]
    continuations: tuple[Sequence[int], ...]
    sizes: RowSizes


def cut_request(
    number: int, prompt: Prompt, continuations: Sequence[Sequence[int]], limits: RowSizes
) -> Iterator[Part]:
    """Cuts a request into parts that a row can hold: few have more than one.

    Args:
        number: of the request.
        prompt: its prompt, which all of its parts have.
        continuations: each of at least one token.
        limits: of a row. A single continuation may go beyond them: it then has a row that is long enough.

    Yields:
        The parts, which together have every continuation once.
    """
    n, taken = len(prompt.tokens), []
    alone = sizes = RowSizes(n, n, 0)

    def part() -> Part:
        return Part(number, prompt, tuple(taken), tuple(continuations[i] for i in taken), sizes)

    for i, continuation in enumerate(continuations):
        # The last token predicts nothing; a continuation of one token has no place of its own, and no keys.
        own = len(continuation) - 1
        more = RowSizes(own, n + own if own else 0, own + 1)
        if taken and not sizes.plus(more).fit(limits):
            yield part()
            taken, sizes = [], alone
        taken.append(i)
        sizes = sizes.plus(more)
    if taken:
        yield part()


def pack_parts(parts: Sequence[Part], limits: RowSizes) -> list[list[Part]]:
    """Packs parts into rows, the longest first, each into the first of the newest rows with room for it."""
    # Rows of like size come together, and a prompt's parts side by side.
    parts = sorted(parts, key=lambda part: (-part.sizes.tokens, part.request))
    rows: list[list[Part]] = []
    used: list[RowSizes] = []
    for part in parts:
        # Older rows are nearly full; a search through all would grow with the square of the questions.
        newest = range(max(len(rows) - OPEN_ROWS, 0), len(rows))
        row = next((i for i in newest if used[i].plus(part.sizes).fit(limits)), None)
        if row is None:
            rows.append([part])
            used.append(part.sizes)
        else:
            rows[row].append(part)
            used[row] = used[row].plus(part.sizes)
    return rows


def lay_out_rows(rows: Sequence[Sequence[Part]], devices: int, least_targets: int, limits: RowSizes) -> ScoringRow:
    """Lays out rows of text, all of one size; media are `add_media`'s.

    Args:
        rows: one a device, or fewer.
        devices: how many rows the arrays have.
        least_targets: what the room for targets is a multiple of.
        limits: of a row.

    Returns:
        The arrays, targets part after part.
    """
    used = [RowSizes(*np.sum([part.sizes for part in parts], 0).tolist()) for parts in rows]
    t = bucket(max(sizes.tokens for sizes in used), LEAST_TOKENS)
    s = bucket(max(sizes.keys for sizes in used), t)
    # The room for targets is the same for all rows, as it costs nothing where it is not used.
    m = bucket(limits.targets, least_targets)

    # Numpy's arrays where JAX's are declared: a jitted function takes either.
    def zeros(*size: int) -> Any:
        return np.zeros((devices, *size), np.int32)

    chunk, targets_used = Chunk(zeros(t), zeros(t) - 1, zeros() - 1), zeros()
    row = ScoringRow(chunk, zeros(t), zeros(s), zeros(s), zeros(s), zeros(m), zeros(m), targets_used)
    for device, parts in enumerate(rows):
        writer = _RowWriter(row, device)
        for part in parts:
            writer.add(part)
        targets_used[device] = writer.targets
    return row


def add_media(chunk: Chunk, media: Mapping[int, tuple[Prompt, np.ndarray]], length: int) -> Chunk:
    """Adds what stands in the places of media.

    Args:
        chunk: the rows' tokens.
        media: by row, its prompts as one (`join_prompts`) and their code frames.
        length: of the buffer of images; the slot of what is no image.

    Returns:
        The chunk with codes and places of images.
    """
    shape, levels = chunk.tokens.shape, next(iter(media.values()))[1].shape[1]
    codes: Any = np.zeros((*shape, levels), np.int32)
    is_audio: Any = np.zeros(shape, bool)
    visual_slots: Any = np.full(shape, length, np.int32)
    for device, (prompt, frames) in media.items():
        found, n = Media(prompt, frames, length), len(prompt.tokens)
        codes[device, :n], is_audio[device, :n] = found.codes, found.is_audio
        visual_slots[device, :n] = found.visual_slots
    return chunk._replace(codes=codes, is_audio=is_audio, visual_slots=visual_slots)


class JoinedPrompt(NamedTuple):
    """The prompts of a row as one `Prompt`."""

    tokens: np.ndarray
    audio_codes: np.ndarray
    audio_slots: np.ndarray
    patches: np.ndarray
    patch_grid: np.ndarray
    patch_frames: np.ndarray
    visual_slots: np.ndarray
    mels: tuple[np.ndarray, ...]
    mel_places: tuple[int, ...]


def join_prompts(parts: Sequence[Part]) -> JoinedPrompt:
    """Joins the prompts of a row, each at its place there; between them stand continuations, as zeros."""
    at = frames = codes = 0
    columns: dict[str, list] = {name: [] for name in JoinedPrompt._fields}
    for part in parts:
        prompt, size = part.prompt, part.sizes[0]
        columns["tokens"].append(np.pad(prompt.tokens, (0, size - len(prompt.tokens))))
        for name in ("audio_slots", "visual_slots"):
            columns[name].append(getattr(prompt, name) + at)
        for name in ("audio_codes", "patches", "patch_grid"):
            columns[name].append(getattr(prompt, name))
        # Images are numbered on through the row, and windows of audio point into the codes of all.
        columns["patch_frames"].append(prompt.patch_frames + frames)
        columns["mels"] += prompt.mels
        columns["mel_places"] += [place + codes for place in prompt.mel_places]
        frames += int(prompt.patch_frames.max(initial=0))
        codes += len(prompt.audio_codes)
        at += size
    lists: Any = {name: tuple(columns.pop(name)) for name in ("mels", "mel_places")}
    return JoinedPrompt(**{name: np.concatenate(arrays) for name, arrays in columns.items()}, **lists)


class _RowWriter:
    """Writes parts into one row of the arrays, part after part."""

    def __init__(self, row: ScoringRow, device: int):
        self._chunk, self._row, self._device = row.chunk, row, device
        self._tokens = self._keys = self._segments = self.targets = 0

    def add(self, part: Part) -> None:
        """Adds the prompt, then all tokens but the last of each continuation, and their targets."""
        prompt = np.asarray(part.prompt.tokens)
        places = np.arange(self._tokens, self._tokens + len(prompt))
        self._put_tokens(prompt, 0)
        self._put_keys(places)
        for continuation in part.continuations:
            ids = np.asarray(continuation, np.int32)
            own = np.arange(self._tokens, self._tokens + len(ids) - 1)
            if len(own):
                self._put_tokens(ids[:-1], len(prompt))
                self._put_keys(np.concatenate([places, own]))
            # The prompt's last token predicts the first, and each of its own the next.
            here = slice(self.targets, self.targets + len(ids))
            self._put(self._row.targets, here, ids)
            self._put(self._row.target_places, here, np.concatenate([places[-1:], own]))
            self.targets += len(ids)

    def _put_tokens(self, ids: np.ndarray, position: int) -> None:
        """Puts the tokens of the next segment, whose first stands at `position` of its document."""
        self._segments += 1
        here = slice(self._tokens, self._tokens + len(ids))
        self._put(self._chunk.tokens, here, ids)
        self._put(self._chunk.positions, here, position + np.arange(len(ids)))
        self._put(self._row.q_ids, here, self._segments)
        self._tokens += len(ids)

    def _put_keys(self, places: np.ndarray) -> None:
        """Puts the keys that the segment sees: its document's tokens, in order."""
        here = slice(self._keys, self._keys + len(places))
        self._put(self._row.key_places, here, places)
        self._put(self._row.kv_ids, here, self._segments)
        self._put(self._row.kv_pos, here, np.arange(len(places)))
        self._keys += len(places)

    def _put(self, array: Any, here: slice, values: Any) -> None:
        array[self._device, here] = values
