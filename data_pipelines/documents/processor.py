"""From a document to its sequence: measured from headers and arithmetic, or encoded with its pixels and codes."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int32, Integer, UInt8
from tokenizers import Tokenizer

from baichuan_omni_jax.config import ImagesConfig, OmniConfig
from data_pipelines.documents.chunks import Ids, Run, cut_span, group_media
from data_pipelines.documents.document import Document, EncodedDocument, Lengths
from data_pipelines.documents.prompts import (
    AudioElement,
    Element,
    ImageElement,
    TextElement,
    TokensElement,
    VideoElement,
)
from data_pipelines.documents.sequence import (
    AudioPart,
    Layout,
    Part,
    TextPart,
    VisualPart,
    audio_targets,
    lay_out,
    text_targets,
)
from data_pipelines.documents.token_ids import read_ids
from data_pipelines.documents.turns import document_elements, is_marked, thin_frames
from data_pipelines.errors import SampleError
from data_pipelines.media.audio import clip_key, probe_audio, read_audio
from data_pipelines.media.containers import Damage
from data_pipelines.media.features import Window, clip_windows, log_mel, patchify, resize_image, visual_size
from data_pipelines.media.images import SEEN, load_image, probe_image
from data_pipelines.media.location import Media, MediaRoot, find_media
from data_pipelines.media.videos import probe_video, read_video
from data_pipelines.tokenizers.tokenizer import check_tokenizer, encode, plain_tokenizer, tokenizer_fingerprint

SCHEMA_VERSION = 2  # raise it when the same document and configuration give another sequence than before


@runtime_checkable
class Codes(Protocol):
    """The store of audio codes. `lookup` of a key that is not there raises KeyError."""

    def lookup(self, key: tuple[str, int]) -> Integer[np.ndarray, "n q"]:
        """Code frames of the window with this `clip_key`."""


@dataclass(frozen=True)
class AudioItem:
    """One window of a clip that a document refers to; `samples` is the whole clip's length at the model's rate."""

    media: Media
    samples: int
    window: Window

    @property
    def key(self) -> tuple[str, int]:
        """Its key in the store of codes; reads the file."""
        return clip_key(self.media, self.window.index)


@dataclass(frozen=True)
class Said:
    """Sound of a prompt that is known as `codes` (n, levels) already, heard or `spoken`."""

    codes: Int32[np.ndarray, "n q"]
    spoken: bool = True


@dataclass(frozen=True)
class _Pictures:
    """`count` pictures of one size: a still, a listed frame, or the frames of a video file.

    `decoded` holds their patches, each with its grid, once they were asked for; `damaged` counts the packets of the
    video that could not be decoded then.
    """

    height: int
    width: int
    count: int
    frame: bool
    decoded: list[tuple[np.ndarray, np.ndarray]]
    damaged: int = 0


@dataclass(frozen=True)
class _Clip:
    """A clip of sound; of its windows, once they were asked for, `mels` (frames, mels) and samples by their rate.

    `codes` are its code frames where a prompt brings them: there is no media then, and one window.
    """

    media: Media
    samples: int
    windows: list[Window]
    mels: list[np.ndarray]
    waves: list[dict[int, np.ndarray]]
    codes: np.ndarray | None = None
    damaged: int = 0  # packets of its sound


@dataclass(frozen=True)
class _Plan:
    """A document: its sequence, and its media in order of appearance."""

    layout: Layout
    pictures: list[_Pictures]
    clips: list[_Clip]


class Processor:
    """Measures and encodes documents for one model and one tokenizer. Picklable; holds no open file.

    `end_of_text` appends `<|endoftext|>` to documents that do not end with it; `images` says how stills are taken.
    `unmarked` documents train whole or are refused. Raises ConfigError when the tokenizer does not fit the model.
    """

    def __init__(
        self,
        omni_config: OmniConfig,
        tokenizer: Tokenizer,
        end_of_text: bool = True,
        images: ImagesConfig = SEEN,
        unmarked: Literal["all", "refuse"] = "all",
    ):
        check_tokenizer(tokenizer, omni_config)
        self.config = omni_config
        self.tokenizer = tokenizer
        self.end_of_text = end_of_text
        self.images = images
        self.unmarked = unmarked
        # The last document of which a part was asked for, as items: its other parts are, as a rule, asked for next.
        self._last_runs: tuple[object, list[Run]] = (None, [])

    def __getstate__(self) -> dict:
        return vars(self) | {"_last_runs": (None, [])}

    @cached_property
    def fingerprint(self) -> str:
        """Changes whenever the same document may be measured or encoded differently."""
        vision, audio = self.config.vision, self.config.audio
        fields = {
            "schema": SCHEMA_VERSION,
            "tokenizer": self.tokenizer.to_str(),
            "end_of_text": self.end_of_text,
            "unmarked": self.unmarked,
            "tokens": dataclasses.asdict(self.config.tokens),
            "image_limits": dataclasses.asdict(vision.image_limits),
            "frame_limits": dataclasses.asdict(vision.frame_limits),
            "patches": [vision.patch_size, vision.spatial_merge_size],
            "images": dataclasses.asdict(self.images),
            "frames": [vision.max_frames, vision.frames_per_second],
            "mel": [audio.sampling_rate, audio.n_fft, audio.hop_length],
            "windows": [audio.max_audio_seconds, audio.split_overlap],
            "codes": [audio.stride_size, audio.avg_pooler, list(audio.codebook_sizes)],
        }
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:32]

    @cached_property
    def tokenizer_fingerprint(self) -> str:
        """As token ids that were written by it carry it."""
        return tokenizer_fingerprint(self.tokenizer)

    def measure(self, document: Document) -> Lengths:
        """What the document takes of each budget, without decoding. `items` counts pictures, video frames and clips.

        Raises SampleError: "bad_prompt", "missing_file", "outside_root", "unreadable_media", "other_tokenizer" (of
        token ids), "unmarked", "no_loss".
        """
        return self._measured(self._plan(document))

    def measure_run(self, run: Run, document: Document) -> Lengths:
        """What one of the `runs` of a document takes by itself."""
        elements = [run] if isinstance(run, Ids) else run
        parts, pictures, clips = self._read(elements, document.media, document.max_frames, False, False, ())
        return self._measured(_Plan(lay_out(parts, self.config.tokens), pictures, clips))

    def _measured(self, plan: _Plan) -> Lengths:
        sizes = [self._patch_count(pictures) for pictures in plan.pictures for _ in range(pictures.count)]
        return Lengths(
            tokens=len(plan.layout.tokens),
            patches=sum(sizes),
            audio_frames=len(plan.layout.audio_slots),
            audio_targets=plan.layout.audio_targets,
            mel_windows=sum(len(clip.windows) for clip in plan.clips),
            items=len(sizes) + len(plan.clips),
            image_patches=tuple(sizes),
            text_targets=plan.layout.text_targets,
        )

    def runs(self, document: Document) -> list[Run]:
        """All items of a document whatever its `span`: text as ids, end of text included, and media."""
        key = (document.id, document.location, document.text, document.turns, document.max_frames)
        if self._last_runs[0] != key:
            elements = document_elements(document, self.config.vision.max_frames)
            found = [self._as_ids(element, document.media) for element in elements]
            ending = [Ids(part.ids, part.trainable) for part in self._ending(document, elements, found[-1:])]
            self._last_runs = key, group_media([*found, *ending])
        return self._last_runs[1]

    def elements(self, document: Document) -> list[Element | Ids]:
        """What a document consists of; one with a `span` has its text as ids. Raises SampleError "bad_prompt"."""
        if document.span is None:
            return document_elements(document, self.config.vision.max_frames)
        return cut_span(self.runs(document), document.span)[0]

    def audio_items(self, document: Document) -> list[AudioItem]:
        """The windows of sound that the document refers to, in order. Raises SampleError as `measure`."""
        return [
            AudioItem(clip.media, clip.samples, window)
            for clip in self._plan(document).clips
            for window in clip.windows
        ]

    def encode(
        self, document: Document, codes: Codes | None, mels: bool = False, rates: Sequence[int] = ()
    ) -> EncodedDocument:
        """The document with pixels decoded and sound as codes, if asked also as log mels, and as samples of `rates`.

        Without `codes` all code frames are zeros, to be filled in by a tokenizer that runs on the mels.
        Raises SampleError: what `measure` raises; "no_codes" when the store lacks a window of its sound; "changed"
        when codes are not of the measured length or the model's codebooks; "silent_audio" where mels are asked for.
        """
        return self._encoded(self._plan(document, pixels=True, mels=mels, rates=rates), codes)

    def encode_prompt(self, elements: Sequence[Element | Said], media: Mapping[str, Media]) -> EncodedDocument:
        """Elements to be continued: no loss, no end of text, pixels decoded, sound heard as log mels.

        Their references name `media`. Raises SampleError as `encode`.
        """
        elements = thin_frames(elements, self.config.vision.max_frames)
        parts, pictures, clips = self._read(elements, media, max_frames=0, pixels=True, mels=True, rates=())
        return self._encoded(_Plan(lay_out(parts, self.config.tokens), pictures, clips), None)

    def _encoded(self, plan: _Plan, codes: Codes | None) -> EncodedDocument:
        layout = plan.layout
        windows = [(clip, window) for clip in plan.clips for window in clip.windows]
        heard = [self._codes(clip, window, codes) for clip, window in windows]
        sizes = self.config.audio.codebook_sizes
        frames = np.concatenate([np.zeros((0, len(sizes)), np.int32), *heard])
        targets, weights = text_targets(layout)
        frame_targets, frame_weights, frame_slots = audio_targets(layout, frames, sizes[0])
        patches, grid, numbers = self._patches(plan)
        places = np.cumsum([0, *(window.code_frames for _, window in windows)])[:-1]
        return EncodedDocument(
            tokens=np.asarray(layout.tokens, np.int32),
            text_targets=targets,
            text_weights=weights,
            audio_codes=frames,
            audio_slots=np.asarray(layout.audio_slots, np.int32),
            audio_targets=frame_targets,
            audio_weights=frame_weights,
            audio_target_slots=frame_slots,
            patches=patches,
            patch_grid=grid,
            patch_frames=numbers,
            visual_slots=np.asarray(layout.visual_slots, np.int32),
            mels=tuple(mel for clip in plan.clips for mel in clip.mels),
            mel_places=tuple(int(place) for (clip, _), place in zip(windows, places, strict=True) if clip.mels),
            waves=tuple(waves for clip in plan.clips for waves in clip.waves),
            damaged_packets=sum(each.damaged for each in (*plan.pictures, *plan.clips)),
        )

    def _plan(self, document: Document, pixels: bool = False, mels: bool = False, rates: Sequence[int] = ()) -> _Plan:
        if self.unmarked == "refuse" and not is_marked(document):
            raise SampleError("unmarked", "the document has no <trainable_start>, which data.unmarked=refuse asks for")
        look = (document.media, document.max_frames)
        if document.span is None:
            elements = document_elements(document, self.config.vision.max_frames)
            parts, pictures, clips = self._read(elements, *look, pixels, mels, rates)
            layout = lay_out(parts + self._ending(document, elements, parts), self.config.tokens)
        else:
            elements, after = cut_span(self.runs(document), document.span)
            parts, pictures, clips = self._read(elements, *look, pixels, mels, rates)
            layout = lay_out(parts, self.config.tokens, _first_part(after))
        if not layout.has_loss:
            raise SampleError("no_loss", "nothing in the document carries loss")
        return _Plan(layout, pictures, clips)

    def _read(
        self,
        elements: Sequence[Element | Said | Ids],
        root: Path | MediaRoot | Mapping[str, Media],
        max_frames: int,
        pixels: bool,
        mels: bool,
        rates: Sequence[int],
    ) -> tuple[list[Part], list[_Pictures], list[_Clip]]:
        """Everything is found out from headers; what is to be decoded is decoded with the same look at the file."""
        parts: list[Part] = []
        pictures: list[_Pictures] = []
        clips: list[_Clip] = []
        for element in elements:
            if isinstance(element, TextElement):
                tokenizer = self._plain_tokenizer if element.plain else self.tokenizer
                parts.append(TextPart(encode(tokenizer, element.text), element.trainable))
                continue
            if isinstance(element, Ids):
                parts.append(TextPart(element.ids, element.trainable))
                continue
            if isinstance(element, Said):
                clips.append(_said(element.codes))
                parts.append(AudioPart(len(element.codes), element.spoken))
                continue
            media = find_media(element.reference, root)
            if isinstance(element, TokensElement):
                parts.append(TextPart(self._ids(media), element.trainable))
            elif isinstance(element, AudioElement):
                clips.append(self._clip(media, mels, rates))
                count = sum(window.code_frames for window in clips[-1].windows)
                parts.append(AudioPart(count, element.spoken, element.trainable))
            else:
                pictures.append(self._pictures(element, media, max_frames, pixels))
                parts += [self._visual_part(pictures[-1])] * pictures[-1].count
        return parts, pictures, clips

    def _as_ids(self, element: Element, root: Path | MediaRoot | Mapping[str, Media]) -> Element | Ids:
        """Text as its ids, a medium as it is."""
        if not isinstance(element, TextElement | TokensElement):
            return element
        ids = self._read([element], root, 0, False, False, ())[0][0].ids
        return Ids(ids, element.trainable)

    @cached_property
    def _plain_tokenizer(self) -> Tokenizer:
        return plain_tokenizer(self.tokenizer)

    def _ids(self, media: Media) -> list[int]:
        return read_ids(media, self.tokenizer_fingerprint, self.config.llm.vocab_size)

    def _ending(self, document: Document, elements: list[Element], parts: list[Part | Element | Ids]) -> list[TextPart]:
        last, end = elements[-1] if elements else TextElement(""), self.config.tokens.end_of_text
        ended = isinstance(last, TextElement | TokensElement) and parts and list(parts[-1].ids[-1:]) == [end]
        if not self.end_of_text or ended:
            return []
        trainable = not is_marked(document) or (
            isinstance(last, TextElement | AudioElement | TokensElement) and last.trainable
        )
        return [TextPart([end], trainable)]

    def _pictures(self, element: ImageElement | VideoElement, media: Media, max_frames: int, decode: bool) -> _Pictures:
        vision, damage = self.config.vision, Damage()
        if isinstance(element, VideoElement):
            most = min(max_frames or vision.max_frames, vision.max_frames)
            if decode:
                probe, found = read_video(media, vision.frames_per_second, most, damage)
            else:
                probe, found = probe_video(media, vision.frames_per_second, most), ()
            sides, count, frame = (probe.height, probe.width), len(probe.times), True
        else:
            found = [load_image(media, self.images)] if decode else []
            sides = found[0].size[::-1] if decode else probe_image(media, self.images)
            count, frame = 1, element.frame
        height, width = visual_size(*sides, vision, frame=frame)
        cut = partial(patchify, patch=vision.patch_size, merge=vision.spatial_merge_size)
        decoded = [cut(resize_image(picture, height, width)) for picture in found]
        return _Pictures(height, width, count, frame, decoded, damage.damaged)

    def _visual_part(self, pictures: _Pictures) -> VisualPart:
        return VisualPart(self._patch_count(pictures) // self.config.vision.merged_patches, pictures.frame)

    def _patch_count(self, pictures: _Pictures) -> int:
        """Patches of each of these pictures."""
        size = self.config.vision.patch_size
        return (pictures.height // size) * (pictures.width // size)

    def _clip(self, media: Media, decode: bool, rates: Sequence[int]) -> _Clip:
        audio = self.config.audio
        # Of the same length by construction, and decoded once.
        heard = read_audio(media, audio.sampling_rate) if decode else None
        samples = len(heard.wave) if heard else probe_audio(media, audio.sampling_rate)
        windows = clip_windows(samples, audio)
        if not windows:
            raise SampleError("unreadable_media", f"{media.name} is too short: {samples} samples give no code frame")
        mels, waves = [], []
        if heard:
            mels = [log_mel(heard.wave[window.start : window.start + window.samples], audio).T for window in windows]
        if rates:
            whole = {rate: read_audio(media, rate).wave for rate in rates}
            waves = [_cut(whole, window, audio.sampling_rate) for window in windows]
        return _Clip(media, samples, windows, mels, waves, damaged=heard.damaged if heard else 0)

    def _codes(self, clip: _Clip, window: Window, codes: Codes | None) -> Int32[np.ndarray, "n q"]:
        if clip.codes is not None:
            return clip.codes
        if codes is None:
            return np.zeros((window.code_frames, self.config.audio.levels), np.int32)
        try:
            found = np.asarray(codes.lookup(clip_key(clip.media, window.index)))
        except KeyError as error:
            raise SampleError("no_codes", f"{clip.media.name}: window {window.index} has no codes") from error
        sizes = self.config.audio.codebook_sizes
        if found.shape != (window.code_frames, len(sizes)):
            raise SampleError(
                "changed",
                f"{clip.media.name}: codes of window {window.index} have shape {found.shape}, "
                f"not {(window.code_frames, len(sizes))}",
            )
        if ((found < 0) | (found >= np.asarray(sizes))).any():
            raise SampleError("changed", f"{clip.media.name}: codes of window {window.index} exceed the codebooks")
        return found.astype(np.int32)

    def _patches(
        self, plan: _Plan
    ) -> tuple[UInt8[np.ndarray, "p v"], Int32[np.ndarray, "p 2"], Int32[np.ndarray, "p"]]:
        decoded = [each for pictures in plan.pictures for each in pictures.decoded]
        patches = [np.zeros((0, self.config.vision.patch_values), np.uint8), *(values for values, _ in decoded)]
        grids = [np.zeros((0, 2), np.int32), *(grid for _, grid in decoded)]
        numbers = np.repeat(np.arange(len(grids), dtype=np.int32), [len(grid) for grid in grids])
        return np.concatenate(patches), np.concatenate(grids), numbers


def _first_part(element: Element | Ids | None) -> Part | None:
    """What begins as the element does; of media the start mark alone matters."""
    if isinstance(element, Ids):
        return TextPart(element.ids, element.trainable)
    if isinstance(element, AudioElement):
        return AudioPart(0, element.spoken, element.trainable)
    return None if element is None else VisualPart(0)


def _said(codes: Int32[np.ndarray, "n q"]) -> _Clip:
    return _Clip(Media("speech", None), 0, [Window(0, 0, 0, 0, len(codes))], [], [], codes)


def _cut(waves: dict[int, np.ndarray], window: Window, rate: int) -> dict[int, np.ndarray]:
    """A window, counted in samples of `rate`, of one sound at several rates."""
    start, stop = window.start, window.start + window.samples
    return {other: wave[start * other // rate : stop * other // rate] for other, wave in waves.items()}
