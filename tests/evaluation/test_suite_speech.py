"""Spoken answers: what is heard in them, and how they sound by the models that packages bring."""

import json

import numpy as np
import pytest
import soundfile

from baichuan_omni_jax.cli import evaluate_suites
from baichuan_omni_jax.cli.chat import OpenedChat
from baichuan_omni_jax.cli.main import main
from baichuan_omni_jax.evaluation.suites.items import Item
from baichuan_omni_jax.evaluation.suites.speech import measure_answers, recognize_answers
from baichuan_omni_jax.generation.chat_stream import ChatStream
from baichuan_omni_jax.generation.events import AudioCodes, Finished, TextDelta
from tests.helpers.suite_files import RIGHT, save_random_model, write_open_audio_bench
from tests.helpers.typecheck import unchecked

RATE, HEARD = 24000, []


def hear(samples, rate):
    """A recognizer of the test's waves: a wave of n seconds says "rome" or, of more than one second, "paris"."""
    HEARD.append(len(samples) / rate)
    if len(samples) / rate > 3:
        raise RuntimeError("out of memory")
    return "it is paris" if len(samples) / rate > 1 else "it is rome"


def rate_of(samples, rate):
    return rate / 1000


class Decoder:
    """A code frame is half a second."""

    rate, vocoder = RATE, "double"

    def stream(self):
        return self

    def push(self, codes, last=False):
        return np.full(len(codes) * RATE // 2, 0.1, np.float32)

    def close(self):
        return np.zeros(0, np.float32)


class Speaking:
    """Says 1 frame to the first question of a subset, 3 to the second, nothing to the third, 7 to the last."""

    processor, model = object(), type("Model", (), {"speech_decoder": Decoder()})()

    def reply(self, messages, *, settings=None, key=None):
        frames = (1, 3, 0, 7)[int(messages[0]["content"][0]["path"][-5])]
        codes = [AudioCodes(np.zeros((frames, 8), np.int32), True)] if frames else []
        end = Finished("end", 1, 3, frames, 0.1, None, 0.1, np.zeros(2, np.int32))

        class Events(list):
            def cancel(self): ...

        return ChatStream(Events([TextDelta(f"It is {RIGHT}.", (1,), (0.0,)), *codes, end]), Decoder())


def test_what_is_heard_is_judged(tmp_path, monkeypatch, capsys):
    """Of four answers that write "It is Paris." one says Rome, one Paris, one nothing; on one the recognizer fails."""
    for library in ("whisper_normalizer", "jiwer", "cn2an"):
        pytest.importorskip(library, reason="the extra `evaluate` brings it")
    folder, out = write_open_audio_bench(tmp_path / "data"), tmp_path / "out"
    branches = frozenset(("llm", "audio_head", "audio_encoder", "audio_decoder", "flow"))
    monkeypatch.setattr(evaluate_suites, "open_chat", lambda *_, **__: OpenedChat(Speaking(), None, "", True, branches))
    # Not what is tested here; imported they take seconds.
    monkeypatch.setattr("baichuan_omni_jax.evaluation.suites.speech.find_spec", lambda name: None)
    command = [
        "evaluate",
        "--checkpoint",
        "llm=C",
        "--suite",
        "openaudiobench",
        "--data",
        str(folder),
        "--out",
        str(out),
    ]
    command += ["--speech", "--group", "trivia_qa"]
    hook = ["--asr", f"{__name__}:hear", "--mos", f"{__name__}:rate_of"]
    HEARD.clear()
    with unchecked():
        assert main([*command, *hook]) == 0
        assert HEARD == [0.5, 1.5, 3.5]
        assert main([*command, *hook, "--score-only"]) == 0
    # What was heard once is known; what failed is tried again.
    assert HEARD == [0.5, 1.5, 3.5, 3.5]
    answers = out / "openaudiobench-spoken"
    lines = [json.loads(line) for line in (answers / "answers.jsonl").read_text().splitlines()]
    assert [line.get("audio_seconds") for line in lines] == [0.5, 1.5, None, 3.5]
    assert soundfile.info(answers / lines[1]["audio"]).duration == 1.5
    scores = json.loads((answers / "scores.json").read_text())
    (trivia,) = [group for group in scores["groups"] if group["name"] == "trivia_qa"]
    # Rome and silence are wrong, the latter no answer; the report's figure is that of spoken answers.
    assert trivia["value"] == pytest.approx(100 / 3)
    assert (trivia["invalid"], trivia["problems"], trivia["report"]) == (1, {"recognizer_failed": 1}, 5.31)
    # "it is rome" for "it is paris": one word of three; of the two that could be heard one of six.
    heard = scores["measures"]["errors of what is heard against what was written, %"]
    assert (heard["value"], heard["items"]) == (pytest.approx(100 / 6), 2)
    # Both, either or neither of the two recordings.
    assert (heard["low"], heard["high"]) == pytest.approx((0, 100 / 3))
    assert scores["measures"]["MOS by the function given"]["value"] == 24
    assert any("failed on 1 answers, first with RuntimeError: out of memory" in note for note in scores["notes"])
    assert any("speechmos is not installed" in note for note in scores["notes"])
    with unchecked():
        assert main([*command, "--score-only"]) == 0
    assert "judged by what the answers wrote" in capsys.readouterr().out


def test_another_recognizer_hears_anew(tmp_path):
    (tmp_path / "audio").mkdir()
    soundfile.write(tmp_path / "audio" / "1.wav", np.zeros(RATE, np.float32), RATE)
    lines = [{"line": 1, "id": "a", "audio": "audio/1.wav"}, {"line": 2, "id": "b", "cause": "too_long"}]
    calls = []

    def recognizer(samples, rate):
        calls.append(rate)
        return "text"

    for name in ("one", "one", "two"):
        heard, notes = recognize_answers(tmp_path, lines, recognizer, name)
        assert (heard, notes) == ({1: "text"}, [])
    assert calls == [RATE, RATE]
    _, notes = recognize_answers(tmp_path, lines, lambda *_: None, "three")
    assert "it heard NoneType, not text" in notes[0]


def spoken(tmp_path, waves, rate=16000):
    (tmp_path / "audio").mkdir()
    lines, items = [], []
    for number, wave in enumerate(waves, 1):
        soundfile.write(tmp_path / "audio" / f"{number}.wav", wave, rate)
        lines.append({"line": number, "id": str(number), "text": "one", "audio": f"audio/{number}.wav"})
        items.append((number, Item(id=str(number), group="all")))
    return items, lines


@pytest.mark.slow
def test_dnsmos_hears_noise(tmp_path, sample_dir):
    """Speech is better than speech in noise, which is better than noise; silence is no answer."""
    pytest.importorskip("speechmos", reason="the extra `evaluate` brings it")
    wave, rate = soundfile.read(sorted((sample_dir / "speech").glob("en_*.wav"))[0], dtype="float32")
    noise = np.random.default_rng(0).standard_normal(len(wave)).astype(np.float32)
    values = []
    for number, each in enumerate((wave, 0.7 * wave + 0.02 * noise, 0.05 * noise)):
        folder = tmp_path / str(number)
        folder.mkdir()
        items, lines = spoken(folder, [each, np.zeros(16000, np.float32)], rate)
        measures, _ = measure_answers(folder, items, lines, None)
        values.append(measures["DNSMOS (1 to 5)"].value)
    assert values[0] > values[1] > values[2]
    assert 1 <= values[2] < 1.6


TEXTS = ("The train to the north leaves at seven.", "She has painted the old house blue.", "Two dogs ran home.")


@pytest.mark.slow
def test_similarity_tells_voices_apart(tmp_path):
    """Answers by the voice of the clips are nearer to them than answers by another voice, and near each other."""
    pytest.importorskip("resemblyzer", reason="pip install resemblyzer")
    from data_pipelines.synthesis.speech.espeak import SAMPLE_RATE, speak

    def say(voice, texts):
        return [speak(text, voice).astype(np.float32) / 32768 for text in texts]

    clips = tmp_path / "clips"
    clips.mkdir()
    for number, wave in enumerate(say("en-us", [f"{text} It was late." for text in TEXTS])):
        soundfile.write(clips / f"{number}.wav", wave, SAMPLE_RATE)
    values = {}
    for voice in ("en-us", "en-us+f2"):
        (tmp_path / voice).mkdir()
        items, lines = spoken(tmp_path / voice, say(voice, TEXTS), SAMPLE_RATE)
        for name, against in (("clips", clips), ("others", None)):
            measures, _ = measure_answers(tmp_path / voice, items, lines, None, voice=against)
            values[voice, name] = measures["speaker similarity (cosine)"].value
    assert values["en-us", "clips"] > values["en-us+f2", "clips"] + 0.1
    assert values["en-us", "others"] > 0.8


@pytest.mark.slow
def test_a_random_checkpoint_speaks(tmp_path, monkeypatch):
    """Spoken answers to spoken questions, and text read aloud: recordings that can be heard again."""
    for library in ("whisper_normalizer", "jiwer", "cn2an"):
        pytest.importorskip(library, reason="the extra `evaluate` brings it")
    names = ("llm", "audio_head", "audio_encoder", "audio_decoder", "flow")
    model = save_random_model(tmp_path / "model", *names)
    write_open_audio_bench(tmp_path / "data" / "OpenAudioBench", 1)
    meta = tmp_path / "data" / "Seed-TTS-eval" / "en" / "meta.lst"
    meta.parent.mkdir(parents=True)
    meta.write_text("u1|a prompt|u1.wav|the cat sat\nu2|a prompt|u2.wav|on the mat|w.wav\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("baichuan_omni_jax.evaluation.suites.speech.find_spec", lambda name: None)
    flags = ["evaluate", "--checkpoint", str(model), "--length", "256", "--max-tokens", "6", "--speech", "--slots", "2"]
    flags += ["--set", "segment_tokens=3", "--set", "segment_frames=5", "--asr", f"{__name__}:hear"]
    assert main([*flags, "--suite", "openaudiobench,tts-en", "--out", "out", "--limit", "1"]) == 0
    (line,) = (tmp_path / "out" / "tts-en" / "answers.jsonl").read_text().splitlines()
    line = json.loads(line)
    assert line["prompt"] == [{"type": "text", "text": "the cat sat"}]
    info = soundfile.info(tmp_path / "out" / "tts-en" / line["audio"])
    assert (info.samplerate, info.channels) == (RATE, 1)
    scores = json.loads((tmp_path / "out" / "tts-en" / "scores.json").read_text())
    # What is heard is "it is rome" or "it is paris": three other words, for three.
    assert scores["groups"][0]["value"] == pytest.approx(100)
    spoken = (tmp_path / "out" / "openaudiobench-spoken" / "answers.jsonl").read_text().splitlines()
    assert len(spoken) == 5
    assert all(json.loads(each)["settings"]["speech"] for each in spoken)
