"""Text that is tokenized already: as a media item of a document, and as a prompt for a model without a tokenizer.

An item has 16 bytes of the tokenizer's fingerprint, then int32 ids:

    <trainable_start><tokens_start_omni>{"path": "targets"}<tokens_end_omni><trainable_end>
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from baichuan_omni_jax.config import OmniConfig
from baichuan_omni_jax.errors import RequestError
from data_pipelines.documents.document import EncodedDocument
from data_pipelines.errors import SampleError
from data_pipelines.media.location import Media, reading

_FINGERPRINT = 16  # bytes
_KIND = "list of token ids"


def pack_ids(ids: Sequence[int] | np.ndarray, fingerprint: str) -> bytes:
    """Packs ids into the item's bytes; `fingerprint` is `tokenizer_fingerprint`."""
    return bytes.fromhex(fingerprint) + np.asarray(ids, "<i4").tobytes()


def read_ids(media: Media, fingerprint: str, vocab_size: int) -> list[int]:
    """Reads the ids. Raises SampleError: "other_tokenizer", "unreadable_media"."""
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
    """Returns the tokenizer's fingerprint and the ids."""
    with reading(media, _KIND), media.open() as file:
        content = file.read()
        if len(content) < _FINGERPRINT:
            raise ValueError("it is cut")
        ids = np.frombuffer(content[_FINGERPRINT:], "<i4")
        if ids.min(initial=0) < 0:
            raise ValueError("it has ids outside the vocabulary")
    return content[:_FINGERPRINT].hex(), ids


def encode_ids(ids: Any, config: OmniConfig) -> EncodedDocument:
    """Encodes token ids as a prompt; no tokenizer is needed. Raises RequestError "bad_message" for ids that cannot
    stand alone.

    Pads of media would need their media: messages have those.
    """
    whole = isinstance(ids, Sequence) and all(isinstance(token, int) and not isinstance(token, bool) for token in ids)
    if not whole or not ids:
        raise RequestError("bad_message", "the token ids are no list of whole numbers")
    if min(ids) < 0 or max(ids) >= config.llm.vocab_size:
        raise RequestError("bad_message", f"a token id lies outside the vocabulary of {config.llm.vocab_size}")
    # A pad without its media would read an embedding that nobody wrote.
    tokens, special = np.asarray(ids, np.int32), config.tokens
    if np.isin(tokens, (special.audio_pad, special.image_pad, special.video_place)).any():
        raise RequestError("bad_message", "the token ids hold pads of media, without their media")
    n, levels = len(ids), config.audio.levels
    codes, slots = np.zeros((0, levels), np.int32), np.zeros(0, np.int32)
    return EncodedDocument(
        tokens=tokens,
        text_targets=np.zeros(n, np.int32),
        text_weights=np.zeros(n, np.float32),
        audio_codes=codes,
        audio_slots=slots,
        audio_targets=codes,
        audio_weights=codes.astype(np.float32),
        audio_target_slots=slots,
        patches=np.zeros((0, config.vision.patch_values), np.uint8),
        patch_grid=np.zeros((0, 2), np.int32),
        patch_frames=slots,
        visual_slots=slots,
    )


def read_id_file(path: Path) -> list[Any]:
    """Reads the list of a JSON file. Raises RequestError "bad_message"."""
    try:
        ids = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RequestError("bad_message", f"token ids {path} cannot be read: {error}") from error
    if not isinstance(ids, list):
        raise RequestError("bad_message", f"token ids {path} are no list")
    return ids
