"""Writes a store of audio codes: its array, its parts, and the index that makes them count.

Any number of writers write parts, each part by one of them. A part counts from the moment that one of them, the last,
has written `meta.json`: until then nobody reads it, and a writer that was killed leaves nothing behind that matters.
"""

import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import tensorstore as ts
from jaxtyping import Int64, Integer, Shaped

from baichuan_omni_jax.errors import ConfigError
from baichuan_omni_jax.storage import write_json
from data_pipelines.audio_codes.store import (
    ENTRY,
    FORMAT,
    UNUSED,
    CodeKey,
    file_digest,
    key_fields,
    order_of,
    part_name,
    read_meta,
    save_table,
)

# 23 hours of audio, 16 MB: what a kill costs at most, and few files for 10^8 clips.
PART_FRAMES = 1 << 20
CHUNK_FRAMES = 512  # what is read and checked at once


def create_store(
    path: Path, *, fingerprint: str, codebook_sizes: tuple[int, ...], window_rule: dict, part_frames: int
) -> None:
    """Makes an empty store.

    Args:
        path: its folder.
        fingerprint: of the audio tokenizer.
        codebook_sizes: codes of each level, coarse to fine.
        window_rule: how clips are cut: `seconds` of a window and `overlap`.
        part_frames: code frames of one file.

    Raises:
        ConfigError: when `part_frames` are not whole chunks, or codes exceed int16.
    """
    if part_frames % CHUNK_FRAMES or part_frames <= 0:
        raise ConfigError(f"a part's {part_frames} frames must be a multiple of {CHUNK_FRAMES}")
    if max(codebook_sizes) > np.iinfo(np.int16).max + 1:
        raise ConfigError(f"codebooks of {max(codebook_sizes)} codes do not fit the store's int16")
    (path / "frames").mkdir(parents=True, exist_ok=True)
    meta = {
        "format": FORMAT,
        "fingerprint": fingerprint,
        "codebook_sizes": list(codebook_sizes),
        "window_rule": window_rule,
        "part_frames": part_frames,
    }
    publish(path, meta, np.zeros(0, ENTRY), {}, [])


def publish(
    path: Path, meta: dict, index: Shaped[np.ndarray, " n"], parts: Mapping[str, tuple[int, str]], mixtures: list[str]
) -> None:
    """Makes `index` (any order) and `parts` (file -> size, SHA-256), old and new ones, what the store holds.

    Readers see the store as it was, or as it is now.

    Args:
        path: the store's folder.
        meta: what `meta.json` held so far.
        index: records of `store.ENTRY`, in any order.
        parts: size in bytes and SHA-256 of every file of frames.
        mixtures: keys of the data whose audio is in the store.
    """
    # A new index beside the old one, which readers may have mapped; the array's shape grows, its files stay.
    generation = int(meta.get("index", "index-0.npy").removeprefix("index-").removesuffix(".npy")) + 1
    table = path / f"index-{generation}.npy"
    save_table(table, index[order_of(index)])
    frames = len(parts) * meta["part_frames"]
    write_json(path / "frames" / "zarr.json", _array(frames, meta["part_frames"], len(meta["codebook_sizes"])))
    meta = meta | {
        "windows": len(index),
        "frames": int(index["length"].sum()),
        "index": table.name,
        "index_sha256": file_digest(table),
        "mixtures": mixtures,
        "parts": {name: list(facts) for name, facts in parts.items()},
    }
    # From here on the new codes count.
    write_json(path / "meta.json", meta)
    # Readers that have the old one mapped keep it; its name is what goes.
    for old in path.glob("index-*.npy"):
        if old != table:
            old.unlink()


def write_part(folder: Path, number: int, codes: Integer[np.ndarray, "n q"], part_frames: int) -> Path:
    """Writes one part of the store. The same codes give the same bytes.

    Args:
        folder: where the file goes.
        number: the part's.
        codes: (n, levels), of at most `part_frames` frames; `UNUSED` where there is none.
        part_frames: frames of the whole part; what `codes` lack is `UNUSED`.

    Returns:
        The file.

    Raises:
        ValueError: for codes that the store cannot hold.
    """
    if codes.size and not UNUSED <= codes.min() <= codes.max() <= np.iinfo(np.int16).max:
        raise ValueError(f"codes from {codes.min()} to {codes.max()} do not fit the store's int16")
    # Written as an array of this part alone, whose only file then takes its number: writers need no common array.
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        metadata = _array(part_frames, part_frames, codes.shape[1])
        kvstore = {"driver": "file", "path": scratch}
        # Also where no window has codes: TensorStore would leave out a part that holds nothing but `UNUSED`.
        spec = {"driver": "zarr3", "kvstore": kvstore, "metadata": metadata, "store_data_equal_to_fill_value": True}
        array = ts.open(spec, create=True).result()
        array[: len(codes)].write(codes.astype(np.int16)).result()
        return (Path(scratch) / part_name(0)).rename(folder / part_name(number))


def part_bounds(lengths: Integer[np.ndarray, " n"], part_frames: int) -> list[tuple[int, int]]:
    """Returns the first window and the end of each part that windows of these `lengths` fill in order; none lies in two
    parts.

    >>> part_bounds(np.array([300, 300, 500, 100]), 1024)
    [(0, 2), (2, 4)]
    """
    ends, first, bounds = np.cumsum(lengths, dtype=np.int64), 0, []
    while first < len(lengths):
        before = int(ends[first - 1]) if first else 0
        last = int(np.searchsorted(ends, before + part_frames, side="right"))
        if last == first:
            raise ConfigError(f"a window of {lengths[first]} code frames is longer than a part's {part_frames}")
        bounds.append((first, last))
        first = last
    return bounds


def write_codes(
    path: Path,
    items: Iterable[tuple[CodeKey, Integer[np.ndarray, "n q"]]],
    *,
    fingerprint: str,
    codebook_sizes: tuple[int, ...],
    window_rule: dict,
    part_frames: int = PART_FRAMES,
) -> None:
    """Writes a store of codes that are in memory; a failure leaves nothing.

    Args:
        path: the store's folder; must not exist.
        items: key of a window (SHA-256 of the clip in hex, number of the window), its codes (frames, levels).
        fingerprint: of the audio tokenizer that made the codes.
        codebook_sizes: codes of each level; at most 2^15.
        window_rule: how clips are cut: `seconds` and `overlap`.
        part_frames: code frames of one file, a multiple of `CHUNK_FRAMES`.

    Raises:
        ConfigError: when something is at `path`, or the sizes do not fit.
    """
    if path.exists():
        raise ConfigError(f"audio code store {path} exists already")
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a writer that was killed
    try:
        create_store(
            partial,
            fingerprint=fingerprint,
            codebook_sizes=codebook_sizes,
            window_rule=window_rule,
            part_frames=part_frames,
        )
        # In the order given: places follow from lengths, then parts are written one by one.
        found = [(key, np.asarray(codes)) for key, codes in items]
        index = np.array([(*key_fields(key), len(codes), 0) for key, codes in found], ENTRY)
        lengths = index["length"]
        parts = {}
        for number, (first, last) in enumerate(part_bounds(lengths, part_frames)):
            codes = np.concatenate([codes for _, codes in found[first:last]])
            file = write_part(partial / "frames", number, codes, part_frames)
            parts[file.name] = (file.stat().st_size, file_digest(file))
            index["start"][first:last] = number * part_frames + starts_of(lengths[first:last])
        publish(partial, read_meta(partial), index, parts, [])
        partial.rename(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def starts_of(lengths: Integer[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
    """Returns where each of the windows begins that lie one after the other."""
    return np.cumsum(lengths, dtype=np.int64) - lengths


def _array(frames: int, part_frames: int, levels: int) -> dict:
    """zarr.json: a file a part, in it chunks with a checksum each."""
    # Shards of zarr3: chunks are what is read and checked, files are what a file system can bear.
    plain = {"name": "bytes", "configuration": {"endian": "little"}}
    codecs = [plain, {"name": "crc32c"}]
    sharding = {"chunk_shape": [CHUNK_FRAMES, levels], "codecs": codecs, "index_codecs": codecs}
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": [frames, levels],
        "data_type": "int16",
        "fill_value": UNUSED,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [part_frames, levels]}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
    }
