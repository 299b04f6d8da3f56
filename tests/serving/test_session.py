"""Conversations of the page: turns, refusals, stopping, leaving; what a browser reads of a growing answer."""

import asyncio
import io
import threading
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from baichuan_omni_jax.config import GenerationConfig
from baichuan_omni_jax.errors import ConfigError
from baichuan_omni_jax.serving.audio import SpeechWave
from baichuan_omni_jax.serving.limits import Limits, read_turn
from baichuan_omni_jax.serving.session import BUSY, Session, Sessions
from tests.helpers.page_chat import scripted_chat
from tests.helpers.proofs import wait_for
from tests.helpers.small_media import write_video

TEXT, SPEECH = GenerationConfig(), GenerationConfig(speech=True)
LIMITS = Limits(files=2, megabytes=0.5, audio_seconds=3.0, video_seconds=2.0, characters=40)


@pytest.fixture
def session(tmp_path):
    return Session(scripted_chat(), tmp_path / "session", "", LIMITS)


@pytest.fixture
def image(tmp_path) -> Path:
    Image.new("RGB", (40, 30), "teal").save(tmp_path / "teal.png")
    return tmp_path / "teal.png"


def write_audio(path: Path, seconds: float, rate: int = 16000) -> Path:
    soundfile.write(path, np.random.default_rng(0).uniform(-0.1, 0.1, round(seconds * rate)), rate)
    return path


def last(session: Session, text: str, files=(), settings=TEXT):
    return list(session.answer(text, files, settings))[-1]


def test_turns_follow_each_other(session, image):
    first = last(session, " What is this? ", [image])
    assert [message["role"] for message in first.messages] == ["user", "assistant"]
    shown, text = first.messages[0]["content"]
    assert Path(shown["path"]).read_bytes() == image.read_bytes()
    assert text == "What is this?"
    assert first.messages[1]["content"] == ["heard image What is this? "]
    assert first.status.startswith("5 tokens, the first after 0.10 s")
    second = last(session, "Sure?")
    assert second.messages[-1]["content"] == ["heard image What is this? Sure? "]
    assert second.messages[:2] == first.messages


def test_a_spoken_answer_plays_while_it_grows_and_afterwards(session):
    views = list(session.answer("Hello", [], SPEECH))
    speech = next(view.speech for view in views if view.speech)
    wave, rate = read_stream(speech)
    text, file = views[-1].messages[-1]["content"]
    kept, _ = soundfile.read(file["path"])
    assert text == "heard Hello "
    assert rate == 24000
    assert len(wave) == 6 * 1920
    np.testing.assert_allclose(wave, kept, atol=2 / 32768)
    assert "0.5 s of speech" in views[-1].status


def read_stream(speech: SpeechWave) -> tuple[np.ndarray, int]:
    async def collect():
        return b"".join([piece async for piece in speech.stream()])

    return soundfile.read(io.BytesIO(asyncio.run(collect())))


def test_audio_that_comes_later_is_streamed_too():
    speech, half = SpeechWave(8000), np.full(4000, 0.5, np.float32)
    speech.push(half)
    later = threading.Timer(0.2, lambda: (speech.push(-half), speech.close()))
    later.start()
    wave, _ = read_stream(speech)
    later.join()
    np.testing.assert_allclose(wave, np.concatenate([half, -half]), atol=1e-4)
    assert speech.playing


@pytest.mark.parametrize(
    ("text", "make", "sentence"),
    [
        (" ", None, "there is nothing to answer"),
        ("x" * 41, None, "the text has 41 characters, more than 40"),
        ("", lambda p: p.write_text("no image"), "file.bin is a text, neither an image nor an audio file nor a video"),
        ("", lambda p: p.with_suffix(".png").write_bytes(bytes(600_000)), "file.png has 0.6 MB, more than 0.5"),
        ("", lambda p: write_audio(p.with_suffix(".wav"), 3.5), "file.wav is 4 s long, more than 3 s"),
        ("", lambda p: p.with_suffix(".wav").write_bytes(b"no audio"), "file.wav is a text, neither an image nor"),
        ("", lambda p: p.with_suffix(".mp4").write_bytes(bytes(range(256))), "file.mp4 is not a readable video"),
        ("break", None, "the server failed at this request"),
    ],
    ids="nothing text kind size length audio video bug".split(),
)
def test_what_is_refused_is_said_and_not_kept(session, tmp_path, text, make, sentence):
    if make:
        make(tmp_path / "file.bin")
    view = last(session, text, sorted(tmp_path.glob("file.*")))
    assert view.messages[-1]["role"] == "assistant"
    (line,) = view.messages[-1]["content"]
    assert line.strip("*") == view.status
    assert view.status.startswith(f"Not answered: {sentence}")
    assert last(session, "Hello").messages[-1]["content"] == ["heard Hello "]


def test_a_video_brings_its_frames_and_its_audio(session, tmp_path):
    """Frames, then audio, as in the released demos; the page shows the video once."""
    path = write_video(tmp_path / "clip.mp4", 1.0, audio=0.8)
    video, audio, text = read_turn("What is it?", [path], LIMITS, note=pytest.fail)
    assert (video, audio) == ({"type": "video", "path": str(path)}, {"type": "audio", "path": str(path)})
    assert text == {"type": "text", "text": "What is it?"}
    view = last(session, "What is it?", [path])
    shown, text = view.messages[0]["content"]
    assert Path(shown["path"]).read_bytes() == path.read_bytes()
    assert text == "What is it?"
    assert view.messages[1]["content"] == ["heard video audio What is it? "]
    kept = session._conversation.messages[0]["content"]
    assert [part["path"] for part in kept[:2]] == [shown["path"]] * 2


@pytest.mark.parametrize(
    ("track", "limits", "takes_audio", "reason"),
    [
        ({"audio": 0}, LIMITS, True, "there is no audio track"),
        ({"audio": 0.8, "volume": 0.0}, LIMITS, True, "it is silent"),
        ({"audio": 0.8}, Limits(audio_seconds=0.5), True, "it is 1 s long, more than 0.5 s"),
        ({"audio": 0.8}, LIMITS, False, "the checkpoint has no branches that encode audio"),
        ({"audio": 0.04}, LIMITS, True, "it is too short"),
    ],
    ids="mute silent long deaf short".split(),
)
def test_the_page_says_why_the_audio_of_a_video_is_left_out(tmp_path, track, limits, takes_audio, reason):
    session = Session(scripted_chat(), tmp_path / "session", "", limits, takes_audio)
    path = write_video(tmp_path / "clip.mp4", 1.0, **track)
    view = last(session, "What is it?", [path])
    assert view.messages[0]["content"][1:] == ["What is it?", f"*The audio of clip.mp4 is left out: {reason}.*"]
    assert view.messages[1]["content"] == ["heard video What is it? "]


def test_a_video_that_is_too_long_is_refused(session, tmp_path):
    path = write_video(tmp_path / "clip.mp4", 3.0, audio=0.5)
    assert "clip.mp4 is 3 s long, more than 2 s" in last(session, "", [path]).status


def test_an_upload_is_shown_under_an_ending_of_its_kind(session, image, tmp_path):
    """A browser runs what it finds under .html or .svg, were it inside an image."""
    view = last(session, "", [image.rename(tmp_path / "image.html")])
    (shown,) = view.messages[0]["content"]
    assert Path(shown["path"]).name == "image.html.png"


def test_too_many_files(session, image):
    assert "3 files are attached, more than 2" in last(session, "", [image] * 3).status


def test_a_limit_must_be_positive():
    with pytest.raises(ConfigError, match="limit files 0 must be positive"):
        Limits(files=0)


def test_stopped_answers_end_and_the_next_one_comes(tmp_path):
    session = Session(scripted_chat(pace=0.02), tmp_path, "", Limits())
    views = session.answer("word " * 1000, [], TEXT)
    while next(views).messages[-1]["role"] != "assistant":
        pass
    assert next(session.answer("Hello", [], TEXT)).status == BUSY
    session.stop()
    end = list(views)[-1]
    assert end.status.startswith("Stopped. ")
    assert len(end.messages[-1]["content"][0].split()) < 500
    session.restart()
    assert last(session, "Hello").messages[-1]["content"] == ["heard Hello "]


def test_a_new_conversation_knows_nothing_of_the_last(session):
    last(session, "secret")
    assert session.restart().messages == []
    assert last(session, "Hello").messages[-1]["content"] == ["heard Hello "]


def test_an_answer_that_nobody_waits_for_is_cancelled(tmp_path):
    chat = scripted_chat(pace=0.02)
    views = Session(chat, tmp_path, "", Limits()).answer("word " * 1000, [], TEXT)
    while next(views).messages[-1]["role"] != "assistant":
        pass
    views.close()
    assert chat.model.engine.requests[0].cancelled.is_set()


def test_a_tab_that_goes_away_leaves_nothing(tmp_path, image):
    chat = scripted_chat(pace=0.02)
    sessions = Sessions(chat, tmp_path, "", Limits())
    here, there = sessions.get("here"), sessions.get("there")
    answering = threading.Thread(target=lambda: list(here.answer("word " * 1000, [image], TEXT)))
    answering.start()
    wait_for(lambda: chat.model.engine.requests)
    assert last(there, "Hello").messages[-1]["content"] == ["heard Hello "]
    sessions.close("here")
    answering.join(10)
    assert not answering.is_alive()
    assert not here.folder.exists()
    assert len(sessions) == 1


def test_the_microphone_gives_an_utterance_at_a_pause_but_hears_no_answers(session):
    rng = np.random.default_rng(0)
    spoken = rng.uniform(-8000, 8000, 48000).astype(np.int16)
    quiet = np.zeros(12000, np.int16)
    assert session.push_audio(48000, quiet) is None
    assert session.push_audio(48000, spoken) is None
    found = [utterance for _ in range(6) if (utterance := session.push_audio(48000, quiet))]
    assert len(found) == 1
    wave, rate = soundfile.read(found[0])
    assert rate == 48000
    assert len(wave) / rate == pytest.approx(1.5, abs=0.15)
    last(session, "", found, SPEECH)
    assert session.speech.playing
    assert [session.push_audio(48000, part) for part in (spoken, quiet, quiet, quiet, quiet, quiet)] == [None] * 6
    assert session.end_audio() is None
    session.stop()
    session.push_audio(48000, spoken)
    assert session.end_audio()
