"""Conversations of the page, one a browser tab: turns, microphone, files."""

import logging
import secrets
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np
import soundfile

from baichuan_omni_jax.config import GenerationConfig
from baichuan_omni_jax.errors import RequestError
from baichuan_omni_jax.generation.chat import AudioChunk, ChatAnswer, ChatStream, Conversation, OmniChat
from baichuan_omni_jax.generation.events import TextDelta
from baichuan_omni_jax.serving.audio import PauseDetector, PauseSettings, SpeechWave
from baichuan_omni_jax.serving.limits import Limits, read_turn

FAILED = "the server failed at this request, has written down why, and goes on"
BUSY = "Not answered: the last answer is still being given; stop it first."
# Endings under which a browser shows a file as what it is. A file of another ending gets one more: under .html or .svg
# a browser would run what the file holds.
ENDINGS = {
    "image": (".avif", ".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"),
    "audio": (".aac", ".flac", ".m4a", ".mp3", ".mp4", ".oga", ".ogg", ".opus", ".wav", ".weba", ".webm"),
    "video": (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".webm"),
}
SHOWN_AS = {"image": ".png", "audio": ".wav", "video": ".mp4"}
REFRESH = 0.1  # seconds: text may come faster than a page can be shown
PATIENCE = 30.0  # seconds in which an answer that was stopped must have ended
IDLE = 3600.0  # seconds after which a tab that was never closed is forgotten


@dataclass(frozen=True)
class View:
    """What the page shows at one moment of a turn."""

    messages: list[dict[str, Any]]  # texts and files, as Gradio's Chatbot takes them
    speech: SpeechWave | None  # the answer that is being spoken
    status: str  # one line about how it goes


class Session:
    """One browser tab's conversation, one turn at a time.

    `stop` and `close` may be called from any thread; both end the answer and free its slot.

    Attributes:
        folder: where its files lie.
        used: when its last turn ended, by `time.monotonic`.
        closed: whether its tab is gone.
        speech: the newest spoken answer.
    """

    def __init__(self, chat: OmniChat, folder: Path, system: str, limits: Limits, takes_audio: bool = True):
        """Begins a conversation.

        Args:
            chat: what answers.
            folder: where its files are to lie.
            system: its system message; "" for none.
            limits: of each turn.
            takes_audio: whether the checkpoint can encode the audio of a video.
        """
        self.folder, self.used, self.closed = folder, time.monotonic(), False
        self._chat, self._system, self._limits, self._takes_audio = chat, system, limits, takes_audio
        self._turn, self._turns, self._files = threading.Lock(), 0, 0
        self._stream: ChatStream | None = None
        self._stopped = False
        self._begin()

    def _begin(self) -> None:
        self._conversation = Conversation(self._chat, self._system)
        self._messages: list[dict[str, Any]] = []
        self._microphone: PauseDetector | None = None
        self.speech: SpeechWave | None = None

    @property
    def answering(self) -> bool:
        """Whether a turn is under way."""
        return self._turn.locked()

    def restart(self) -> View:
        """Ends the answer and begins a new conversation."""
        self.stop()
        if not self._turn.acquire(timeout=PATIENCE):
            return self._view(BUSY)
        try:
            self._begin()
            return self._view("")
        finally:
            self._turn.release()

    def stop(self) -> None:
        """Ends the answer that is being given; its last view follows."""
        self._stopped = True
        if speech := self.speech:
            speech.mute()
        if stream := self._stream:
            stream.cancel()

    def close(self) -> None:
        """Ends the answer and deletes the session's files: the tab is gone."""
        self.closed = True
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    def push_audio(self, rate: int, samples: np.ndarray) -> Path | None:
        """Takes the microphone's next samples (`PauseDetector.push`); returns a WAV file of an utterance that ended.

        While an answer is given and as long as it plays, the microphone is ignored: it would hear the answer.
        """
        if self._microphone is None or self._microphone.rate != rate:
            longest = min(PauseSettings.longest, self._limits.audio_seconds)
            self._microphone = PauseDetector(rate, PauseSettings(longest=longest))
        # The utterance begun is dropped too: its end would be the answer's beginning.
        if self.answering or (self.speech and self.speech.playing):
            self._microphone.close()
            return None
        utterances = self._microphone.push(samples)
        return self._write("spoken.wav", utterances[0], rate) if utterances else None

    def end_audio(self) -> Path | None:
        """Ends the microphone's audio; returns a WAV file of the utterance begun; None when there is none."""
        microphone, self._microphone = self._microphone, None
        if microphone is None or (utterance := microphone.close()) is None:
            return None
        return self._write("spoken.wav", utterance, microphone.rate)

    def answer(self, text: str, files: Sequence[Path], settings: GenerationConfig) -> Iterator[View]:
        """Answers one turn; each view is newer. The last one says in a sentence what cannot be answered.

        Letting go of the iterator ends the answer.
        """
        if not self._turn.acquire(blocking=False):
            yield self._view(BUSY)
            return
        try:
            self._stopped, self.speech = False, None
            yield from self._answer(text, files, settings)
        except RequestError as error:
            yield self._refuse(str(error))
        except Exception:
            logging.exception("a request failed")
            yield self._refuse(FAILED)
        finally:
            if self.speech:
                self.speech.close()
            self._stream, self.used = None, time.monotonic()
            self._turn.release()

    def _answer(self, text: str, files: Sequence[Path], settings: GenerationConfig) -> Iterator[View]:
        # The user's message is shown at once, and again when its files have been read and copied.
        turn = self._show("user", text.strip() or ", ".join(path.name for path in files))
        notes: list[str] = []
        parts = read_turn(text, files, self._limits, takes_audio=self._takes_audio, note=notes.append)
        turn["content"] = [*self._keep(parts), *(f"*{sentence}*" for sentence in notes)]
        yield self._view("Reading")
        self._turns += 1
        key = jax.random.fold_in(self._chat.key, self._turns)
        # Not `stream=False`, which alone gives a whole answer.
        stream = cast(ChatStream, self._conversation.say(parts, settings=settings, key=key))
        self._stream = stream
        # `stop` may have come while there was no stream yet.
        if self._stopped:
            stream.cancel()
        yield from self._follow(stream)
        yield self._finish(stream.answer())

    def _follow(self, stream: ChatStream) -> Iterator[View]:
        """Yields views while the answer comes."""
        shown, refreshed = None, 0.0
        for event in stream:
            if isinstance(event, TextDelta):
                shown = shown or self._show("assistant", "")
                shown["content"][0] += event.text
            elif isinstance(event, AudioChunk):
                self.speech = self.speech or SpeechWave(event.rate)
                self.speech.push(event.samples)
            # Speech must reach the player at once; text is shown at the pace of a screen.
            if isinstance(event, AudioChunk) or time.monotonic() - refreshed > REFRESH:
                refreshed = time.monotonic()
                yield self._view("Answering")

    def _finish(self, answer: ChatAnswer) -> View:
        """Shows the whole answer, its speech as a file that stays."""
        if len(answer.samples) and not self.closed:
            path = self._write("answer.wav", answer.samples, answer.rate)
            last = self._messages[-1] if answer.text else self._show("assistant")
            last["content"].append({"path": str(path)})
        elif not answer.text:
            self._show("assistant", "*(an empty answer)*")
        return self._view(summary(answer))

    def _refuse(self, sentence: str) -> View:
        """Shows why there is no answer, in its place."""
        line = f"Not answered: {sentence}."
        self._show("assistant", f"*{line}*")
        return self._view(line)

    def _show(self, role: str, *content: Any) -> dict[str, Any]:
        self._messages.append({"role": role, "content": list(content)})
        return self._messages[-1]

    def _view(self, status: str) -> View:
        messages = [{**message, "content": list(message["content"])} for message in self._messages]
        return View(messages, self.speech, status)

    def _keep(self, parts: list[dict[str, Any]]) -> list[Any]:
        """Copies uploads, which may be cleared away, to where they lie as long as the conversation.

        Returns what the page shows of the parts: a video and its audio are one file.
        """
        shown, copied = [], ("", "")
        for part in parts:
            if "path" not in part:
                shown.append(part["text"])
            elif part["type"] == "audio" and part["path"] == copied[0]:
                part["path"] = copied[1]
            else:
                path = self._place(_shown_name(part))
                shutil.copyfile(part["path"], path)
                copied = (part["path"] if part["type"] == "video" else "", str(path))
                part["path"] = str(path)
                shown.append({"path": str(path)})
        return shown

    def _write(self, name: str, samples: np.ndarray, rate: int) -> Path:
        path = self._place(name)
        soundfile.write(path, samples, rate)
        return path

    def _place(self, name: str) -> Path:
        """Returns a path of this name in a new folder, so that names may repeat."""
        self._files += 1
        folder = self.folder / str(self._files)
        folder.mkdir(parents=True)
        return folder / name


class Sessions:
    """All conversations, by what Gradio calls the session hash of a browser tab. Thread-safe.

    Each session's files lie in a folder of `folder` whose name cannot be guessed.
    """

    def __init__(self, chat: OmniChat, folder: Path, system: str, limits: Limits, takes_audio: bool = True):
        self._chat, self._folder, self._system = chat, folder, system
        self._limits, self._takes_audio = limits, takes_audio
        self._sessions: dict[str, Session] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._sessions)

    def get(self, tab: str) -> Session:
        """Returns the tab's session, begun where there was none."""
        with self._lock:
            if tab not in self._sessions:
                self._close_idle()
                folder = self._folder / secrets.token_urlsafe(16)
                self._sessions[tab] = Session(self._chat, folder, self._system, self._limits, self._takes_audio)
            return self._sessions[tab]

    def close(self, tab: str) -> None:
        """Forgets a tab that is gone."""
        with self._lock:
            session = self._sessions.pop(tab, None)
        if session:
            session.close()

    def speech(self, name: str) -> SpeechWave | None:
        """Returns the answer of that name, while it is the newest of its session."""
        with self._lock:
            found = [s.speech for s in self._sessions.values() if s.speech and s.speech.name == name]
        return found[0] if found else None

    def _close_idle(self) -> None:
        # Browsers do not always tell that a tab was closed.
        before = time.monotonic() - IDLE
        for tab in [tab for tab, s in self._sessions.items() if s.used < before and not s.answering]:
            self._sessions.pop(tab).close()


def _shown_name(part: dict[str, Any]) -> str:
    """Returns the upload's name, with an ending of its kind."""
    path = Path(part["path"])
    return path.name if path.suffix.lower() in ENDINGS[part["type"]] else path.name + SHOWN_AS[part["type"]]


def summary(answer: ChatAnswer) -> str:
    """Says in one line how much was answered, and how fast."""
    done = answer.finished
    line = "Stopped. " if done.finish_reason == "cancelled" else ""
    line += f"{done.tokens} tokens"
    if done.first_token is not None:
        line += f", the first after {done.first_token:.2f} s"
    if answer.first_audio is not None:
        line += f"; {answer.audio_seconds:.1f} s of speech, the first after {answer.first_audio:.2f} s"
    return f"{line}; {answer.seconds:.1f} s in all"
