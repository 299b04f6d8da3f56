"""What a document is before, between and after measuring and encoding, and the words for its type."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Int32, UInt8

from data_pipelines.media.location import Media, MediaRoot


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
    media: Path | MediaRoot | Mapping[str, Media]
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
    text_targets: int = 0  # positions with a text target; there is no budget of them

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
    "dialogue": "a conversation that is answered aloud, piece by piece",
    "video_caption": "a video and its description",
    "video_qa": "a video, questions and answers",
    "temporal_grounding": "a video, and when something happens in it",
    "cross_modal": "images or video, with part of the text spoken",
    "instruction": "turns of any of these, answered as told",
}


def is_known_type(word: str) -> bool:
    """Tells whether `word` is one of `DOCUMENT_TYPES`, written with any of space, `-`, `_` and in either case."""
    return word.lower().replace("-", "_").replace(" ", "_") in DOCUMENT_TYPES
