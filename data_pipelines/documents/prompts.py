"""Source prompts in the released form, read into a list of typed elements.

A source prompt is text with media tags, JSON between a start and an end mark, and with marks around what carries loss:

    <C_Q><img_start_baichuan>{"local": "cat.jpg"}<img_end_baichuan>What?<C_A><trainable_start>A cat.<trainable_end>

becomes

    [TextElement("<C_Q>"), ImageElement(cat.jpg), TextElement("What?<C_A>"), TextElement("A cat.", trainable=True)]

Where such a name is text that somebody wrote, `<literal_omni>` stands behind its first character:

    <C_Q>What is <<literal_omni>C_A>?<C_A>

is

    [TextElement("<C_Q>"), TextElement("What is <C_A>?", plain=True), TextElement("<C_A>")]
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from data_pipelines.errors import SampleError
from data_pipelines.media.location import MediaReference
from data_pipelines.tokenizers import tokenizer as names


@dataclass(frozen=True)
class TextElement:
    """Text between media; names of special tokens in it stand for their tokens, unless it is `plain`."""

    text: str
    trainable: bool = False
    plain: bool = False  # names of special tokens in it are text


@dataclass(frozen=True)
class ImageElement:
    """A still image, or one frame of a video that the prompt lists frame by frame.

    `video` numbers the prompt's lists of frames from 1; a frame outside of them has 0.
    """

    reference: MediaReference
    frame: bool = False
    video: int = field(default=0, compare=False)


@dataclass(frozen=True)
class VideoElement:
    """A video file, of which frames are taken at a fixed rate."""

    reference: MediaReference


@dataclass(frozen=True)
class AudioElement:
    """Audio that the model hears, or that it speaks (`spoken`); `trainable` only matters for spoken audio."""

    reference: MediaReference
    spoken: bool = False
    trainable: bool = False


@dataclass(frozen=True)
class TokensElement:
    """Text that is tokenized already: its ids are in a file of their own (`document.read_ids`)."""

    reference: MediaReference
    trainable: bool = False


Element = TextElement | ImageElement | VideoElement | AudioElement | TokensElement

_CLOSING = {
    names.IMAGE_START: names.IMAGE_END,
    names.AUDIO_START: names.AUDIO_END,
    names.AUDIOGEN_START: names.AUDIOGEN_END,
    names.VIDEO_START: names.VIDEO_END,
    names.FRAME_START: names.FRAME_END,
    names.TOKENS_START: names.TOKENS_END,
}
# A pad in the source would be a slot without media.
_PADS = (names.AUDIO_PAD, names.IMAGE_PAD, names.VIDEO_PLACE)
_MARKS = (*_CLOSING, *_CLOSING.values(), *_PADS, names.TRAINABLE_START, names.TRAINABLE_END)
_SPLIT = re.compile("(" + "|".join(re.escape(mark) for mark in _MARKS) + ")")
_KEYS = ("path", "local", "base64")
NAMES: tuple[str, ...] = tuple(
    sorted({*names.SPECIAL_TOKENS, *_MARKS, names.LITERAL}, key=lambda name: (-len(name), name))
)
"""Everything that is not text where it stands in a source prompt, the longest first."""
_NAME = re.compile("|".join(map(re.escape, NAMES)))
SPECIAL = re.compile("(" + "|".join(map(re.escape, sorted(names.SPECIAL_TOKENS, key=len, reverse=True))) + ")")


def escape(text: str) -> str:
    """Writes plain text as a source prompt holds it: names in it are text.

    >>> escape("a <C_A> b")
    'a <<literal_omni>C_A> b'
    """
    return _NAME.sub(lambda match: match[0][0] + names.LITERAL + match[0][1:], text)


def meet_in_a_name(left: str, right: str) -> bool:
    """Tells whether two parts of a source prompt make a name where they meet, of which each has a part."""
    # Only as much of both sides as the longest name could take.
    left, right = left[1 - len(NAMES[0]) :], right[: len(NAMES[0]) - 1]
    return any(match.start() < len(left) < match.end() for match in _NAME.finditer(left + right))


def read_text(text: str, trainable: bool = False) -> list[TextElement]:
    """Reads the text between two marks: as one element or, where it holds escaped names, cut at special tokens."""
    if names.LITERAL not in text:
        return [TextElement(text, trainable)] if text else []
    # Cut at special tokens: what holds an escaped name is plain text as a whole.
    found: list[TextElement] = []
    for part in filter(None, SPECIAL.split(text)):
        plain = names.LITERAL in part
        if found and not plain and not found[-1].plain:
            found[-1] = TextElement(found[-1].text + part, trainable)
        else:
            found.append(TextElement(part.replace(names.LITERAL, ""), trainable, plain))
    return [each for each in found if each.text]


def write_reference(key: str, reference: MediaReference) -> str:
    """Writes the JSON of a tag. `<` is spelled by its number, so that no path can hold a mark."""
    values = {"base64": reference.base64} if reference.base64 else {key: reference.path}
    return json.dumps(values).replace("<", "\\u003c")


def parse_prompt(prompt: str) -> list[Element]:
    """Reads the elements of a source prompt, in order; text is cut at media and trainable marks, empty text left out.

    Frames may stand alone or in a list between `<video_start_baichuan>` and `<video_end_baichuan>`, which is dropped,
    as in the released processor.

    Raises SampleError("bad_prompt"): a tag without its JSON or its end, an end without a start, a media pad in the
    text, trainable marks that are nested or do not pair up, text or a file's name that is not Unicode.
    """
    # Before anything is cut: half a character would fail later, in a tokenizer that names no document.
    _check_unicode(prompt, "the prompt")
    return _Parser(_SPLIT.split(prompt)).run()


def replace_references(prompt: str, change: Callable[[MediaReference, str], MediaReference]) -> str:
    """Writes the prompt with other media: a tag for which `change`, which is told its mark, too, gives another
    reference is written anew.

    All else stays as it is, byte for byte. Raises SampleError("bad_prompt").
    """
    # Marks stand at odd places; only tags whose end follows at once are references.
    parts = _SPLIT.split(prompt)
    for place in range(1, len(parts) - 2, 2):
        if parts[place + 2] == _CLOSING.get(parts[place]):
            reference = _read_reference(parts[place], parts[place + 1])
            if (new := change(reference, parts[place])) != reference:
                parts[place + 1] = write_reference("path", new)
    return "".join(parts)


class _Parser:
    """Walks over `parts`, where text (even places) and marks (odd places) alternate."""

    def __init__(self, parts: Sequence[str]):
        self.parts = parts
        self.place = 0
        self.trainable = False
        self.videos = 0  # lists of frames so far
        self.elements: list[Element] = []

    def run(self) -> list[Element]:
        self._text()
        while self.place < len(self.parts):
            self._mark(self._next())
            self._text()
        if self.trainable:
            raise SampleError("bad_prompt", f"{names.TRAINABLE_START} is never closed")
        return self.elements

    def _next(self) -> str:
        self.place += 1
        return self.parts[self.place - 1]

    def _text(self) -> None:
        self.elements += read_text(self._next(), self.trainable)

    def _mark(self, mark: str) -> None:
        # Marks of loss switch a state and leave no element; all others begin a medium, or have no place here.
        if mark == names.TRAINABLE_START:
            if self.trainable:
                raise SampleError("bad_prompt", f"{mark} inside another one")
            self.trainable = True
        elif mark == names.TRAINABLE_END:
            if not self.trainable:
                raise SampleError("bad_prompt", f"{mark} without {names.TRAINABLE_START}")
            self.trainable = False
        elif mark == names.VIDEO_START:
            self._video()
        elif mark in _CLOSING:
            self.elements.append(self._media(mark))
        elif mark in _PADS:
            # A pad stands for a medium, which is not here: it would read an embedding that nobody wrote.
            raise SampleError("bad_prompt", f"{mark} in the text of a prompt")
        else:
            raise SampleError("bad_prompt", f"{mark} without its start")

    def _media(self, mark: str) -> Element:
        reference = _read_reference(mark, self._content(mark))
        if mark == names.VIDEO_START:
            return VideoElement(reference)
        if mark in (names.IMAGE_START, names.FRAME_START):
            return ImageElement(reference, frame=mark == names.FRAME_START)
        if mark == names.TOKENS_START:
            return TokensElement(reference, self.trainable)
        return AudioElement(reference, spoken=mark == names.AUDIOGEN_START, trainable=self.trainable)

    def _content(self, mark: str) -> str:
        """Returns the text up to the end mark, which must be the next mark."""
        content = self._next()
        if self.place >= len(self.parts):
            raise SampleError("bad_prompt", f"{mark} is never closed")
        if (closing := self._next()) != _CLOSING[mark]:
            raise SampleError("bad_prompt", f"{mark} is followed by {closing} instead of {_CLOSING[mark]}")
        return content

    def _video(self) -> None:
        """Reads a video file, or a list of frames with nothing but white space between them."""
        # A list begins with a frame; anything else between the marks is a file.
        listed = self.place + 1 < len(self.parts) and self.parts[self.place + 1] == names.FRAME_START
        if not listed:
            self.elements.append(self._media(names.VIDEO_START))
            return
        self.videos += 1
        while True:
            if (between := self._next()).strip():
                raise SampleError("bad_prompt", f"text between the frames of a video: {_shorten(between)}")
            mark = self._next() if self.place < len(self.parts) else ""
            if mark == names.VIDEO_END:
                return
            if mark != names.FRAME_START:
                found = f"is followed by {mark} instead of {names.VIDEO_END}" if mark else "is never closed"
                raise SampleError("bad_prompt", f"{names.VIDEO_START} {found}")
            self.elements.append(replace(self._media(mark), video=self.videos))


def _read_reference(mark: str, content: str) -> MediaReference:
    try:
        values = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise SampleError("bad_prompt", f"{mark} holds no JSON but {_shorten(content)}") from error
    # The first key that names something wins: a tag may hold a path and a name for people.
    for key in _KEYS:
        value = values.get(key) if isinstance(values, dict) else None
        if isinstance(value, str) and value:
            _check_unicode(value, "the name of a file")
            inline = key == "base64" or value[:5].lower() == "data:"
            return MediaReference(base64=value) if inline else MediaReference(path=value)
    raise SampleError("bad_prompt", f"{mark} names no file (one of {', '.join(_KEYS)}): {_shorten(content)}")


def _check_unicode(text: str, what: str) -> None:
    """Refuses halves of characters, which JSON can spell and no report or shard can hold."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise SampleError("bad_prompt", f"{what} is not valid Unicode: {error.reason}") from error


def _shorten(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
