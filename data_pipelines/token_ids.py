"""Text that is tokenised already, as a media item: 16 bytes of the tokenizer's fingerprint, then int32 ids.

<trainable_start><tokens_start_omni>{"path": "targets"}<tokens_end_omni><trainable_end>
"""

from collections.abc import Sequence

import numpy as np

from data_pipelines.document import SampleError
from data_pipelines.media import Media, reading

_FINGERPRINT = 16  # bytes


def pack_ids(ids: Sequence[int] | np.ndarray, fingerprint: str) -> bytes:
    """The item's bytes; `fingerprint` is `tokenizing.tokenizer_fingerprint`."""
    return bytes.fromhex(fingerprint) + np.asarray(ids, "<i4").tobytes()


def read_ids(media: Media, fingerprint: str, vocab_size: int) -> list[int]:
    """The ids. Raises SampleError: "other_tokenizer", "unreadable_media"."""
    with reading(media, "list of token ids"), media.open() as file:
        content = file.read()
        written_by = content[:_FINGERPRINT].hex()
        ids = np.frombuffer(content[_FINGERPRINT:], "<i4")
        if len(written_by) == len(fingerprint) and written_by != fingerprint:
            raise SampleError("other_tokenizer", f"{media.name} holds ids of tokenizer {written_by}, not {fingerprint}")
        if len(content) < _FINGERPRINT or (ids.size and not 0 <= ids.min() <= ids.max() < vocab_size):
            raise ValueError("it is cut, or has ids outside the vocabulary")
    return ids.tolist()
