"""Tables of clips: fixed-size records, sorted by the clip's hash, searched where they lie on disk.

A clip's window is known by the first 128 bits of the SHA-256 of its file and by its number. Among 10^8 clips two share
such a prefix with a probability of 10^-23.
"""

from bisect import bisect_left
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int64, Shaped

# SHA-256 of the clip's bytes in hex, number of the window from 0.
CodeKey = tuple[str, int]

_KEY = [("high", "<u8"), ("low", "<u8"), ("window", "<u4")]
# 32 bytes a window: `length` code frames from row `start` of the frames on.
ENTRY = np.dtype([*_KEY, ("length", "<u4"), ("start", "<i8")])
# A window that a mixture refers to: how many code frames it will have, and the first document that holds it.
REFERENCE = np.dtype([*_KEY, ("length", "<u4"), ("source", "<u4"), ("document", "<i8")])


def key_fields(key: CodeKey) -> tuple[int, int, int]:
    """`high`, `low` and `window` of a key."""
    return int(key[0][:16], 16), int(key[0][16:32], 16), key[1]


def find(table: Shaped[np.ndarray, "n"], key: CodeKey) -> tuple | None:
    """The record of `key` in a sorted table as a tuple, or None. Reads about log2(n) records."""
    fields = key_fields(key)
    place = bisect_left(table, fields, key=_key_of)
    if place == len(table) or _key_of(table[place]) != fields:
        return None
    return table[place].item()


def _key_of(record: np.void) -> tuple[int, int, int]:
    return record.item()[:3]


def order_of(*tables: Shaped[np.ndarray, "_"]) -> Int64[np.ndarray, "n"]:
    """The order that sorts the tables, one after the other, by their keys; equal ones keep theirs."""
    return np.lexsort([np.concatenate([table[name] for table in tables]) for name in ("window", "low", "high")])


def new_records(table: Shaped[np.ndarray, "n"], known: Shaped[np.ndarray, "_"]) -> Bool[np.ndarray, "n"]:
    """Which records of a table are the first with their key, and have one that is not in `known` either."""
    order = order_of(known, table)
    repeated = np.ones(max(len(order) - 1, 0), bool)
    for name, _ in _KEY:
        column = np.concatenate([known[name], table[name]])[order]
        repeated &= column[1:] == column[:-1]
    new = np.ones(len(order), bool)
    new[order[1:]] = ~repeated
    return new[len(known) :]


def save_table(path: Path, table: Shaped[np.ndarray, "n"]) -> None:
    """Writes a table as .npy beside its place and renames it."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        np.save(file, table)
    partial.replace(path)


def open_table(path: Path, dtype: np.dtype) -> Shaped[np.ndarray, "n"]:
    """A saved table, memory-mapped. Raises OSError or ValueError when it cannot be read."""
    table = np.load(path, mmap_mode="r")
    if table.dtype != dtype or table.ndim != 1:
        raise ValueError(f"{path.name} holds {table.dtype}, not a table of {dtype.itemsize} bytes a record")
    return table
