"""The store of audio codes: written once by the audio tokenizer, read by the data workers.

    CODES/meta.json    fingerprint of the tokenizer, codebook sizes, window rule, number of frames
    CODES/frames/      TensorStore zarr3 array, int16 (frames, levels)
    CODES/index.npz    keys (clip hash and window), start, length

A store is written beside its place and renamed when it is whole.
"""

import json
import shutil
import zipfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import tensorstore as ts
from jaxtyping import Int32, Integer

from baichuan_omni_jax.config import ConfigError

CodeKey = tuple[str, int]
_CHUNK_FRAMES = 4096


class CodeStore:
    """Codes by clip and window. Opens its array at first use, so that it can be sent to workers."""

    def __init__(self, path: Path, fingerprint: str | None = None):
        """Raises ConfigError when there is no store at `path`, or its tokenizer is not the one of `fingerprint`."""
        self.path = Path(path)
        try:
            self.meta = json.loads((self.path / "meta.json").read_text(encoding="utf-8"))
            with np.load(self.path / "index.npz") as index:
                columns = (index["clips"].tolist(), index["windows"].tolist())
                spans = np.stack([index["starts"], index["lengths"]], 1)
            written_by = self.meta["fingerprint"]
        except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
            raise ConfigError(f"audio code store {self.path} cannot be read: {error}") from error
        if fingerprint is not None and written_by != fingerprint:
            raise ConfigError(
                f"audio code store {self.path} was written by tokenizer {written_by}, "
                f"not by {fingerprint}, the one in use"
            )
        self._spans = dict(zip(zip(*columns, strict=True), spans.tolist(), strict=True))
        self._frames = None

    def __contains__(self, key: CodeKey) -> bool:
        return key in self._spans

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_frames": None}

    def lookup(self, key: CodeKey) -> Int32[np.ndarray, "n q"]:
        """Codes of one window. Raises KeyError for one that was never tokenised: only the caller knows its file."""
        start, length = self._spans[key]
        if self._frames is None:
            self._frames = ts.open(_spec(self.path / "frames"), open=True).result()
        return self._frames[start : start + length].read().result().astype(np.int32)


def write_codes(
    path: Path,
    items: Iterable[tuple[CodeKey, Integer[np.ndarray, "n q"]]],
    *,
    fingerprint: str,
    codebook_sizes: tuple[int, ...],
    window_rule: dict,
) -> None:
    """Writes a store of `items`. Raises ConfigError when something is at `path` already; a failure leaves nothing."""
    if path.exists():
        raise ConfigError(f"audio code store {path} exists already")
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a writer that was killed
    partial.mkdir(parents=True)
    try:
        frames = _write_arrays(partial, items, len(codebook_sizes))
        meta = {
            "fingerprint": fingerprint,
            "codebook_sizes": list(codebook_sizes),
            "window_rule": window_rule,
            "frames": frames,
        }
        (partial / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")
        partial.rename(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _write_arrays(folder: Path, items: Iterable[tuple[CodeKey, Integer[np.ndarray, "n q"]]], levels: int) -> int:
    """Frames and index; returns the number of frames."""
    keys, codes = [], []
    for key, frames in items:
        keys.append(key)
        codes.append(np.asarray(frames, np.int16))
    lengths = np.array([len(frames) for frames in codes], np.int64)
    total = int(lengths.sum())
    grid = {"name": "regular", "configuration": {"chunk_shape": [_CHUNK_FRAMES, levels]}}
    metadata = {"shape": [total, levels], "data_type": "int16", "chunk_grid": grid}
    store = ts.open(_spec(folder / "frames") | {"metadata": metadata}, create=True).result()
    store.write(np.concatenate([np.zeros((0, levels), np.int16), *codes])).result()
    np.savez(
        folder / "index.npz",
        clips=np.array([key[0] for key in keys], dtype=str),
        windows=np.array([key[1] for key in keys], np.int32),
        starts=np.cumsum(lengths) - lengths,
        lengths=lengths,
    )
    return total


def _spec(path: Path) -> dict:
    return {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path)}}
