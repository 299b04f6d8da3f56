"""What a document is before, between and after measuring and encoding, and the words for its type."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Int32, UInt8

from data_pipelines.media.location import Media, MediaRoot


@dataclass(frozen=True)
class Document:
    """One document: `text` is the source prompt in the released form, `location` the manifest line it comes from.

    `media` tells the folder that media paths in the text are relative to or, for a document of a shard, the media
    themselves by the name the text uses. A piece of a longer document has the system prompt and the turns from
    `turns[0]` until `turns[1]` alone; `max_frames` limits the frames of each of its videos (0: as the model does).
    Of what is left so, `span` takes the items from `span[0]` until `span[1]`: tokens of text and media (`parts`).
    """

    id: str
    type: str
    text: str
    location: str
    media: Path | MediaRoot | Mapping[str, Media]
    turns: tuple[int, int] | None = None
    max_frames: int = 0
    span: tuple[int, int] | None = None


@dataclass(frozen=True)
class Lengths:
    """What a document takes of each budget, known without decoding a pixel or a sample.

    `tokens` row slots; `patches` 14x14 patches; `audio_frames` code frames (12.5 Hz) heard or spoken; `audio_targets`
    spoken frames that carry loss, one end frame a clip included; `mel_windows` windows of at most 30 s; `items` media.
    `image_patches` has the patches of each image and video frame, in order: none may be cut. `text_targets`, of which
    there is no budget, are the positions with a text target.
    """

    tokens: int
    patches: int = 0
    audio_frames: int = 0
    audio_targets: int = 0
    mel_windows: int = 0
    items: int = 0
    image_patches: tuple[int, ...] = ()
    text_targets: int = 0

    @property
    def trainable(self) -> int:
        """Everything that carries loss, a frame of audio as one."""
        return self.text_targets + self.audio_targets


@dataclass(frozen=True)
class EncodedDocument:
    """A decoded document, its slots counted from 0 at its own first token.

    n tokens, a code frames, q levels, c frames to predict, p patches, v visual tokens, w windows of audio.

    Targets are already shifted: `text_targets[i]` is what position i must predict, 0 with weight 0 where nothing is.
    `audio_targets[j]` is predicted at slot `audio_target_slots[j]`; an end frame has class `codebook_sizes[0]` at
    level 0, zeros above, and weight at level 0 only. `patch_frames` numbers the images of the document from 1;
    patches come grouped 2x2, so the four of one visual token are neighbors, and `patch_grid` is their (row, column).
    `mels`, when they were asked for, are the log mels (frames, mels) of the windows, whose code frames begin at
    `mel_places` among the a; `waves` their samples by rate in Hz. `damaged_packets` counts packets of its media that
    could not be decoded: the document is used without them.
    """

    tokens: Int32[np.ndarray, "n"]
    text_targets: Int32[np.ndarray, "n"]
    text_weights: Float32[np.ndarray, "n"]
    audio_codes: Int32[np.ndarray, "a q"]
    audio_slots: Int32[np.ndarray, "a"]
    audio_targets: Int32[np.ndarray, "c q"]
    audio_weights: Float32[np.ndarray, "c q"]
    audio_target_slots: Int32[np.ndarray, "c"]
    patches: UInt8[np.ndarray, "p 588"]
    patch_grid: Int32[np.ndarray, "p 2"]
    patch_frames: Int32[np.ndarray, "p"]
    visual_slots: Int32[np.ndarray, "v"]
    mels: tuple[Float32[np.ndarray, "_ mels"], ...] = ()
    mel_places: tuple[int, ...] = ()
    waves: tuple[Mapping[int, Float32[np.ndarray, "_"]], ...] = ()
    damaged_packets: int = 0

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
