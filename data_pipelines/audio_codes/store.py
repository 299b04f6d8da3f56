"""Reads a store of audio codes and reports what is damaged in it; its tables of clips, searched where they lie on disk.

A window of a clip is known by the first 128 bits of the SHA-256 of its file and by its number. Among 10^8 clips two
share such a prefix with a probability of 10^-23. Tables are records of one size, sorted by that key.
"""

import errno
import hashlib
import json
import os
from bisect import bisect_left
from pathlib import Path
from typing import Any, cast

import numpy as np
import tensorstore as ts
from etils import epath
from jaxtyping import Bool, Int32, Int64, Shaped

from baichuan_omni_jax.errors import ConfigError
from baichuan_omni_jax.storage import PATIENCE, atomic_write, patiently
from baichuan_omni_jax.storage.cache import describe_file, fetch_file, list_files
from data_pipelines.errors import SampleError

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


def find(table: Shaped[np.ndarray, " n"], key: CodeKey) -> tuple | None:
    """Returns the record of `key` in a sorted table as a tuple, or None. Reads about log2(n) records."""
    fields = key_fields(key)
    place = bisect_left(table, fields, key=_key_of)
    if place == len(table) or _key_of(table[place]) != fields:
        return None
    return table[place].item()


def _key_of(record: np.void) -> tuple[int, int, int]:
    # The item of a structured record is a tuple; numpy types it as bytes too.
    return cast(tuple, record.item())[:3]


def order_of(*tables: Shaped[np.ndarray, " _"]) -> Int64[np.ndarray, " n"]:
    """Returns the order that sorts the tables, one after the other, by their keys; equal ones keep theirs."""
    return np.lexsort([np.concatenate([table[name] for table in tables]) for name in ("window", "low", "high")])


def new_records(table: Shaped[np.ndarray, " n"], known: Shaped[np.ndarray, " _"]) -> Bool[np.ndarray, " n"]:
    """Returns which records of a table are the first with their key, and have one that is not in `known` either."""
    # Sorted together, equal keys stand side by side, those of `known` first: a record is new where it differs from the
    # one before.
    order = order_of(known, table)
    repeated = np.ones(max(len(order) - 1, 0), bool)
    for name, _ in _KEY:
        column = np.concatenate([known[name], table[name]])[order]
        repeated &= column[1:] == column[:-1]
    new = np.ones(len(order), bool)
    new[order[1:]] = ~repeated
    return new[len(known) :]


def save_table(path: Path, table: Shaped[np.ndarray, " n"]) -> None:
    """Writes a table as .npy beside its place and renames it."""
    with atomic_write(path, "wb") as file:
        np.save(file, table)


def open_table(path: Path, dtype: np.dtype) -> Shaped[np.ndarray, " n"]:
    """Returns a saved table, memory-mapped. Raises OSError or ValueError when it cannot be read."""
    table = np.load(path, mmap_mode="r")
    if table.dtype != dtype or table.ndim != 1:
        raise ValueError(f"{path.name} holds {table.dtype}, not a table of {dtype.itemsize} bytes a record")
    return table


FORMAT = 2  # of meta.json: raise it when a store holds something else than before
UNUSED = -1  # of frames that no window has
_CACHE_BYTES = 16 << 20
_SECONDS = 60.0  # for one answer of TensorStore, whose own retries go on without end
# Kinds of errors of TensorStore that are of the bytes; the others are of storage.
_DAMAGED = ("DATA_LOSS", "FAILED_PRECONDITION", "INVALID_ARGUMENT", "NOT_FOUND", "OUT_OF_RANGE")


class CodeStore:
    """Codes by clip and window. Picklable: a copy opens the files itself; frames are opened when first read.

    A window's codes are found by binary search in the index: 32 bytes a window, which stay on disk and are shared by
    all processes that read them.
    """

    def __init__(
        self,
        path: Path | epath.Path,
        fingerprint: str | None = None,
        patience: float = PATIENCE,
        local: Path | None = None,
    ):
        """Opens the store at `path`.

        Args:
            path: its folder; or, with `local`, a URL.
            fingerprint: the tokenizer that it must be of.
            patience: seconds for which reads are tried.
            local: the folder of this machine that the index of a URL is copied to.

        Raises:
            ConfigError: there is no store, it is of another tokenizer, or a file of it, which is named, is missing or
                not of its size.
            StorageError: storage does not answer.
        """
        self.path, self.patience, self._local = path, patience, local
        self.meta: dict = {}
        self._open()
        if fingerprint is not None and self.meta["fingerprint"] != fingerprint:
            raise ConfigError(
                f"audio code store {self.path} was written by tokenizer {self.meta['fingerprint']}, "
                f"not by {fingerprint}, the one in use"
            )
        self._check_sizes()

    def _open(self) -> None:
        try:
            self.meta, self.index = patiently(self._read_index, f"reading {self.path}", self.patience)
        except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
            raise ConfigError(f"audio code store {self.path} cannot be read: {error}") from error
        self._frames = None

    def _read_index(self) -> tuple[dict, Shaped[np.ndarray, " n"]]:
        # A worker has been told what there is.
        meta = self.meta or read_meta(self.path)
        if self._local is None:
            return meta, open_table(Path(self.path) / meta["index"], ENTRY)
        # Searched in place, which a bucket cannot be: 32 bytes a window, copied once for the machine.
        table = self._local / f"{meta['index_sha256'][:16]}-{meta['index']}"
        if not table.exists():
            self._local.mkdir(parents=True, exist_ok=True)
            with atomic_write(table, "wb", suffix=f".{os.getpid()}.partial") as file:
                fetch_file(describe_file(f"{self.path}/{meta['index']}"), file.fileno(), self.patience)
        return meta, open_table(table, ENTRY)

    def __len__(self) -> int:
        """Windows that have codes."""
        return len(self.index)

    def __contains__(self, key: CodeKey) -> bool:
        return find(self.index, key) is not None

    def __getstate__(self) -> dict:
        meta = self.meta if self._local else {}
        return {"path": self.path, "patience": self.patience, "local": self._local, "meta": meta}

    def __setstate__(self, state: dict) -> None:
        self.path, self.patience, self._local = state["path"], state["patience"], state["local"]
        self.meta = state["meta"]
        self._open()

    def lookup(self, key: CodeKey) -> Int32[np.ndarray, "n q"]:
        """Returns the codes of one window.

        Raises KeyError for one that was never tokenized (only the caller knows its file), and SampleError
        "damaged_codes", naming the file, when what was written is not what is there.
        """
        # Where the frames are: a binary search in the memory-mapped index.
        entry = find(self.index, key)
        if entry is None:
            raise KeyError(key)
        *_, length, start = entry
        # What TensorStore reads is checked by the chunk's checksum; a missing file reads as `UNUSED`.
        read = lambda: self._read_frames(start, start + length)  # noqa: E731
        try:
            codes = patiently(read, f"reading audio codes {self.path}", self.patience)
        except ValueError as error:
            # The last part of TensorStore's nested message says what was wrong.
            reason = str(error).split(": ")[-1].partition(" [")[0]
            raise SampleError("damaged_codes", f"{self._parts_of(start, length)} is damaged: {reason}") from error
        if (codes == UNUSED).any():
            raise SampleError("damaged_codes", f"{self._parts_of(start, length)} is missing, or lacks frames of {key}")
        return codes.astype(np.int32)

    def _read_frames(self, start: int, stop: int) -> np.ndarray:
        """Reads rows of the array of frames. Raises ValueError for damaged ones, OSError where storage refuses them."""
        try:
            if self._frames is None:
                self._frames = open_frames(self.path / "frames")
            return self._frames[start:stop].read().result(timeout=_SECONDS)
        except TimeoutError:
            # A request that never came back: the next one gets clients of its own.
            self._frames = None
            raise
        except ValueError as error:
            # TensorStore raises one class for all: the message begins with the kind of the error.
            if str(error).startswith(_DAMAGED):
                raise
            raise OSError(errno.EIO, str(error).partition(" [")[0]) from error

    def verify(self) -> None:
        """Reads every file. Raises ConfigError, naming the first one that is not as it was written."""
        # Sizes first: a file that is cut is named without reading the others.
        wanted = {"frames/" + name: digest for name, (_, digest) in self.meta["parts"].items()}
        wanted[self.meta["index"]] = self.meta["index_sha256"]
        self._check_sizes()
        for name, digest in wanted.items():
            if patiently(lambda name=name: file_digest(self.path / name), f"reading {name}", self.patience) != digest:
                raise ConfigError(f"audio code store {self.path}: {name} is damaged: its checksum is another one")

    def _check_sizes(self) -> None:
        sizes = self._sizes()
        for name, (size, _) in self.meta["parts"].items():
            found = sizes.get(name)
            if found != size:
                what = "is missing" if found is None else f"is damaged: it has {found} of {size} bytes"
                raise ConfigError(f"audio code store {self.path}: frames/{name} {what}")

    def _sizes(self) -> dict[str, int]:
        """Returns the bytes of each file of frames."""
        frames = self.path / "frames"
        if self._local is not None:
            return {name: file.size for name, file in list_files(frames, self.patience).items()}
        paths = {name: Path(frames) / name for name in self.meta["parts"]}
        return {name: path.stat().st_size for name, path in paths.items() if path.is_file()}

    def _parts_of(self, start: int, length: int) -> str:
        """Returns the file that holds a window. None lies in two."""
        return f"audio codes {self.path / 'frames' / part_name(start // self.meta['part_frames'])}"


def read_meta(path: Path | epath.Path) -> dict:
    """`meta.json` of a store. Raises OSError or ValueError when it is not there, or not of this form."""
    meta = json.loads((path / "meta.json").read_bytes())
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise ValueError(f"meta.json is not of format {FORMAT}")
    missing = [name for name in ("fingerprint", "part_frames", "parts", "index", "index_sha256") if name not in meta]
    if missing:
        raise ValueError(f"meta.json has no {missing[0]}")
    return meta


def part_name(number: int) -> str:
    """Returns the file of part `number`, as zarr names it."""
    return f"c.{number}.0"


def open_frames(path: Path | epath.Path) -> ts.TensorStore:
    """Returns the array of frames, for reading. Its files are opened when they are read."""
    # Buckets by TensorStore's own drivers: a window is one range of a file.
    scheme, _, place = os.fspath(path).rpartition("://")
    bucket, _, inside = place.partition("/")
    kvstore = {"driver": "file", "path": place}
    if scheme:
        kvstore = {"driver": {"gs": "gcs"}.get(scheme, scheme), "bucket": bucket, "path": f"{inside}/"}
    spec = {"driver": "zarr3", "kvstore": kvstore}
    context = {"cache_pool": {"total_bytes_limit": _CACHE_BYTES}}  # keeps the parts' own indexes
    return ts.open(spec | {"context": context}, open=True).result(timeout=_SECONDS)


def file_digest(path: Path | epath.Path) -> str:
    """Returns a file's SHA-256 in hex. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(cast(Any, file), "sha256").hexdigest()
