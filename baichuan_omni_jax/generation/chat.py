"""Chat with the model: messages of text, images, video and audio in; text and speech out, as they are made.

    loaded = load_for_generation("runs/omni")
    chat = OmniChat(make_chat_model(loaded, tokenizer), ChatPrompts(Processor(loaded.config, tokenizer)))
    for event in chat.reply([{"role": "user", "content": "What is a star?"}], settings=GenerationConfig(speech=True)):
        ...                                   # TextDelta(text, ...), AudioChunk(samples, rate), at last Finished(...)

The processor, here `data_pipelines.documents.chat_prompt.ChatPrompts`, reads and encodes media; docs/how-to/generate.md
has all of it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax
from jaxtyping import PRNGKeyArray

from baichuan_omni_jax.config import VOICE, GenerationConfig, OmniConfig
from baichuan_omni_jax.errors import RequestError
from baichuan_omni_jax.generation.chat_stream import (
    AudioChunk,
    ChatAnswer,
    ChatEvent,
    ChatStream,
    EventSource,
    Prompts,
    SpeechSynthesizer,
    TtsRequest,
    one_prompt,
    sentence_prompts,
)
from baichuan_omni_jax.generation.events import Prompt

__all__ = [
    "AudioChunk",
    "ChatAnswer",
    "ChatEvent",
    "ChatModel",
    "ChatProcessor",
    "ChatStream",
    "Conversation",
    "OmniChat",
]

Part = Mapping[str, Any]
Content = str | Sequence[Part]
Message = Mapping[str, Any]


@runtime_checkable
class GenerationBackend(Protocol):
    """The engine. `submit` raises RequestError for a prompt that it cannot serve."""

    def submit(self, prompt: Prompt, settings: GenerationConfig, key: PRNGKeyArray) -> EventSource: ...


@runtime_checkable
class ChatProcessor(Protocol):
    """What turns messages into prompts. Each method raises RequestError: `bad_message`, `bad_media`."""

    def encode_messages(self, messages: Sequence[Message], spoken: bool = False, voice: str = VOICE) -> Prompt:
        """Encodes a conversation, with the mark of the assistant's turn at its end; `spoken`: of one that answers in
        speech, with `voice` unless there is a system message."""
        ...

    def encode_content(self, content: Content, speak: bool = False) -> Prompt:
        """Encodes content as it stands, without roles; with `speak` the mark that begins speech stands at its end."""
        ...

    def sentences(self, text: str) -> list[str]:
        """Cuts text at punctuation into what is spoken at once; joined they are the text."""
        ...


@dataclass(frozen=True)
class ChatModel:
    """The engine, the architecture and, where the branches for it are there, what decodes its speech."""

    engine: GenerationBackend
    config: OmniConfig
    speech_decoder: SpeechSynthesizer | None = None


class OmniChat:
    """Answers messages; without a processor, encoded prompts alone.

    `settings` and `seed` are those of every answer that is not asked for with its own. The same messages, settings and
    key give the same answer. Several threads may ask at once: the engine serves them together.
    """

    def __init__(
        self,
        model: ChatModel,
        processor: ChatProcessor | None,
        *,
        settings: GenerationConfig | None = None,
        seed: int = 0,
    ):
        self.model, self.processor = model, processor
        self.settings = settings or GenerationConfig()
        self.key = jax.random.key(seed)

    def reply(
        self,
        messages: Sequence[Message],
        stream: bool = True,
        *,
        settings: GenerationConfig | None = None,
        key: PRNGKeyArray | None = None,
    ) -> ChatStream | ChatAnswer:
        """Answers a conversation: event by event, or (`stream=False`) whole.

        A message is `{"role": "system" | "user" | "assistant", "content": text or a list of parts}`; parts are
        `{"type": "text", "text"}`, `{"type": "image" | "audio" | "video"}` with `path`, `bytes` or `base64`, audio also
        with `samples` (t,) at `rate` Hz, or as `codes` (n, levels) earlier speech of the assistant.

        Args:
            messages: the conversation, which ends with the user's turn.
            stream: events as they are made; False: the whole answer, when it is over.
            settings: of this answer; None: the chat's.
            key: of this answer's sampling; None: the chat's.

        Returns:
            What is iterated for events and can be cancelled, or the whole answer.

        Raises:
            RequestError: `bad_message` (an unknown role, type or field), `bad_media` (missing, unreadable, silent, too
                short, too big), `too_long` (more than the cache holds), `no_branch` (media, or an answer in speech,
                that the checkpoint lacks a branch for).
        """
        settings = settings or self.settings
        prompt = self._encoder().encode_messages(messages, spoken=settings.speech, voice=settings.voice)
        return self.answer_prompt(prompt, stream, settings=settings, key=key)

    def complete(
        self,
        content: Content,
        stream: bool = True,
        *,
        settings: GenerationConfig | None = None,
        key: PRNGKeyArray | None = None,
    ) -> ChatStream | ChatAnswer:
        """Goes on where `content`, which has no roles, ends: plain text or speech recognition.

        Args:
            content: text or a list of parts, as in a message of `reply`.
            stream: as in `reply`.
            settings: as in `reply`.
            key: as in `reply`.

        Returns:
            As `reply`.

        Raises:
            RequestError: as `reply`.
        """
        return self.answer_prompt(self._encoder().encode_content(content), stream, settings=settings, key=key)

    def answer_prompt(
        self,
        prompt: Prompt,
        stream: bool = True,
        *,
        settings: GenerationConfig | None = None,
        key: PRNGKeyArray | None = None,
    ) -> ChatStream | ChatAnswer:
        """Goes on where an encoded prompt ends.

        Args:
            prompt: n tokens with their media.
            stream: as in `reply`.
            settings: as in `reply`.
            key: as in `reply`.

        Returns:
            As `reply`.

        Raises:
            RequestError: `too_long` and `no_branch`, as `reply`.
        """
        settings = settings or self.settings
        # Refused before a slot is taken: the engine would make frames that nothing can decode.
        if settings.speech:
            self._check_speech()
        request = self.model.engine.submit(prompt, settings, self.key if key is None else key)
        return self._taken(request, stream)

    def speak(
        self,
        text: str,
        stream: bool = True,
        *,
        settings: GenerationConfig | None = None,
        key: PRNGKeyArray | None = None,
    ) -> ChatStream | ChatAnswer:
        """Speaks a text, sentence by sentence, each after the speech of those before.

        Args:
            text: what is spoken, without roles.
            stream: as in `reply`.
            settings: as in `reply`.
            key: as in `reply`.

        Returns:
            As `reply`; its text is empty.

        Raises:
            RequestError: as `reply`, and `bad_message` for a text without anything to say.
        """
        return self._spoken(sentence_prompts(self._encoder(), self._encoder().sentences(text)), stream, settings, key)

    def speak_prompt(
        self,
        prompt: Prompt,
        stream: bool = True,
        *,
        settings: GenerationConfig | None = None,
        key: PRNGKeyArray | None = None,
    ) -> ChatStream | ChatAnswer:
        """Speaks what an encoded prompt calls for.

        Args:
            prompt: n tokens with their media, of which the last one is the mark that begins speech.
            stream: as in `reply`.
            settings: as in `reply`.
            key: as in `reply`.

        Returns:
            As `speak`.

        Raises:
            RequestError: `too_long` and `no_branch`, as `reply`.
        """
        return self._spoken(one_prompt(prompt), stream, settings, key)

    def _spoken(
        self, prompts: Prompts, stream: bool, settings: GenerationConfig | None, key: PRNGKeyArray | None
    ) -> ChatStream | ChatAnswer:
        self._check_speech()
        settings, key = settings or self.settings, self.key if key is None else key
        return self._taken(TtsRequest(self.model.engine, prompts, settings, key), stream)

    def _taken(self, request: EventSource, stream: bool) -> ChatStream | ChatAnswer:
        reply = ChatStream(request, self.model.speech_decoder)
        return reply if stream else reply.answer()

    def _encoder(self) -> ChatProcessor:
        if self.processor is None:
            raise RequestError("bad_message", "the checkpoint brings no text tokenizer: only token ids can be encoded")
        return self.processor

    def _check_speech(self) -> None:
        if self.model.speech_decoder is None:
            raise RequestError(
                "no_branch",
                "the checkpoint cannot speak: speech needs the branches audio_head, audio_encoder, audio_decoder, flow",
            )


class Conversation:
    """Keeps the turns of one conversation with `chat`: text, and speech as its code frames.

    `messages` is what the next prompt will hold; media given by path are read again for it. A turn is kept when its
    answer is over: whole, cancelled or let go of. For one user at a time.
    """

    def __init__(self, chat: OmniChat, system: str = ""):
        self.chat = chat
        self.messages: list[Message] = [{"role": "system", "content": system}] if system else []

    def say(
        self,
        content: Content,
        stream: bool = True,
        *,
        settings: GenerationConfig | None = None,
        key: PRNGKeyArray | None = None,
    ) -> ChatStream | ChatAnswer:
        """Answers the user's next message.

        Args:
            content: of the message, text or a list of parts.
            stream: as in `OmniChat.reply`, like `settings` and `key`.
            settings: of this answer.
            key: of this answer's sampling.

        Returns:
            As `OmniChat.reply`.

        Raises:
            RequestError: as `OmniChat.reply`; nothing of the turn is kept then.
        """
        question: Message = {"role": "user", "content": content}
        reply = self.chat.reply([*self.messages, question], settings=settings, key=key)
        assert isinstance(reply, ChatStream)
        # Question and answer are kept together at the end: a failed turn leaves no question behind.
        reply.on_end(lambda message: self.messages.extend([question, message]))
        return reply if stream else reply.answer()
