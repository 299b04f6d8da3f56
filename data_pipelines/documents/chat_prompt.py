"""Messages of a conversation, with their media, as an encoded prompt in the released form (`conversation`).

    prompts = ChatPrompts(Processor(omni_config, tokenizer))
    prompts.encode_messages([
        {"role": "user", "content": [{"type": "image", "path": "cat.jpg"}, {"type": "text", "text": "What is this?"}]},
    ])

Text is taken literally: the name of a special token in it is text. What cannot be used raises RequestError here, and
SampleError nowhere.
"""

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from jaxtyping import Int32

from baichuan_omni_jax.config import VOICE, OmniConfig
from baichuan_omni_jax.errors import ConfigError, RequestError, StorageError
from data_pipelines.documents.document import EncodedDocument
from data_pipelines.documents.media_items import PrecomputedAudio
from data_pipelines.documents.processor import Processor
from data_pipelines.documents.prompt_writing import ROLES, opening_elements, role_mark
from data_pipelines.documents.prompts import AudioElement, Element, ImageElement, TextElement, VideoElement
from data_pipelines.errors import SampleError
from data_pipelines.media.containers import MAX_SAMPLING_RATE
from data_pipelines.media.file_kinds import plain_reason
from data_pipelines.media.location import Media, MediaReference, MediaRoot, find_media, local_path
from data_pipelines.text.spoken_text import split_text
from data_pipelines.tokenizers.tokenizer import AUDIOGEN_START

_PATIENCE = 5.0  # seconds
_FILES = ("path", "bytes", "base64")
# What a part may hold besides its type: one of these.
_SOURCES = {"text": ("text",), "image": _FILES, "video": _FILES, "audio": (*_FILES, "samples", "codes")}
_BESIDE = {"samples": ("rate",)}

Part = Mapping[str, Any]
Message = Mapping[str, Any]


class ChatPrompts:
    """Encodes what is asked for one model and one tokenizer.

    `root`: media paths are taken from that folder and must not leave it, for messages of strangers, not by a link
    either unless it leads to a folder of `trusted`; None: any file.
    """

    def __init__(self, processor: Processor, root: Path | None = None, trusted: Sequence[Path] = ()):
        self.processor = processor
        # Whoever asks waits for the answer: storage that fails for long is told.
        self.root = None if root is None else MediaRoot(Path(root), tuple(trusted), patience=_PATIENCE)

    def encode_messages(self, messages: Sequence[Message], spoken: bool = False, voice: str = VOICE) -> EncodedDocument:
        """Encodes a conversation that ends with the mark of the assistant's turn, or inside the assistant's last
        message.

        `spoken`: the answer is to be given in speech, which the marks of all the assistant's turns say; `voice` is
        named to the model where there is no system message.

        Raises RequestError: `bad_message` for a role, type, field or order that there is not; `bad_media` for a file
        that is missing, unreadable, silent, too short or too big.
        """
        if not messages:
            raise RequestError("bad_message", "there is no message")
        builder = _PromptBuilder(self.root, self.processor.config, spoken)
        first = messages[0]
        with _one_door():
            has_system = isinstance(first, Mapping) and first.get("role") == "system"
            # The voice is named by a system prompt, unless the conversation has one of its own.
            builder.elements += opening_elements(has_system, spoken, voice)
            for number, message in enumerate(messages):
                builder.add_message(message, number)
            # A last message of the assistant is continued; else its turn is opened.
            if messages[-1]["role"] != "assistant":
                builder.elements.append(TextElement(role_mark("assistant", spoken)))
            return self.processor.encode_prompt(builder.elements, builder.media)

    def encode_content(self, content: str | Sequence[Part], speak: bool = False) -> EncodedDocument:
        """Encodes content as it stands, without roles.

        Such as `ASR_PROMPT` and an audio file, or text and what was spoken of it as `codes`.

        `speak` puts the mark that begins speech at its end. Raises RequestError as `encode_messages`.
        """
        builder = _PromptBuilder(self.root, self.processor.config)
        with _one_door():
            builder.add_content(content, "the prompt", spoken_codes=True)
            if speak:
                builder.elements.append(TextElement(AUDIOGEN_START))
            if not builder.elements:
                raise RequestError("bad_message", "the prompt is empty")
            return self.processor.encode_prompt(builder.elements, builder.media)

    def sentences(self, text: str) -> list[str]:
        """Cuts text at punctuation into what is spoken at once; joined they are the text."""
        return split_text(text)


class _PromptBuilder:
    """Elements and media of a prompt in the making; media are named by numbers."""

    def __init__(self, root: MediaRoot | None, config: OmniConfig, spoken: bool = False):
        self._root, self._sizes, self._spoken = root, config.audio.codebook_sizes, spoken
        self.elements: list[Element | PrecomputedAudio] = []
        self.media: dict[str, Media] = {}

    def add_message(self, message: Message, number: int) -> None:
        where = f"message {number + 1}"
        # Unknown fields are refused, not passed over: a misspelled one would change the prompt without a word.
        if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
            raise RequestError("bad_message", f'{where} must have "role" and "content" and nothing else')
        role = message["role"]
        if role not in ROLES:
            raise RequestError("bad_message", f"{where} has role {role!r}; there are {', '.join(ROLES)}")
        if role == "system" and number:
            raise RequestError("bad_message", f"{where} is a system message, which only the first one can be")
        self.elements.append(TextElement(role_mark(role, self._spoken)))
        self.add_content(message["content"], where, from_assistant=role == "assistant")

    def add_content(self, content: Any, where: str, from_assistant: bool = False, spoken_codes: bool = False) -> None:
        """Adds the content of a message or of a whole prompt.

        Args:
            content: text, or a list of parts.
            where: what messages of errors call it.
            from_assistant: whether audio in it is speech of the assistant.
            spoken_codes: whether audio given as codes is speech of the assistant.

        Raises:
            RequestError: "bad_message" for what is neither text nor parts, or a part of no known form.
        """
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(parts, Sequence):
            raise RequestError("bad_message", f"the content of {where} is neither text nor a list of parts")
        # One element a part, in the order given: the model reads media where they stand among the text.
        for part in parts:
            kind, source = _check_part(part, where)
            if kind == "text":
                self._add_text(part["text"], where)
            # Codes of the assistant are what it said, of others what it heard: the marks around them differ.
            elif source == "codes":
                codes = _read_codes(part["codes"], self._sizes, where)
                self.elements.append(PrecomputedAudio(codes, from_assistant or spoken_codes))
            else:
                reference = self._add_media(part, source, f"{kind} of {where}")
                made = {"image": ImageElement, "video": VideoElement}
                self.elements.append(
                    made[kind](reference) if kind in made else AudioElement(reference, spoken=from_assistant)
                )

    def _add_text(self, text: Any, where: str) -> None:
        if not isinstance(text, str):
            raise RequestError("bad_message", f"the text of {where} is no text but {type(text).__name__}")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise RequestError("bad_message", f"the text of {where} is not valid Unicode: {error.reason}") from error
        if text:
            self.elements.append(TextElement(text, plain=True))

    def _add_media(self, part: Part, source: str, name: str) -> MediaReference:
        value = part[source]
        if source == "samples":
            media = Media(name, None, _wave_file(value, part.get("rate"), name))
        elif source == "bytes":
            if not isinstance(value, bytes):
                raise RequestError("bad_message", f"bytes of {name} are no bytes but {type(value).__name__}")
            media = Media(name, None, value)
        elif not isinstance(value, str | Path) or not str(value):
            raise RequestError("bad_message", f"{source} of {name} is no text")
        elif source == "base64":
            media = Media(name, None, find_media(MediaReference(base64=str(value)), Path()).data)
        else:
            media = self._file(str(value))
        # Named by a number: what a user calls a file never stands in the prompt.
        key = str(len(self.media))
        self.media[key] = media
        return MediaReference(path=key)

    def _file(self, path: str) -> Media:
        # Messages of strangers name files below the root alone; a caller in this process may name any.
        if self._root is not None:
            return find_media(MediaReference(path=path), self._root)
        try:
            found = Path(local_path(path)).expanduser()
            usable = found.is_file()
        except (OSError, ValueError, RuntimeError) as error:  # too long, a null byte, nobody's home
            raise SampleError("missing_file", f"{path!r} is no usable path: {plain_reason(error)}") from error
        if not usable:
            raise SampleError("missing_file", f"{path!r} does not exist")
        return Media(path, found, patience=_PATIENCE)


def _check_part(part: Any, where: str) -> tuple[str, str]:
    """Returns the part's type, and the field that holds what it is. Raises RequestError "bad_message"."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    if not isinstance(kind, str) or kind not in _SOURCES:
        raise RequestError("bad_message", f"a part of {where} has type {kind!r}; there are {', '.join(_SOURCES)}")
    # Exactly one field says where the content is.
    sources = [field for field in part if field in _SOURCES[kind]]
    if len(sources) != 1:
        raise RequestError("bad_message", f"{kind} of {where} must have one of {', '.join(_SOURCES[kind])}")
    known = {"type", *sources, *_BESIDE.get(sources[0], ())}
    if unknown := [field for field in part if field not in known]:
        raise RequestError("bad_message", f"{kind} of {where} has an unknown field {unknown[0]!r}")
    return kind, sources[0]


def _read_codes(codes: Any, sizes: Sequence[int], where: str) -> Int32[np.ndarray, "n q"]:
    found = _array(codes, f"codes of {where}")
    if found.ndim != 2 or found.shape[1] != len(sizes) or not np.issubdtype(found.dtype, np.integer):
        raise RequestError(
            "bad_message",
            f"codes of {where} are {found.dtype} of shape {list(found.shape)}, not whole numbers (n, {len(sizes)})",
        )
    if ((found < 0) | (found >= np.asarray(sizes))).any():
        raise RequestError("bad_message", f"codes of {where} exceed the codebooks")
    return found.astype(np.int32)


def _wave_file(samples: Any, rate: Any, name: str) -> bytes:
    """Writes samples as the bytes of a wav file, so that they take the way of all audio. 2-D: (t, channels)."""
    wave = _array(samples, f"samples of {name}")
    if isinstance(rate, bool) or not isinstance(rate, int | np.integer) or not 0 < rate <= MAX_SAMPLING_RATE:
        raise RequestError("bad_message", f"rate of {name} is {rate!r}, not samples a second")
    if wave.ndim not in (1, 2) or not (np.issubdtype(wave.dtype, np.floating) or wave.dtype in (np.int16, np.int32)):
        raise RequestError(
            "bad_message",
            f"samples of {name} are {wave.dtype} of shape {list(wave.shape)}, not floats, int16 or int32 of shape (t,)",
        )
    # Whole numbers, as int16 and int32 recordings hold them, are brought to a full scale of 1.
    whole = np.issubdtype(wave.dtype, np.integer)
    wave = wave.astype(np.float32) / (float(np.iinfo(wave.dtype).max + 1) if whole else 1.0)
    file = io.BytesIO()
    try:
        soundfile.write(file, wave, int(rate), format="WAV", subtype="FLOAT")
    except soundfile.SoundFileError as error:
        raise RequestError("bad_message", f"samples of {name} cannot be used: {error}") from error
    return file.getvalue()


def _array(values: Any, name: str) -> np.ndarray:
    try:
        return np.asarray(values)
    except ValueError as error:  # rows of unequal lengths
        raise RequestError("bad_message", f"{name} are no array: {error}") from error


@contextmanager
def _one_door() -> Iterator[None]:
    try:
        yield
    except SampleError as error:
        # Callers know two causes: what they asked for has no sense, or a file cannot be used.
        cause = "bad_message" if error.cause == "bad_prompt" else "bad_media"
        raise RequestError(cause, str(error)) from error
    except StorageError as error:
        raise RequestError("bad_media", str(error)) from error
    except ConfigError as error:  # the name of a voice
        raise RequestError("bad_message", str(error)) from error
