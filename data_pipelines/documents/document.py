"""What a document is before, between and after measuring and encoding, its type, and text that is ids already.

Text that is tokenized already comes as a media item of a document, or as a prompt for a model without a tokenizer. An
item has 16 bytes of the tokenizer's fingerprint, then int32 ids:

    <trainable_start><tokens_start_omni>{"path": "targets"}<tokens_end_omni><trainable_end>
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Int32, UInt8

from baichuan_omni_jax.config import OmniConfig
from baichuan_omni_jax.errors import RequestError
from data_pipelines.errors import SampleError
from data_pipelines.media.location import Media, MediaFolder, reading


@dataclass(frozen=True)
class Document:
    """One document, or a piece of one: what a manifest line or a record of a shard holds.

    A piece has the system prompt and the turns from `turns[0]` until `turns[1]` alone, and of what is left so the
    items from `span[0]` until `span[1]`: tokens of text and media (`sequence`).
    """

    id: str
    type: str  # one of `DOCUMENT_TYPES`, or any other word
    text: str  # the source prompt in the released form
    location: str  # the manifest line or record it comes from
    # The folder that paths in the text are relative to; of a shard, the media by the name the text uses.
    media: Path | MediaFolder | Mapping[str, Media]
    turns: tuple[int, int] | None = None  # of a piece; None: all
    max_frames: int = 0  # most frames of each of its videos; 0: as the model does
    span: tuple[int, int] | None = None  # of a chunk; None: all


@dataclass(frozen=True)
class Lengths:
    """What a document takes of each budget, known without decoding a pixel or a sample."""

    tokens: int  # slots of a row
    patches: int = 0  # of 14x14 pixels
    audio_frames: int = 0  # code frames (12.5 Hz), heard or to be generated
    audio_targets: int = 0  # frames of speech that carry loss, one end frame a clip included
    mel_windows: int = 0  # windows of at most 30 s
    items: int = 0  # images, video frames and clips
    image_patches: tuple[int, ...] = ()  # of each image and video frame, in order: none may be cut
    text_targets: int = 0  # tokens that predict text

    @property
    def trainable(self) -> int:
        """Everything that carries loss, a frame of audio as one."""
        return self.text_targets + self.audio_targets


@dataclass(frozen=True)
class EncodedDocument:
    """A decoded document, its slots counted from 0 at its own first token.

    n tokens, a code frames, q levels, c frames to predict, p patches, v visual tokens. Targets are already shifted. An
    end frame has class `codebook_sizes[0]` at level 0, zeros above, and weight at level 0 only. Patches come grouped
    2x2, so the four of one visual token are neighbors.
    """

    tokens: Int32[np.ndarray, "n"]
    text_targets: Int32[np.ndarray, "n"]  # what each position predicts; 0 with weight 0 where it predicts nothing
    text_weights: Float32[np.ndarray, "n"]
    audio_codes: Int32[np.ndarray, "a q"]
    audio_slots: Int32[np.ndarray, "a"]  # slots of the code frames, in order
    audio_targets: Int32[np.ndarray, "c q"]  # frame j is predicted at slot `audio_target_slots[j]`
    audio_weights: Float32[np.ndarray, "c q"]
    audio_target_slots: Int32[np.ndarray, "c"]
    patches: UInt8[np.ndarray, "p 588"]  # raw values (channel, row, column)
    patch_grid: Int32[np.ndarray, "p 2"]  # (row, column) in the image
    patch_frames: Int32[np.ndarray, "p"]  # number of the image in the document, from 1
    visual_slots: Int32[np.ndarray, "v"]  # slots of the visual tokens, in order
    mels: tuple[Float32[np.ndarray, "_ mels"], ...] = ()  # log mels of the windows, where asked for
    mel_places: tuple[int, ...] = ()  # place of each window's first code frame among the a
    # Samples of the windows by rate in Hz, where asked for.
    waves: tuple[Mapping[int, Float32[np.ndarray, "_"]], ...] = ()
    damaged_packets: int = 0  # packets of its media that were left out

    @property
    def lengths(self) -> Lengths:
        return Lengths(
            tokens=len(self.tokens),
            patches=len(self.patches),
            audio_frames=len(self.audio_codes),
            audio_targets=len(self.audio_targets),
            image_patches=tuple(np.bincount(self.patch_frames)[1:].tolist()),
            text_targets=int(np.count_nonzero(self.text_weights)),
        )


DOCUMENT_TYPES: dict[str, str] = {
    "text": "text without media",
    "caption": "an image and its description",
    "qa": "an image, questions and answers",
    "ocr": "an image of text, and the text",
    "chart": "an image of a chart or table, and what it shows",
    "interleaved": "text with images in between",
    "asr": "speech, and its text",
    "aqa": "a spoken question, and its answer",
    "s2tt": "speech, and its text in another language",
    "tts": "text, and its speech to be generated",
    "intlv": "text and speech in turns, loss on the text",
    "itts": "text and speech in turns, loss on the speech",
    "pure_audio": "audio alone",
    "dialogue": "a conversation that is answered in speech, piece by piece",
    "video_caption": "a video and its description",
    "video_qa": "a video, questions and answers",
    "temporal_grounding": "a video, and when something happens in it",
    "cross_modal": "images or video, with part of the text spoken",
    "instruction": "turns of any of these, answered as told",
}

SPEECH_TYPES = ("tts", "itts")  # those whose speech stands right behind its text


def is_known_type(word: str) -> bool:
    """Tells whether `word` is one of `DOCUMENT_TYPES`, written with any of space, `-`, `_` and in either case."""
    return word.lower().replace("-", "_").replace(" ", "_") in DOCUMENT_TYPES


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
