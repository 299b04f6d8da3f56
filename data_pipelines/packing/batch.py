"""Packed rows: encoded documents laid side by side in arrays of fixed size (the fields of docs/reference/batch.md).

Which context shard gets which tokens of a row (`ContextPlan`): blocks of tokens, dealt out by their attention work. A
shard's queries wait for the slowest shard, and a causal row's later blocks see more keys. A block's work is the number
of key blocks that the attention kernel visits for its queries. Each shard gets as many blocks as the others, longest
first to the shard with least work so far; swaps of two blocks then even out what is left. A row of 8 blocks on 2
shards, one document of 6 blocks, one of 1, and padding:

    block        0  1  2  3  4  5  6  7
    work         1  2  3  4  5  6  1  0
    contiguous   0  0  0  0  1  1  1  1     shards do 10 and 12
    balanced     1  0  0  1  1  0  1  0     shards do 11 and 11; the row arrives as blocks 1 2 5 7, 0 3 4 6
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Int, Int32, Int64, Shaped

from baichuan_omni_jax.branches import BRANCHES
from baichuan_omni_jax.config import Budgets, DataConfig, OmniConfig
from baichuan_omni_jax.errors import ConfigError
from baichuan_omni_jax.omni.batch import FIELDS, BatchSizes, empty_batch
from data_pipelines.documents.document import EncodedDocument
from data_pipelines.packing.row_limits import MelSlots

Batch = dict[str, Shaped[np.ndarray, "b ..."]]


def empty_rows(
    rows: int, budgets: Budgets, omni: OmniConfig, mel_frames: int = 0, slots: MelSlots | None = None
) -> Batch:
    """Makes rows of padding: every field of `omni.batch`, unused slots pointing one past the row.

    Args:
        rows: how many.
        budgets: what a row holds.
        omni: the model's sizes.
        mel_frames: frames of a mel slot, where there are `budgets.mel_windows`.
        slots: names the targets that lie beside each mel slot.

    Returns:
        Field name -> array, rows first.
    """
    # Sizes come from the budgets alone: every step has the same shapes, and is compiled once.
    sizes = BatchSizes.from_config(budgets, omni, mel_frames)
    # Every row has the fields of every branch, but mels only where the audio tokenizer runs in the step.
    absent = () if budgets.mel_windows else BRANCHES["audio_encoder"].batch_fields
    batch = empty_batch([name for name in FIELDS if name not in absent], rows, sizes)
    if budgets.mel_windows and slots:
        for name, target in slots.targets.items():
            shape = rows, budgets.mel_windows, slots.target_frames(name, mel_frames), target.mels
            batch[f"target_{name}"] = np.zeros(shape, np.float32)
            batch[f"target_{name}_lengths"] = np.zeros(shape[:2], np.int32)
    return batch


class RowWriter:
    """Fills one row of a batch, document after document.

    Args:
        batch: rows of padding (`empty_rows`), written in place.
        row: which of them.
        mels: what mel slots show of longer windows; needed where documents come with mels.
        key: stands for the documents of the row: the place of crops depends on it (`row_key`).
    """

    def __init__(self, batch: Batch, row: int, mels: MelSlots | None = None, key: int = 0):
        self._row = {name: array[row] for name, array in batch.items()}
        self._mels, self._key = mels, key
        self._at = {"token": 0, "text": 0, "audio": 0, "target": 0, "patch": 0, "mel": 0}
        self._segments = self._frames = 0

    def add(
        self,
        document: EncodedDocument,
        *,
        source: int,
        number: int,
        image_starts: Int32[np.ndarray, "images"] | None = None,
    ) -> None:
        """Appends a document that fits: segment ids ascend from 1, positions restart, slots move to its place.

        Args:
            document: its arrays, slots counted from its own first token.
            source: the number of its source.
            number: its number in the source.
            image_starts: the first patch of each of its images; without it they follow those that are there.
        """
        start = self._at["token"]
        self._segments += 1
        # Tokens, and what is said of each: positions restart, so that a document does not know its place in the row.
        tokens = len(document.tokens)
        self._put("token", document, ("tokens", "text_targets", "text_weights"))
        place = slice(start, start + tokens)
        self._row["positions"][place] = np.arange(tokens)
        self._row["segment_ids"][place] = self._segments
        self._row["document_ids"][place] = number
        self._row["source_ids"][place] = source
        if len(self._row["text_target_index"]):
            self._put_slots("text", "text_target_index", np.flatnonzero(document.text_weights), start)
        self._at["token"] += tokens

        # Mels before codes: a slot names the place of its first code frame, which is where codes go next.
        if document.mels:
            self._put_mels(document, source, number)
        self._put("audio", document, ("audio_codes",))
        self._put_slots("audio", "audio_index", document.audio_slots, start)
        self._put("target", document, ("audio_targets", "audio_weights"))
        targets = slice(self._at["target"], self._at["target"] + len(document.audio_targets))
        self._row["audio_target_sources"][targets] = source
        self._put_slots("target", "audio_target_index", document.audio_target_slots, start)
        self._put_images(document, image_starts, start)

    def skip(self, tokens: int) -> None:
        """Leaves padding in the place of a document that could not be decoded."""
        self._at["token"] += tokens

    def _put(self, counter: str, document: EncodedDocument, names: Sequence[str]) -> None:
        for name in names:
            values = getattr(document, name)
            self._row[name][self._at[counter] : self._at[counter] + len(values)] = values

    def _put_images(self, document: EncodedDocument, image_starts: np.ndarray | None, start: int) -> None:
        if not len(document.patches):
            return
        # Without a plan images follow those that are there; with one each has its place in a media shard.
        sizes = np.array(document.lengths.image_patches, np.int64)
        first_in_document = np.cumsum(sizes) - sizes
        if image_starts is None:
            image_starts = self._at["patch"] + first_in_document
        # Every patch moves with its image: patches of one image stay neighbors, groups of merged ones too.
        patches = np.repeat(image_starts - first_in_document, sizes) + np.arange(len(document.patches))
        self._row["patches"][patches] = document.patches
        self._row["patch_grid"][patches] = document.patch_grid
        self._row["patch_segments"][patches] = document.patch_frames + self._frames
        self._frames += len(sizes)
        self._at["patch"] = max(self._at["patch"], int(patches.max()) + 1)
        # One index a visual token: that of its first patch, in units of tokens.
        merged = len(document.patches) // len(document.visual_slots)
        self._row["visual_index"][patches[::merged] // merged] = document.visual_slots + start

    def _put_mels(self, document: EncodedDocument, *key: int) -> None:
        if self._mels is None:
            raise ValueError("rows with mels are written with the MelSlots that say what they show")
        size = self._row["mel"].shape[1]
        for window, (mel, place) in enumerate(zip(document.mels, document.mel_places, strict=True)):
            slot = self._at["mel"] + window
            # A window longer than its slot is cropped at a place that row and document decide, the same on every host.
            shown, skipped = self._mels.show(mel, size, (self._key, *key, window))
            self._row["mel"][slot, : len(shown)] = shown
            self._row["mel_lengths"][slot] = len(shown)
            self._row["mel_owner"][slot] = self._segments
            self._row["mel_audio"][slot] = self._at["audio"] + place + skipped
            if document.waves:
                for name, target in self._mels.make_targets(document.waves[window], size, skipped).items():
                    self._row[f"target_{name}"][slot, : len(target)] = target
                    self._row[f"target_{name}_lengths"][slot] = len(target)
        self._at["mel"] += len(document.mels)

    def _put_slots(self, counter: str, name: str, slots: np.ndarray, start: int) -> None:
        self._row[name][self._at[counter] : self._at[counter] + len(slots)] = slots + start
        self._at[counter] += len(slots)


TOKEN_FIELDS = (
    "tokens",
    "positions",
    "segment_ids",
    "document_ids",
    "source_ids",
    "text_targets",
    "text_weights",
)
"""Fields (b, t) that are split over context shards."""

INDEX_FIELDS = ("text_target_index", "audio_index", "audio_target_index", "visual_index")
"""Fields that hold slots of the row; t stands for unused."""


@dataclass(frozen=True)
class ContextPlan:
    """How rows are dealt to `shards` context shards: by `kind`, in blocks of `block` tokens."""

    shards: int = 1
    block: int = 512
    kind: Literal["balanced", "contiguous"] = "balanced"

    def order(self, documents: Sequence[int], length: int) -> Int32[np.ndarray, "t"]:
        """Orders the slots of a row of documents of these lengths: shard after shard, each ascending."""
        slots = np.arange(length, dtype=np.int32)
        if self.shards == 1 or self.kind == "contiguous":
            return slots
        work = block_work(*lay_documents(documents, length), self.block)
        return slots.reshape(-1, self.block)[deal_blocks(work, self.shards).ravel()].ravel()

    def deal(self, batch: Batch, documents: Sequence[Sequence[int]]) -> Batch:
        """Deals a batch: its token fields in the new order, and its indices pointing to the new slots.

        `documents` has the lengths of each row's documents as planned, those lost while decoding included: so hosts
        that share a row agree on its order whatever each of them could read.
        """
        if self.shards == 1 or self.kind == "contiguous":
            return batch
        length = batch["tokens"].shape[1]
        # `orders` says which old slot stands where; `slots` is its inverse, one past the row for unused.
        orders = np.stack([self.order(row, length) for row in documents])
        unused = np.full((len(orders), 1), length)
        slots = np.append(np.argsort(orders, axis=1), unused, axis=1).astype(np.int32)
        dealt = {name: np.take_along_axis(batch[name], orders, 1) for name in TOKEN_FIELDS}
        moved = {name: np.take_along_axis(slots, batch[name], 1) for name in INDEX_FIELDS}
        return batch | dealt | moved


def context_plan(config: DataConfig, shards: int) -> ContextPlan:
    """Returns the plan of a run on a mesh with `shards` along `context`. Raises ConfigError as `check_context` does."""
    check_context(config, shards)
    return ContextPlan(shards, config.context_block, config.context_plan)


def check_context(config: DataConfig, shards: int) -> None:
    """Raises ConfigError when rows cannot be dealt to `shards` context shards as `config` asks."""
    if config.context_block < 1:
        raise ConfigError(f"data.context_block {config.context_block} must be at least 1")
    tokens = config.budgets.tokens
    if shards > 1 and tokens % (shards * config.context_block):
        raise ConfigError(
            f"data.budgets.tokens {tokens} is not divisible by mesh.context {shards} x data.context_block "
            f"{config.context_block}: every shard gets the same number of whole blocks"
        )


def lay_documents(documents: Sequence[int], length: int) -> tuple[Int32[np.ndarray, "t"], Int32[np.ndarray, "t"]]:
    """Returns the segment ids and positions of a row of documents of these lengths, then padding."""
    sizes = np.array(documents, np.int64)
    ids = np.repeat(np.arange(1, len(sizes) + 1), sizes)
    positions = np.arange(len(ids)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    padding = (0, length - len(ids))
    return np.pad(ids, padding).astype(np.int32), np.pad(positions, padding).astype(np.int32)


def block_work(
    segment_ids: Int32[np.ndarray, "t"], positions: Int32[np.ndarray, "t"], block: int
) -> Int64[np.ndarray, "blocks"]:
    """Counts the key blocks that causal attention visits for each block of queries; 0 for a block of padding.

    The rule of `kernels.flash_attention.plan_blocks` with blocks of this size for queries and keys: a pair of blocks
    is visited when the ranges of their segment ids meet and the first key is not after the last query.
    """
    # A pair is visited when the id ranges meet, both blocks hold tokens, and some key is not after some query.
    first_id, first_position, last_id, last_position = _block_bounds(segment_ids, positions, block)
    meet = (first_id <= last_id[:, None]) & (first_id[:, None] <= last_id) & (last_id > 0) & (last_id[:, None] > 0)
    earlier = (first_id == last_id[:, None]) & (first_position <= last_position[:, None])
    return (meet & ((first_id < last_id[:, None]) | earlier)).sum(1)


def _block_bounds(segment_ids: np.ndarray, positions: np.ndarray, block: int) -> tuple[np.ndarray, ...]:
    """Bounds each block, of its tokens that are no padding: the first (id, position) and the last, compared in that
    order.
    """
    ids, positions = segment_ids.reshape(-1, block), positions.reshape(-1, block)
    latest = np.iinfo(np.int32).max
    first_id = np.where(ids > 0, ids, latest).min(1)
    last_id = ids.max(1)
    first_position = np.where(ids == first_id[:, None], positions, latest).min(1)
    last_position = np.where((ids > 0) & (ids == last_id[:, None]), positions, -1).max(1)
    return first_id, first_position, last_id, last_position


def deal_blocks(work: Int[np.ndarray, "blocks"], shards: int) -> Int64[np.ndarray, "shards per_shard"]:
    """Deals block numbers to shards, ascending: equal counts, nearly equal sums of work. Shards must divide blocks."""
    dealt = np.zeros((shards, len(work) // shards), np.int64)
    filled, load = np.zeros(shards, np.int64), np.zeros(shards, np.int64)
    # Longest block first to the shard with least work so far, as long as it has room.
    for number in np.argsort(-work, kind="stable"):
        open_load = np.where(filled < dealt.shape[1], load, np.iinfo(np.int64).max)
        shard = int(np.argmin(open_load))
        dealt[shard, filled[shard]] = number
        filled[shard] += 1
        load[shard] += work[number]
    _swap_blocks(dealt, work)
    return np.sort(dealt, axis=1)


def _swap_blocks(dealt: Int64[np.ndarray, "shards per_shard"], work: Int[np.ndarray, "blocks"]) -> None:
    """Swaps a block of the shard with most work for a lighter one of another, as long as the most gets less."""
    while True:
        load = work[dealt].sum(1)
        most = int(np.argmax(load))
        # All swaps at once: what the most and the other shard would have after each.
        given = work[dealt[most]][:, None, None] - work[dealt]  # (own block, shard, its block)
        worse = np.maximum(load[most] - given, load[:, None] + given)
        worse[:, most] = load[most]
        own, shard, other = np.unravel_index(np.argmin(worse), worse.shape)
        if worse[own, shard, other] >= load[most]:
            return
        dealt[most, own], dealt[shard, other] = dealt[shard, other], dealt[most, own]
