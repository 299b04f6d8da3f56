"""Packed rows: encoded documents laid side by side in arrays of fixed size (the fields of docs/reference/batch.md)."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int32, Shaped

from baichuan_omni_jax.branches import BRANCHES
from baichuan_omni_jax.config import Budgets, OmniConfig
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
        self._at = {"token": 0, "audio": 0, "target": 0, "patch": 0, "mel": 0}
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
        tokens = len(document.tokens)
        self._put("token", document, ("tokens", "text_targets", "text_weights"))
        place = slice(start, start + tokens)
        self._row["positions"][place] = np.arange(tokens)
        self._row["segment_ids"][place] = self._segments
        self._row["document_ids"][place] = number
        self._row["source_ids"][place] = source
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
