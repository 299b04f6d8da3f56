"""Ways in which files are damaged: by disks, by transfers, by people, on purpose."""

import zlib
from collections.abc import Callable, Iterator

import numpy as np

from tests.helpers.faults.media_files import kind_of

Rng = np.random.Generator
_HEADER = 512
_EXTREMES = (
    b"\x00" * 4,
    b"\xff" * 4,
    b"\x7f\xff\xff\xff",
    b"\xff\xff\xff\x7f",
    b"\x80\x00\x00\x00",
    b"\x00\x00\x00\x01",
)


def _flip(data: bytes, rng: Rng, within: int, most: int) -> bytes:
    changed = np.frombuffer(data, np.uint8).copy()
    places = rng.integers(min(within, len(data)), size=rng.integers(1, most))
    changed[places] ^= rng.integers(1, 256, len(places), dtype=np.uint8)
    return changed.tobytes()


def flip_bytes(data: bytes, rng: Rng) -> bytes:
    return _flip(data, rng, len(data), 64)


def flip_header(data: bytes, rng: Rng) -> bytes:
    return _flip(data, rng, _HEADER, 6)


def extreme_header(data: bytes, rng: Rng) -> bytes:
    """A size, count or offset of the header becomes nothing, or as large as can be."""
    place = int(rng.integers(max(1, min(_HEADER, len(data) - 4))))
    return data[:place] + _EXTREMES[rng.integers(len(_EXTREMES))] + data[place + 4 :]


def truncate(data: bytes, rng: Rng) -> bytes:
    return data[: rng.integers(len(data))]


def cut_out(data: bytes, rng: Rng) -> bytes:
    start, end = sorted(rng.integers(len(data), size=2))
    return data[:start] + data[end:]


def zero_range(data: bytes, rng: Rng) -> bytes:
    start, end = sorted(rng.integers(len(data), size=2))
    return data[:start] + bytes(int(end - start)) + data[end:]


def repeat_range(data: bytes, rng: Rng) -> bytes:
    start, end = sorted(rng.integers(len(data), size=2))
    return data[:end] + data[start:end] + data[end:]


def insert_noise(data: bytes, rng: Rng) -> bytes:
    place = int(rng.integers(len(data)))
    return data[:place] + rng.bytes(int(rng.integers(1, 5000))) + data[place:]


IN_PLACE: tuple[Callable[[bytes, Rng], bytes], ...] = (
    flip_bytes,
    flip_header,
    extreme_header,
    truncate,
    cut_out,
    zero_range,
    repeat_range,
    insert_noise,
)


def mutants(files: dict[str, bytes], count: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """`count` damaged files as (name, bytes), as many of each original and each kind of damage as can be.

    Besides `IN_PLACE`: the head of one file with the tail of another (`splice`), and one file under another's name.
    """
    names, rng = sorted(files), np.random.default_rng(seed)
    names.sort(key=lambda name: zlib.crc32(name.encode()))  # formats in mixed order, so that few files cover many
    kinds = [kind.__name__ for kind in IN_PLACE] + ["splice", "rename"]
    for number in range(count):
        name = names[number % len(names)]
        kind = kinds[(number + number // len(names)) % len(kinds)]
        data, other = files[name], files[names[rng.integers(len(names))]]
        if kind == "rename":
            yield f"{number:05d}-{kind}-{name}", other
        elif kind == "splice":
            yield f"{number:05d}-{kind}-{name}", truncate(data, rng) + other[rng.integers(len(other)) :]
        else:
            yield f"{number:05d}-{kind}-{name}", IN_PLACE[kinds.index(kind)](data, rng)


__all__ = ["kind_of", "mutants"]
