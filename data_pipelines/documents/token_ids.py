"""Text that is tokenised already, as a media item: 16 bytes of the tokenizer's fingerprint, then int32 ids.

<trainable_start><tokens_start_omni>{"path": "targets"}<tokens_end_omni><trainable_end>
"""

from collections.abc import Sequence

import numpy as np

from data_pipelines.errors import SampleError
from data_pipelines.media.location import Media, reading

_FINGERPRINT = 16  # bytes
_KIND = "list of token ids"


def pack_ids(ids: Sequence[int] | np.ndarray, fingerprint: str) -> bytes:
    """The item's bytes; `fingerprint` is `tokenizing.tokenizer_fingerprint`."""
    return bytes.fromhex(fingerprint) + np.asarray(ids, "<i4").tobytes()


def read_ids(media: Media, fingerprint: str, vocab_size: int) -> list[int]:
    """The ids. Raises SampleError: "other_tokenizer", "unreadable_media"."""
    written_by, ids = _unpack_ids(media)
    if written_by != fingerprint:
        raise SampleError("other_tokenizer", f"{media.name} holds ids of tokenizer {written_by}, not {fingerprint}")
    with reading(media, _KIND):
        if ids.max(initial=0) >= vocab_size:
            raise ValueError("it has ids outside the vocabulary")
    return ids.tolist()


def check_ids(media: Media) -> None:
    """Raises SampleError "unreadable_media" for what is a list of ids of no tokenizer."""
    _unpack_ids(media)


def _unpack_ids(media: Media) -> tuple[str, np.ndarray]:
    """The tokenizer's fingerprint and the ids."""
    with reading(media, _KIND), media.open() as file:
        content = file.read()
        if len(content) < _FINGERPRINT:
            raise ValueError("it is cut")
        ids = np.frombuffer(content[_FINGERPRINT:], "<i4")
        if ids.min(initial=0) < 0:
            raise ValueError("it has ids outside the vocabulary")
    return content[:_FINGERPRINT].hex(), ids
