"""The chat with an engine and a speech decoder made of lists: what reaches the caller, what a conversation keeps."""

from dataclasses import replace

import numpy as np
import pytest

from baichuan_omni_jax.config import GenerationConfig, tiny
from baichuan_omni_jax.errors import RequestError
from baichuan_omni_jax.generation.chat import AudioChunk, ChatModel, Conversation, OmniChat
from baichuan_omni_jax.generation.events import AudioCodes, Finished, Prompt, TextDelta

ALOUD = GenerationConfig(speech=True)
LEVELS = tiny().audio.levels
HOP = 1920  # samples of a code frame at 24 kHz


def codes(count: int, value: int = 1) -> np.ndarray:
    return np.full((count, LEVELS), value, np.int32)


def finished(reason: str = "end") -> Finished:
    return Finished(reason, 3, 2, 5, 0.1, 0.2, 1.0, np.arange(5, dtype=np.int32))


class Request:
    """Events of a list; what was cancelled gives its last event next."""

    def __init__(self, events):
        self.events, self.cancelled = list(events), False

    def __iter__(self):
        for event in self.events:
            if self.cancelled and not isinstance(event, Finished):
                continue
            if isinstance(event, RequestError):
                raise event
            yield finished("cancelled") if self.cancelled else event

    def cancel(self):
        self.cancelled = True


class Engine:
    """Answers every prompt with the same events, and keeps what it was asked."""

    def __init__(self, *events):
        self.events, self.prompts, self.requests = events, [], []

    def submit(self, prompt, settings, key):
        self.prompts.append(prompt.content)
        self.requests.append(Request(self.events))
        return self.requests[-1]


class FakeSpeechDecoder:
    """A frame sounds as its first code; one frame of each stretch is held back until it ends."""

    rate, vocoder = 24000, "griffin_lim"

    def stream(self):
        return Stream()


class Stream:
    def __init__(self):
        self.held = np.zeros(0, np.float32)

    def push(self, codes, last=False):
        wave = np.concatenate([self.held, np.repeat(codes[:, 0].astype(np.float32), HOP)])
        ready = len(wave) if last else max(0, len(wave) - HOP)
        self.held = wave[ready:]
        return wave[:ready]

    def close(self):
        return self.push(codes(0), last=True)


class Asked:
    """A prompt that knows what it was made of, and nothing else."""

    def __init__(self, content, speak=False):
        self.content, self.speak = content, speak
        for name in (name for name, value in vars(Prompt).items() if isinstance(value, property)):
            setattr(self, name, None)


class Processor:
    """Prompts are what they were made of."""

    def encode_messages(self, messages, spoken=False, voice=""):
        for message in messages:
            if message["role"] not in ("system", "user", "assistant"):
                raise RequestError("bad_message", f"unknown role {message['role']!r}")
        self.form = spoken, voice
        return Asked(list(messages))

    def encode_content(self, content, speak=False):
        return Asked(list(content), speak)

    def sentences(self, text):
        return text.split("|")


def make_chat(*events, speaker=True):
    engine = Engine(*events)
    return OmniChat(ChatModel(engine, tiny(), FakeSpeechDecoder() if speaker else None), Processor()), engine


SPOKEN = (
    TextDelta("Hi", (1,), (-0.5,)),
    TextDelta(", ", (2,), (-0.25,)),
    AudioCodes(codes(2, 1), False),
    AudioCodes(codes(1, 1), True),
    TextDelta("you.", (3,), (-1.0,)),
    AudioCodes(codes(2, 3), True),
    finished(),
)
QUESTION = [{"role": "user", "content": "Hello?"}]


def test_pieces_come_as_they_are_made():
    """Sound of a stretch is there before the text that follows it was asked for."""
    chat, _ = make_chat(*SPOKEN)
    kinds = [type(event) for event in chat.reply(QUESTION, settings=ALOUD)]
    assert kinds == [TextDelta, TextDelta, AudioChunk, AudioChunk, TextDelta, AudioChunk, Finished]


def test_a_whole_answer():
    chat, _ = make_chat(*SPOKEN)
    answer = chat.reply(QUESTION, stream=False, settings=ALOUD)
    assert answer.text == "Hi, you."
    assert answer.tokens == (1, 2, 3)
    assert answer.logprobs == (-0.5, -0.25, -1.0)
    np.testing.assert_array_equal(answer.codes, np.concatenate([codes(3, 1), codes(2, 3)]))
    assert answer.rate == 24000
    np.testing.assert_array_equal(answer.samples, np.repeat(np.float32([1, 1, 1, 3, 3]), HOP))
    assert answer.finished.finish_reason == "end"
    assert 0 <= answer.first_audio <= answer.seconds
    assert answer.real_time_factor == pytest.approx(answer.seconds / 0.4)


def test_an_answer_aloud_is_asked_for_in_its_form():
    chat, _ = make_chat(*SPOKEN)
    chat.reply(QUESTION, settings=ALOUD)
    assert chat.processor.form == (True, "邻家女声")
    chat.reply(QUESTION, settings=replace(ALOUD, voice="小明"))
    assert chat.processor.form == (True, "小明")
    Conversation(chat).say("Hello?")
    assert not chat.processor.form[0]


def test_chunks_are_the_whole_answer():
    chat, _ = make_chat(*SPOKEN)
    chunks = [event for event in chat.reply(QUESTION, settings=ALOUD) if isinstance(event, AudioChunk)]
    whole = chat.reply(QUESTION, stream=False, settings=ALOUD)
    np.testing.assert_array_equal(np.concatenate([chunk.samples for chunk in chunks]), whole.samples)
    assert {chunk.rate for chunk in chunks} == {24000}


def test_a_conversation_keeps_what_was_said_as_text_and_codes():
    chat, engine = make_chat(*SPOKEN)
    talk = Conversation(chat, system="Be kind.")
    talk.say("Hello?", stream=False, settings=ALOUD)
    talk.say("And now?", stream=False, settings=ALOUD)
    system, first, answer, second = engine.prompts[1]
    assert (system["role"], first["content"], second["content"]) == ("system", "Hello?", "And now?")
    said = answer["content"]
    assert [part["type"] for part in said] == ["text", "audio", "text", "audio"]
    assert [part["text"] for part in said[::2]] == ["Hi, ", "you."]
    np.testing.assert_array_equal(said[1]["codes"], codes(3, 1))
    np.testing.assert_array_equal(said[3]["codes"], codes(2, 3))
    assert len(talk.messages) == 5


def test_a_refused_turn_is_not_kept():
    chat, _ = make_chat(*SPOKEN)
    talk = Conversation(chat)
    chat.processor.encode_messages = lambda messages, **form: (_ for _ in ()).throw(
        RequestError("bad_media", "a.png is gone")
    )
    with pytest.raises(RequestError, match=r"a\.png is gone") as error:
        talk.say([{"type": "image", "path": "a.png"}])
    assert error.value.cause == "bad_media"
    assert talk.messages == []


def test_cancelling_ends_the_sound_and_keeps_what_was_said():
    chat, engine = make_chat(*SPOKEN)
    talk = Conversation(chat)
    reply = talk.say("Hello?", settings=ALOUD)
    next(reply)
    reply.cancel()
    events = list(reply)
    assert [type(event) for event in events] == [Finished]
    assert events[0].finish_reason == "cancelled"
    assert engine.requests[0].cancelled
    assert talk.messages[-1] == {"role": "assistant", "content": [{"type": "text", "text": "Hi"}]}


def test_a_failed_answer_is_no_turn():
    """The engine gives up in the middle: the reply raises, has no whole answer, and nothing is kept."""
    chat, engine = make_chat(TextDelta("Hi", (1,), (0.0,)), finished())
    engine.events = (TextDelta("Hi", (1,), (0.0,)), RequestError("failed", "out of memory"))
    talk = Conversation(chat)
    reply = talk.say("Hello?")
    with pytest.raises(RequestError, match="out of memory"):
        list(reply)
    with pytest.raises(RequestError, match="broke off"):
        reply.answer()
    assert talk.messages == []
    assert engine.requests[0].cancelled


def test_letting_go_of_a_reply_frees_its_place():
    chat, engine = make_chat(*SPOKEN)
    reply = chat.reply(QUESTION, settings=ALOUD)
    next(reply)
    del reply
    assert engine.requests[0].cancelled


def test_speech_without_a_speaker_is_refused():
    chat, engine = make_chat(*SPOKEN, speaker=False)
    for ask in (lambda: chat.reply(QUESTION, settings=ALOUD), lambda: chat.speak("Hello.")):
        with pytest.raises(RequestError, match="cannot speak") as error:
            ask()
        assert error.value.cause == "no_branch"
    assert not engine.prompts


def test_a_text_is_read_sentence_by_sentence_after_what_was_said():
    """What the model would write after a sentence's speech is cut off."""
    chat, engine = make_chat(
        AudioCodes(codes(2), False), AudioCodes(codes(1), True), TextDelta("no", (7,), (0.0,)), finished()
    )
    answer = chat.speak("One. |Two.| ", stream=False)
    first, second = engine.prompts
    assert first == [{"type": "text", "text": "One. "}]
    assert [part["type"] for part in second] == ["text", "audio", "text"]
    np.testing.assert_array_equal(second[1]["codes"], codes(3))
    assert answer.text == ""
    assert answer.finished.finish_reason == "end"
    assert len(answer.codes) == 6
    assert len(answer.samples) == 6 * HOP


def test_speech_that_was_cut_short_says_so(monkeypatch):
    monkeypatch.setattr(Request, "cancel", lambda self: None)  # it is over when its last frames are seen
    chat, _ = make_chat(AudioCodes(codes(2), True), finished("length"))
    assert chat.speak("One. |Two.", stream=False).finished.finish_reason == "length"


def test_nothing_to_read_is_refused():
    chat, _ = make_chat(finished())
    with pytest.raises(RequestError, match="nothing to say"):
        chat.speak(" | ")
