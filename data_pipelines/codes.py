"""The store of audio codes: written once by the audio tokenizer, read by the data workers.

    CODES/meta.json    fingerprint of the tokenizer, codebook sizes, window rule, number of frames
    CODES/frames/      TensorStore zarr3 array, int16 (frames, levels)
    CODES/index.npz    keys (clip hash and window), start, length

A store is written beside its place and renamed when it is whole.
"""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import tensorstore as ts
from jaxtyping import Int32

from baichuan_omni_jax.config import ConfigError
from data_pipelines.document import SampleError

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
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError(f"audio code store {self.path} cannot be read: {error}") from error
        if fingerprint is not None and self.meta["fingerprint"] != fingerprint:
            raise ConfigError(
                f"audio code store {self.path} was written by tokenizer {self.meta['fingerprint']}, "
                f"not by {fingerprint}, the one in use"
            )
        self._spans = dict(zip(zip(*columns, strict=True), spans.tolist(), strict=True))
        self._frames = None

    def __contains__(self, key: CodeKey) -> bool:
        return key in self._spans

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_frames": None}

    def lookup(self, key: CodeKey) -> Int32[np.ndarray, "n q"]:
        """Codes of one window. Raises SampleError `no_codes` for a clip that was never tokenised."""
        if key not in self._spans:
            raise SampleError("no_codes", f"no audio codes for clip {key[0][:12]}, window {key[1]}, in {self.path}")
        if self._frames is None:
            self._frames = ts.open(_spec(self.path / "frames"), open=True).result()
        start, length = self._spans[key]
        return self._frames[start : start + length].read().result().astype(np.int32)


def write_codes(
    path: Path,
    items: Iterable[tuple[CodeKey, Int32[np.ndarray, "n q"]]],
    *,
    fingerprint: str,
    codebook_sizes: tuple[int, ...],
    window_rule: dict,
) -> None:
    """Writes a store of `items`. Raises ConfigError when something is at `path` already; a failure leaves nothing."""
    if path.exists():
        raise ConfigError(f"audio code store {path} exists already")
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    keys, codes = [], []
    for key, frames in items:
        keys.append(key)
        codes.append(np.asarray(frames, np.int16))
    lengths = np.array([len(frames) for frames in codes], np.int64)
    total = int(lengths.sum())
    spec = _spec(partial / "frames") | {
        "metadata": {
            "shape": [total, len(codebook_sizes)],
            "data_type": "int16",
            "chunk_grid": {
                "name": "regular",
                "configuration": {"chunk_shape": [_CHUNK_FRAMES, len(codebook_sizes)]},
            },
        }
    }
    store = ts.open(spec, create=True).result()
    store.write(np.concatenate(codes) if codes else np.zeros((0, len(codebook_sizes)), np.int16)).result()
    np.savez(
        partial / "index.npz",
        clips=np.array([key[0] for key in keys], dtype=str),
        windows=np.array([key[1] for key in keys], np.int32),
        starts=np.cumsum(lengths) - lengths,
        lengths=lengths,
    )
    meta = {
        "fingerprint": fingerprint,
        "codebook_sizes": list(codebook_sizes),
        "window_rule": window_rule,
        "frames": total,
    }
    (partial / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")
    partial.rename(path)


def _spec(path: Path) -> dict:
    return {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path)}}
