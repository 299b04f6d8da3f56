"""`baichuan-omni train`, which also tells the documents of every row that is on the mesh: WORKDIR/documents.jsonl.

One line a step: a list of rows, each a list of [source, document] in the order in which the row was packed. Of several
hosts each tells those of its own devices, in documents-HOST.jsonl.
"""

import json
import sys
from pathlib import Path

import jax
import numpy as np

from baichuan_omni_jax.cli.main import main
from baichuan_omni_jax.train import run as loop
from baichuan_omni_jax.train.input import BatchPlacer

WORKDIR = Path(sys.argv[sys.argv.index("--workdir") + 1]) if "--workdir" in sys.argv else Path()


class RecordingPlacer(BatchPlacer):
    def __call__(self, batch):
        placed = super().__call__(batch)
        fields = [rows_here(placed[name]) for name in ("segment_ids", "source_ids", "document_ids")]
        own = f"documents-{jax.process_index()}.jsonl" if jax.process_count() > 1 else "documents.jsonl"
        with open(WORKDIR / own, "a") as file:
            file.write(json.dumps([documents(*row) for row in zip(*fields, strict=True)]) + "\n")
        return placed


def rows_here(field: jax.Array) -> np.ndarray:
    """The rows of this host; of several hosts, on a mesh that splits nothing but rows."""
    if jax.process_count() == 1:
        return np.asarray(field)
    parts = {shard.index[0].start: np.asarray(shard.data) for shard in field.addressable_shards}
    return np.concatenate([parts[start] for start in sorted(parts)])


def documents(segments: np.ndarray, sources: np.ndarray, numbers: np.ndarray) -> list[list[int]]:
    """A row's documents by ascending segment id: its tokens may be dealt to context shards in any order."""
    _, first = np.unique(segments, return_index=True)
    return [[int(sources[slot]), int(numbers[slot])] for slot in first if segments[slot] > 0]


if __name__ == "__main__":
    loop.BatchPlacer = RecordingPlacer
    sys.exit(main(["train", *sys.argv[1:]]))
