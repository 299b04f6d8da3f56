"""From a document to its sequence: measured from headers and arithmetic, or encoded with its pixels and codes."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
from tokenizers import Tokenizer

from baichuan_omni_jax.config import ImagesConfig, OmniConfig
from data_pipelines.documents.document import Document, EncodedDocument, Lengths, read_ids
from data_pipelines.documents.media_items import (
    AudioClip,
    AudioItem,
    Codes,
    ImageGroup,
    PrecomputedAudio,
    find_codes,
    join_patches,
    read_clip,
    read_images,
)
from data_pipelines.documents.prompts import (
    AudioElement,
    Element,
    TextElement,
    TokensElement,
)
from data_pipelines.documents.sequence import (
    AudioPart,
    Ids,
    Layout,
    Part,
    Run,
    TextPart,
    VisualPart,
    audio_targets,
    cut_span,
    document_elements,
    group_media,
    is_marked,
    lay_out,
    text_targets,
    thin_frames,
)
from data_pipelines.errors import SampleError
from data_pipelines.media.images import SEEN
from data_pipelines.media.location import Media, MediaFolder, find_media
from data_pipelines.tokenizers.tokenizer import check_tokenizer, encode, plain_tokenizer, tokenizer_fingerprint

SCHEMA_VERSION = 2  # raise it when the same document and configuration give another sequence than before


@dataclass(frozen=True)
class _DocumentPlan:
    """A document: its sequence, and its media in order of appearance."""

    layout: Layout
    images: list[ImageGroup]
    clips: list[AudioClip]


@dataclass(frozen=True)
class _Decoding:
    """What is decoded with the look at a file besides its header: pixels, log mels, samples at `rates` in Hz."""

    pixels: bool = False
    mels: bool = False
    rates: Sequence[int] = ()


_NOTHING = _Decoding()


class Processor:
    """Measures and encodes documents for one model and one tokenizer. Picklable; holds no open file.

    Args:
        omni_config: the model: special tokens, limits of media, window rule, codebooks.
        tokenizer: the text tokenizer.
        end_of_text: whether `<|endoftext|>` is appended to documents that do not end with it.
        images: how stills are taken.
        unmarked: whether documents without a mark of what trains are trained whole (`all`) or refused (`refuse`).

    Raises:
        ConfigError: the tokenizer does not fit the model.
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
        """Measures what the document takes of each budget, without decoding. `items` counts images, video frames and
        clips.

        Raises SampleError: "bad_prompt", "missing_file", "outside_root", "unreadable_media", "other_tokenizer" (of
        token ids), "unmarked", "no_loss".
        """
        return self._measured(self._plan(document))

    def measure_run(self, run: Run, document: Document) -> Lengths:
        """Measures what one of the `runs` of a document takes by itself."""
        # A run is measured as a document of its own: chunks add up what their runs take.
        elements = [run] if isinstance(run, Ids) else run
        parts, images, clips = self._read(elements, document.media, document.max_frames)
        return self._measured(_DocumentPlan(lay_out(parts, self.config.tokens), images, clips))

    def _measured(self, plan: _DocumentPlan) -> Lengths:
        sizes = [group.patches for group in plan.images for _ in range(group.count)]
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
        """Returns all items of a document whatever its `span`: text as ids, end of text included, and media."""
        # Chunks of one document are asked for one after the other: its ids are kept until the next.
        key = (document.id, document.location, document.text, document.turns, document.max_frames)
        if self._last_runs[0] != key:
            elements = document_elements(document, self.config.vision.max_frames)
            found = [self._as_ids(element, document.media) for element in elements]
            last = found[-1] if found else None
            last_ids = last.ids if isinstance(last, Ids) else ()
            ending = [Ids(part.ids, part.trainable) for part in self._ending(document, elements, last_ids)]
            self._last_runs = key, group_media([*found, *ending])
        return self._last_runs[1]

    def elements(self, document: Document) -> list[Element | Ids]:
        """Reads what a document consists of; one with a `span` has its text as ids. Raises SampleError "bad_prompt"."""
        if document.span is None:
            return list(document_elements(document, self.config.vision.max_frames))
        return cut_span(self.runs(document), document.span)[0]

    def audio_items(self, document: Document) -> list[AudioItem]:
        """Lists the windows of audio that the document refers to, in order. Raises SampleError as `measure`."""
        return [
            AudioItem(clip.media, clip.samples, window)
            for clip in self._plan(document).clips
            for window in clip.windows
        ]

    def encode(
        self, document: Document, codes: Codes | None, mels: bool = False, rates: Sequence[int] = ()
    ) -> EncodedDocument:
        """Encodes a document: pixels decoded, audio as codes.

        Args:
            document: what to encode.
            codes: the store of audio codes; without it all code frames are zeros, to be filled in by a tokenizer that
                runs on the mels.
            mels: whether the log mels of audio windows are wanted, too.
            rates: at which rates in Hz samples of the windows are wanted besides.

        Returns:
            The document's arrays.

        Raises:
            SampleError: what `measure` raises; "no_codes" when the store lacks a window of its audio; "changed" when
                codes are not of the measured length or the model's codebooks; "silent_audio" where mels are asked for.
        """
        return self._encoded(self._plan(document, _Decoding(pixels=True, mels=mels, rates=rates)), codes)

    def encode_prompt(
        self, elements: Sequence[Element | PrecomputedAudio], media: Mapping[str, Media]
    ) -> EncodedDocument:
        """Encodes elements to be continued: no loss, no end of text, pixels decoded, audio heard as log mels.

        Their references name `media`. Raises SampleError as `encode`.
        """
        # Frames listed by a prompt are thinned as those of a training document are: the model sees what it was trained
        # on.
        elements = thin_frames(elements, self.config.vision.max_frames)
        parts, images, clips = self._read(elements, media, decoding=_Decoding(pixels=True, mels=True))
        return self._encoded(_DocumentPlan(lay_out(parts, self.config.tokens), images, clips), None)

    def _encoded(self, plan: _DocumentPlan, codes: Codes | None) -> EncodedDocument:
        # Codes of all windows, in the order of their slots.
        layout = plan.layout
        windows = [(clip, window) for clip in plan.clips for window in clip.windows]
        heard = [find_codes(clip, window, codes, self.config.audio) for clip, window in windows]
        sizes = self.config.audio.codebook_sizes
        frames = np.concatenate([np.zeros((0, len(sizes)), np.int32), *heard])
        # What is to be predicted, and with which weight, follows from the layout alone.
        targets, weights = text_targets(layout)
        frame_targets, frame_weights, frame_slots = audio_targets(layout, frames, sizes[0])
        # Pixels, and the place of each window's first code frame.
        patches, grid, numbers = join_patches(plan.images, self.config.vision.patch_values)
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
            damaged_packets=sum(each.damaged for each in (*plan.images, *plan.clips)),
        )

    def _plan(self, document: Document, decoding: _Decoding = _NOTHING) -> _DocumentPlan:
        # Stage 1: elements. Stage 2: parts and media. Stage 3: the layout, which tells what carries loss.
        if self.unmarked == "refuse" and not is_marked(document):
            raise SampleError("unmarked", "the document has no <trainable_start>, which data.unmarked=refuse asks for")
        look = (document.media, document.max_frames, decoding)
        if document.span is None:
            elements = document_elements(document, self.config.vision.max_frames)
            parts, images, clips = self._read(elements, *look)
            last_ids = parts[-1].ids if parts and isinstance(parts[-1], TextPart) else ()
            layout = lay_out([*parts, *self._ending(document, elements, last_ids)], self.config.tokens)
        else:
            # A chunk knows what comes after it: its last position predicts the next chunk's first token.
            elements, after = cut_span(self.runs(document), document.span)
            parts, images, clips = self._read(elements, *look)
            layout = lay_out(parts, self.config.tokens, _first_part(after))
        if not layout.has_loss:
            raise SampleError("no_loss", "nothing in the document carries loss")
        return _DocumentPlan(layout, images, clips)

    def _read(
        self,
        elements: Sequence[Element | PrecomputedAudio | Ids],
        root: Path | MediaFolder | Mapping[str, Media],
        max_frames: int = 0,
        decoding: _Decoding = _NOTHING,
    ) -> tuple[list[Part], list[ImageGroup], list[AudioClip]]:
        """Reads the parts of the sequence, and media: headers, and with the same look what is decoded."""
        parts: list[Part] = []
        images: list[ImageGroup] = []
        clips: list[AudioClip] = []
        for element in elements:
            # Text that somebody wrote never becomes a special token, whatever it spells.
            if isinstance(element, TextElement):
                tokenizer = self._plain_tokenizer if element.plain else self.tokenizer
                parts.append(TextPart(encode(tokenizer, element.text), element.trainable))
                continue
            if isinstance(element, Ids):
                parts.append(TextPart(element.ids, element.trainable))
                continue
            # Codes that a prompt brings need no file.
            if isinstance(element, PrecomputedAudio):
                clips.append(AudioClip.from_codes(element.codes))
                parts.append(AudioPart(len(element.codes), element.spoken))
                continue
            media = find_media(element.reference, root)
            if isinstance(element, TokensElement):
                ids = read_ids(media, self.tokenizer_fingerprint, self.config.llm.vocab_size)
                parts.append(TextPart(ids, element.trainable))
            elif isinstance(element, AudioElement):
                clips.append(read_clip(media, self.config.audio, decoding.mels, decoding.rates))
                parts.append(AudioPart(clips[-1].code_frames, element.spoken, element.trainable))
            else:
                images.append(read_images(element, media, self.config.vision, self.images, max_frames, decoding.pixels))
                # One slot a visual token: four patches are merged by the projector.
                count = images[-1].patches // self.config.vision.merged_patches
                parts += [VisualPart(count, images[-1].frame)] * images[-1].count
        return parts, images, clips

    def _as_ids(self, element: Element, root: Path | MediaFolder | Mapping[str, Media]) -> Element | Ids:
        """Returns text as its ids, a medium as it is."""
        if not isinstance(element, TextElement | TokensElement):
            return element
        part = self._read([element], root)[0][0]
        return Ids(part.ids if isinstance(part, TextPart) else (), element.trainable)

    @cached_property
    def _plain_tokenizer(self) -> Tokenizer:
        return plain_tokenizer(self.tokenizer)

    def _ending(self, document: Document, elements: list[Element], last_ids: Sequence[int]) -> list[TextPart]:
        """Returns the end of text, where the document does not end in it: `last_ids` are those of its last element."""
        last, end = elements[-1] if elements else TextElement(""), self.config.tokens.end_of_text
        ended = isinstance(last, TextElement | TokensElement) and list(last_ids[-1:]) == [end]
        if not self.end_of_text or ended:
            return []
        # The end is learned where what it ends is: an answer must stop, a question need not.
        trainable = not is_marked(document) or (
            isinstance(last, TextElement | AudioElement | TokensElement) and last.trainable
        )
        return [TextPart([end], trainable)]


def _first_part(element: Element | Ids | None) -> Part | None:
    """Returns what begins as the element does; of media the start mark alone matters."""
    if isinstance(element, Ids):
        return TextPart(element.ids, element.trainable)
    if isinstance(element, AudioElement):
        return AudioPart(0, element.spoken, element.trainable)
    return None if element is None else VisualPart(0)
