"""Near-duplicates among any number of documents, by MinHash.

A document is the set of its runs of 5 characters, with its media, so that only documents with the same media are alike.
A signature keeps the smallest of the set under each of 128 orders: two signatures agree in about as many places as
the sets overlap (their Jaccard index). datasketch makes the signatures and chooses the bands; documents that agree in
a whole band are compared.

One band is looked at after the other, on numbers alone: 512 bytes a document on disk, 60 in memory at the peak. A
table of buckets in memory, as datasketch's own index has, would take kilobytes a document.
"""

import hashlib
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, cast

import numpy as np
from datasketch import MinHash, MinHashLSH
from jaxtyping import Int64, UInt32, UInt64

PLACES = 128
RUN = 5  # characters
CHUNK = 1 << 13  # signatures looked at together
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # odd, so that runs of one length do not collide by construction


def sign(text: str, media: Sequence[str] = ()) -> UInt32[np.ndarray, " places"]:
    """Returns the signature of a text with media, given by the SHA-256 of each; letter case and white space do not
    count.
    """
    plain = "".join(unicodedata.normalize("NFKC", text).lower().split())
    salt = hashlib.sha256("\n".join(media).encode()).digest()[:8]
    characters = np.frombuffer(plain.encode("utf-32-le", errors="replace"), np.uint32).astype(np.uint64)
    # A polynomial hash of every run of characters, begun with the media: texts of other media share no run.
    runs = np.full(max(len(characters) - RUN + 1, 1), np.frombuffer(salt, np.uint64)[0])
    for shift in range(min(RUN, len(characters))):
        runs = runs * _MULTIPLIER + characters[shift : shift + len(runs)]
    hashed = np.unique((runs * _MULTIPLIER) >> np.uint64(32))
    empty = _empty()
    scheme = cast(Any, empty.scheme)  # datasketch types it as str where it takes a literal
    signature = MinHash(PLACES, hashfunc=int, permutations=empty.permutations, scheme=scheme)
    signature.update_batch(hashed.tolist())
    return signature.hashvalues


def likeness(signatures: UInt32[np.ndarray, "n p"], some: Int64[np.ndarray, " m"], others: Int64[np.ndarray, " m"]):
    """Estimates the Jaccard index (m,) of each document of `some` with its one of `others`."""
    found = np.ones(len(some))
    for place in range(0, len(some), CHUNK):
        here = slice(place, place + CHUNK)
        found[here] = (signatures[some[here]] == signatures[others[here]]).mean(axis=1)
    return found


def find_duplicates(signatures: UInt32[np.ndarray, "n p"], threshold: float) -> Int64[np.ndarray, " n"]:
    """Returns for each document the first one that it is a duplicate of, itself where there is none.

    Documents are alike when their signatures agree in `threshold` of the places, and duplicates when a chain of alike
    ones joins them. Those of one bucket are compared with its first, what is unlike that with the first of the rest,
    and so on. The result depends on the signatures and their order alone; `signatures` may lie on disk.
    """
    first = np.arange(len(signatures))
    bands, rows = _bands(threshold)
    for band in range(bands):
        # Sorting brings the members of a bucket together; no table of buckets is held.
        keys = _band_keys(signatures, band * rows, rows)
        left = np.argsort(keys, kind="stable")  # by bucket, in the order of the documents inside
        while len(left):
            # The heads of the buckets stand for them in this round; they are done, the others are compared with them.
            starts = np.flatnonzero(np.append(True, keys[left[1:]] != keys[left[:-1]]))
            heads = np.repeat(left[starts], np.diff(np.append(starts, len(left))))
            others = left != heads
            left, heads = left[others], heads[others]
            alike = likeness(signatures, left, heads) >= threshold
            # Union-find: of two chains that meet, the smaller document stands for both.
            for one, head in zip(left[alike].tolist(), heads[alike].tolist(), strict=True):
                low, high = sorted((_root(first, one), _root(first, head)))
                first[high] = low
            left = left[~alike]
    for i in range(len(first)):  # ascending: what it points to is resolved already
        first[i] = first[first[i]]
    return first


@lru_cache
def _empty() -> MinHash:
    return MinHash(PLACES, seed=1)


@lru_cache
def _bands(threshold: float) -> tuple[int, int]:
    """Chooses (bands, places of each) so that hardly a pair is missed; false ones are found out when they are
    compared.
    """
    index = MinHashLSH(threshold=threshold, num_perm=PLACES, weights=(0.1, 0.9))
    return index.b, index.r


def _band_keys(signatures: UInt32[np.ndarray, "n p"], start: int, rows: int) -> UInt64[np.ndarray, " n"]:
    keys = np.zeros(len(signatures), np.uint64)
    for place in range(0, len(signatures), CHUNK):
        chunk = signatures[place : place + CHUNK, start : start + rows].astype(np.uint64)
        mixed = np.zeros(len(chunk), np.uint64)
        for column in chunk.T:
            mixed = (mixed ^ column) * _MULTIPLIER
            mixed ^= mixed >> np.uint64(29)
        keys[place : place + CHUNK] = mixed
    return keys


def _root(first: Int64[np.ndarray, " n"], one: int) -> int:
    while first[one] != one:
        first[one] = first[first[one]]
        one = int(first[one])
    return one
