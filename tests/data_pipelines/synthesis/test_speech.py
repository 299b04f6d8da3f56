"""Speech made from text: voices, loss marks, shares, bad input, the same output whatever runs the job."""

import argparse
import hashlib
import io
import json
import re
import time

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from baichuan_omni_jax.errors import ConfigError
from data_pipelines.datasets.builder import build
from data_pipelines.documents.document import Document
from data_pipelines.documents.prompt_writing import SPEAK_TEXT, TRANSCRIBE, image_tag, plain_text, turn
from data_pipelines.documents.prompts import AudioElement, TextElement, parse_prompt
from data_pipelines.errors import SampleError
from data_pipelines.media.location import Media
from data_pipelines.synthesis import __main__ as command
from data_pipelines.synthesis.__main__ import SENTENCES, main
from data_pipelines.synthesis.speech import espeak, speaking
from data_pipelines.synthesis.speech.espeak import VOICES
from data_pipelines.synthesis.speech.speaking import EspeakSpeech, load_speech, voice_text
from data_pipelines.synthesis.speech.tasks import INTLV, write_intlv, write_itts
from data_pipelines.synthesis.units import Draft, add_job_arguments
from tests.helpers.fake_speech import BrokenSpeech
from tests.helpers.synthesis_job import FAKE, SHORT, read, run, write_manifest

STORY = ["The lake is calm tonight. We took a boat, and went home. ", "湖水今晚很平静。我们坐船，然后回家了。"]


def digests(folder):
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and path.suffix != ".lock"  # which holds the process' number
    }


def test_there_are_44_voices_and_no_two_sound_alike():
    names = [(language, name) for language in VOICES for name in VOICES[language]]
    assert len({name for _, name in names}) == len(names) == 44

    def speak_all(order):
        speech = EspeakSpeech(16000)
        return {name: voice_text(speech, SENTENCES[language], name, language)[0] for language, name in order}

    espeak.close()
    first = speak_all(names)
    assert len({samples.tobytes() for samples in first.values()}) == 44
    assert all(np.abs(samples.astype(int)).max() > 3000 for samples in first.values())
    # In another process, the other way round, in another second: eSpeak seeds the noise of breath by the clock.
    time.sleep(1.01 - time.time() % 1)
    espeak.close()
    again = speak_all(names[::-1])
    assert all(np.array_equal(first[name], again[name]) for _, name in names)


def test_rates_of_the_included_back_end():
    lengths = []
    for name, rate in (("espeak", 16000), ("espeak-24k", 24000)):
        samples, found = voice_text(load_speech(name), "Good morning.", "en-us/m3/low/fast", "en")
        assert found == rate
        lengths.append(len(samples) / rate)
    assert lengths[0] == pytest.approx(lengths[1], abs=1e-3)
    slow, _ = voice_text(load_speech("espeak"), "Good morning.", "en-us/m3/low/slow", "en")
    assert len(slow) / 16000 > 1.1 * lengths[0]


def test_resampling_forgets_what_it_did_before(monkeypatch):
    """Straight to 16 bits, soxr's noise at the end of some 3 s would depend on what the memory held before."""
    rng, speech, voice = np.random.default_rng(0), EspeakSpeech(16000), VOICES["en"][0]

    def say(samples) -> np.ndarray:
        monkeypatch.setattr(speaking, "speak", lambda *arguments, **options: samples.astype(np.int16))
        return voice_text(speech, "...", voice, "en")[0]

    clips = [rng.normal(0, 3000, 66150 + length) for length in range(1, 120, 8)]
    first = list(map(say, clips))
    for clip, samples in zip(clips, first, strict=True):
        say(rng.normal(0, 9000, int(rng.integers(1000, 200_000))))
        assert np.array_equal(say(clip), samples), len(clip)


@pytest.mark.parametrize(
    ("text", "voice", "language", "message"),
    [
        ("hi", "klingonese/plain/mid/slow", "en", "no voice 'klingonese'"),
        ("hi", "en-us", "en", "ACCENT/VARIANT/PITCH/RATE"),
        ("hi", "cmn/m1/mid/slow", "en", "does not speak 'en'"),
        ("hi \ud83d", "en-us/m1/mid/slow", "en", "surrogates not allowed"),
        ("...", "en-us/m1/mid/slow", "en", "no sound"),
    ],
)
def test_what_espeak_refuses_is_one_document_s_error(text, voice, language, message):
    with pytest.raises(SampleError, match=message):
        voice_text(load_speech("espeak"), text, voice, language)


def test_a_crash_of_espeak_costs_one_utterance(monkeypatch, tmp_path):
    server = tmp_path / "server.py"
    source = espeak._SERVER.read_text("utf-8")
    crash = "    if 'segfault' in text:\n        ctypes.string_at(0)\n    chunks: list[bytes] = []\n"
    server.write_text(source.replace("    chunks: list[bytes] = []\n", crash), encoding="utf-8")
    monkeypatch.setattr(espeak, "_SERVER", server)
    espeak.close()
    with pytest.raises(espeak.SpeechError, match="crashed or hung"):
        espeak.speak("segfault", "en-us")
    assert len(espeak.speak("fine", "en-us")) > 5000
    server = object.__new__(espeak._Server)
    server.stdin, server.stdout = io.BytesIO(), io.BytesIO(b'{"bytes": 8}\nhalf')
    server.process = argparse.Namespace(wait=lambda: -9)
    with pytest.raises(OSError, match="exit code -9"):
        server.ask({})
    espeak._server.process.kill()
    with pytest.raises(espeak.SpeechError, match="process ended"):
        espeak.speak("fine", "en-us")
    assert len(espeak.speak("fine", "en-us")) > 5000
    espeak.close()


def test_a_missing_wheel_says_what_to_install(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(espeak.importlib.util, "find_spec", lambda name: None)
    load_speech.cache_clear()
    manifest = write_manifest(tmp_path, STORY)
    assert main(["tts", str(manifest), "--out", str(tmp_path / "out")]) == 2
    assert "pip install espeakng-loader" in capsys.readouterr().err


@given(count=st.integers(2, 9))
def test_loss_marks_of_intlv(count):
    """audio_1 text_2 audio_3 text_4 ...: no loss on audio."""
    pieces = [f"{number}. " for number in range(count)]
    elements = parse_prompt(write_intlv(pieces, lambda piece: f"{piece.strip()}wav"))
    assert [type(element) for element in elements] == [AudioElement, TextElement] * (count // 2)
    heard, written = elements[::2], elements[1::2]
    assert not any(sound.spoken or sound.trainable for sound in heard)
    assert all(text.trainable for text in written)
    whole = [text for pair in zip((sound.reference.path for sound in heard), written, strict=True) for text in pair]
    said = [item.text if isinstance(item, TextElement) else item.removesuffix("wav") + " " for item in whole]
    assert "".join(said) == "".join(pieces)


@given(count=st.integers(2, 9))
def test_loss_marks_of_itts(count):
    """text_1 audio_1 text_2 audio_2 ...: loss on text and audio except the first text."""
    pieces = [f"{number}. " for number in range(count)]
    elements = parse_prompt(write_itts(pieces, lambda piece: f"{piece.strip()}wav"))
    assert [type(element) for element in elements] == [TextElement, AudioElement] * count
    assert [element.trainable for element in elements] == [False] + [True] * (2 * count - 1)
    assert all(sound.spoken for sound in elements[1::2])
    assert [text.text for text in elements[::2]] == pieces
    assert [sound.reference.path for sound in elements[1::2]] == [f"{number}.wav" for number in range(count)]


def test_documents_of_every_job_from_text(tmp_path):
    manifest = write_manifest(tmp_path, STORY)
    for job, first in (("intlv", "d0-intlv"), ("itts", "d0-itts"), ("asr", "d0-asr"), ("tts", "d0-tts")):
        made, skipped = run(job, manifest, tmp_path / job, *SHORT)
        assert not skipped
        assert (made[0]["id"], made[0]["type"]) == (first, job)
        for document in made:
            for element in parse_prompt(document["text"]):
                if isinstance(element, AudioElement):
                    info = soundfile.info(tmp_path / job / element.reference.path)
                    assert (info.samplerate, info.channels) == (16000, 1)
                    assert 0.3 < info.duration < 8
    itts, _ = run("itts", manifest, tmp_path / "itts", *SHORT)
    assert [plain_text(document["text"]) for document in itts] == [text.strip() for text in STORY]
    asr, tts = read(tmp_path / "asr/asr.jsonl"), read(tmp_path / "tts/tts.jsonl")
    sentences = [
        "The lake is calm tonight.",
        "We took a boat, and went home.",
        "湖水今晚很平静。",
        "我们坐船，然后回家了。",
    ]
    for document, sentence, language in zip(asr, sentences, ("en", "en", "zh", "zh"), strict=True):
        prompt, heard, words = parse_prompt(document["text"])
        assert prompt.text in TRANSCRIBE[language]
        assert (heard.spoken, words) == (False, TextElement(sentence, trainable=True))
    for document, sentence, language in zip(tts, sentences, ("en", "en", "zh", "zh"), strict=True):
        prompt, spoken = parse_prompt(document["text"])
        assert prompt.text.removesuffix(sentence) in SPEAK_TEXT[language]
        assert (prompt.trainable, spoken.spoken, spoken.trainable) == (False, True, True)


def test_long_texts_become_several_documents(tmp_path):
    manifest = write_manifest(tmp_path, ["".join(f"This is sentence number {i}. " for i in range(10))])
    made, _ = run("itts", manifest, tmp_path / "out", *FAKE, "--pieces", "4")
    assert [document["id"] for document in made] == ["d0-itts", "d0-itts-2", "d0-itts-3"]
    assert "".join(plain_text(document["text"]) + " " for document in made).count("sentence number") == 10


def test_the_user_s_own_voices_and_languages(tmp_path):
    manifest = write_manifest(
        tmp_path, [STORY[0], "This holds a shibboleth inside. It is going to be refused.", STORY[1]]
    )
    made, skipped = run("intlv", manifest, tmp_path / "one", *FAKE)
    assert [document["id"] for document in made] == ["d0-intlv"]
    # It has no Chinese voice.
    assert [(line["id"], line["cause"]) for line in skipped] == [("d1", "unspeakable"), ("d2", "no_voice")]
    path = parse_prompt(made[0]["text"])[0].reference.path
    assert soundfile.info(tmp_path / "one" / path).samplerate == 24000
    made, skipped = run("intlv", manifest, tmp_path / "two", *FAKE, "--language", "mars", "--voices", "Bork")
    assert [document["id"] for document in made] == ["d0-intlv", "d2-intlv"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--tts", "festival"), "neither espeak nor espeak-24k nor of the form package.module:factory"),
        (("--tts", "no_such_module:make"), "cannot be loaded: No module named 'no_such_module'"),
        (("--tts", "tests.helpers.fake_speech:no_such"), "has no attribute 'no_such'"),
        (("--tts", "tests.helpers.fake_speech:make_nothing"), "has no method voices"),
        (("--tts", "tests.helpers.fake_speech:OldSpeech"), "has no method synthesize"),
        (("--tts", "tests.helpers.fake_speech:break_down"), "break_down cannot be loaded: RuntimeError: no model"),
        (
            (*FAKE, "--voices", "hoarse"),
            "--voices hoarse: tests.helpers.fake_speech:make has no such voice, but deep, shrill",
        ),
        ((*FAKE, "--language", "fr"), "has no voice that speaks fr"),
        ((*FAKE, "--longest", "0.1"), "--longest 0.1"),
        ((*FAKE, "--pieces", "2"), "--pieces 2"),
        ((*FAKE, "--unit", "0"), "--unit 0"),
    ],
)
def test_options_that_cannot_be_used(tmp_path, options, message):
    manifest = write_manifest(tmp_path, STORY)
    parser = argparse.ArgumentParser()
    add_job_arguments(parser)
    INTLV.add_arguments(parser)
    with pytest.raises(ConfigError, match=re.escape(message)):
        INTLV.make_job(parser.parse_args([str(manifest), "--out", str(tmp_path / "out"), *options]))


@pytest.mark.parametrize(
    ("fault", "error", "message"),
    [
        ("rate", ConfigError, "speaks at 44100 Hz: it must be 16000 or 24000"),
        ("stereo", ConfigError, r"float32 of shape \(2400, 2\)"),
        ("double", ConfigError, "float64 of shape"),
        ("nan", SampleError, "not finite"),
        ("silence", SampleError, "no sound"),
        ("nothing", SampleError, "no sound"),
    ],
)
def test_back_ends_that_break_the_interface(fault, error, message):
    with pytest.raises(error, match=message):
        voice_text(BrokenSpeech(), fault, "deep", "en")


def test_bad_documents_are_skipped_and_counted(tmp_path, capsys):
    manifest = write_manifest(
        tmp_path,
        [
            *(STORY[0], "?!", "Yes.", turn("Hello?", "Hi."), image_tag("a.png") + STORY[0]),
            *("Привет, как твои дела сегодня? Хорошо, спасибо, а у тебя?", "\ud800 is half a character. And a half."),
        ],
    )
    with manifest.open("a", encoding="utf-8") as file:
        file.write("not json\n")
    made, skipped = run("intlv", manifest, tmp_path / "out", *FAKE)
    assert [document["id"] for document in made] == ["d0-intlv"]
    assert [line["where"] for line in skipped] == [f"m.jsonl:{number}" for number in range(2, 9)]
    assert [(line["id"], line["cause"]) for line in skipped] == [
        ("d1", "no_text"),
        ("d2", "too_short"),
        ("d3", "has_turns"),
        ("d4", "has_media"),
        ("d5", "unknown_language"),
        ("d6", "bad_prompt"),
        (None, "bad_json"),
    ]
    printed = capsys.readouterr().out
    assert "7 skipped:\n" in printed
    assert "  1 bad_json, the first: m.jsonl:8 is not JSON: Expecting value at character 1\n" in printed


def test_the_same_output_from_any_number_of_workers(tmp_path):
    manifest = write_manifest(tmp_path, [f"{number} is a number. {text}" for number in range(3) for text in STORY])
    for workers in (0, 2):
        run("itts", manifest, tmp_path / str(workers), *SHORT, "--unit", "2", workers=workers)
    assert digests(tmp_path / "0") == digests(tmp_path / "2")
    assert len(read(tmp_path / "2" / "itts.jsonl")) == 6


def test_only_what_changed_is_made_again(tmp_path, capsys):
    texts = [f"This is sentence number {number}. It is not the only one." for number in range(4)]
    out = tmp_path / "out"
    run("itts", write_manifest(tmp_path, texts), out, *FAKE, "--unit", "2")
    before = digests(out)
    assert len([name for name in before if name.endswith(".flac")]) == 8
    capsys.readouterr()
    run(
        "itts",
        write_manifest(tmp_path, [*texts[:2], "This sentence is a new one. It is not like the others.", texts[3]]),
        out,
        *FAKE,
        "--unit",
        "2",
    )
    assert "1 of 2 shards are done already" in capsys.readouterr().out
    after = digests(out)
    assert all(after[name] == before[name] for name in before if name.startswith("itts-00000/"))
    run("itts", write_manifest(tmp_path, texts), tmp_path / "anew", *FAKE, "--unit", "2")
    run("itts", write_manifest(tmp_path, texts), out, *FAKE, "--unit", "2")
    assert digests(out) == digests(tmp_path / "anew") == before


def test_documents_are_named_by_their_manifest_and_line(tmp_path):
    """Where they have no id of their own: what moved is made again, and one name in two folders is two names."""
    lines = [
        json.dumps({"text": f"This is sentence number {number}. It is not the only one."}) + "\n" for number in range(4)
    ]
    manifest, out, options = tmp_path / "m.jsonl", tmp_path / "out", (*FAKE, "--unit", "2")
    manifest.write_text("".join(lines))
    run("itts", manifest, out, *options)
    manifest.write_text("".join(["\n", *lines]))
    made, _ = run("itts", manifest, out, *options)
    assert [document["id"] for document in made] == [f"m-{line}-itts" for line in (2, 3, 4, 5)]
    made, _ = run("itts", manifest.rename(tmp_path / "n.jsonl"), out, *options)
    assert made[0]["id"] == "n-2-itts"
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "m.jsonl").write_text(lines[0])
    both = [str(tmp_path / name / "m.jsonl") for name in ("x", "y")]
    assert main(["itts", *both, "--out", str(tmp_path / "two"), "--workers", "0", *options]) == 0
    assert [document["id"] for document in read(tmp_path / "two/itts.jsonl")] == ["x/m-1-itts", "y/m-1-itts"]


def test_folders_and_manifests_that_cannot_be_used(tmp_path, capsys):
    """One sentence each, and nothing that lay there is touched."""
    manifest = write_manifest(tmp_path, STORY[:1])
    assert build.main([str(manifest), "--out", str(tmp_path / "built"), "--workers", "0"]) == 0
    run("itts", manifest, tmp_path / "made", *FAKE)
    (tmp_path / "empty.jsonl").write_text("")
    capsys.readouterr()
    before = digests(tmp_path)
    for name, out, message in [
        ("m.jsonl", "built", "is not empty and holds 'dataset.json', which this program did not write"),
        ("m.jsonl", "m.jsonl", "m.jsonl is a file"),
        ("m.jsonl", "m.jsonl/x", "m.jsonl/x/.units: Not a directory"),
        ("made/itts.jsonl", "made", "made/itts.jsonl: name another folder"),
        ("gone.jsonl", "out", "gone.jsonl cannot be read: No such file"),
        ("made", "out", "made cannot be read: Is a directory"),
    ]:
        assert main(["itts", str(tmp_path / name), "--out", str(tmp_path / out), "--workers", "0", *FAKE]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
        assert digests(tmp_path) == before
    assert main(["itts", str(tmp_path / "empty.jsonl"), "--out", str(tmp_path / "out"), "--workers", "0", *FAKE]) == 2
    assert capsys.readouterr().err.startswith("error: nothing can be made of ")


def test_media_that_can_neither_be_linked_nor_copied(tmp_path):
    draft = Draft(Document("d", "", "", "m:1", tmp_path), "job", "job-00000", 0)
    draft.link(Media("gone.png", tmp_path / "gone.png"))
    with pytest.raises(SampleError, match=r"gone\.png is not a readable file") as error:
        draft.write_media(tmp_path)
    assert error.value.cause == "unreadable_media"


def test_the_voices_are_listed_and_drawn(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command, "SHOWN", 1)
    assert main(["voices", "--picture", str(tmp_path / "voices.png")]) == 0
    printed = capsys.readouterr().out.split("\n")
    assert {line.strip() for line in printed if line.startswith("  ")} == {*VOICES["en"], *VOICES["zh"]}
    with Image.open(tmp_path / "voices.png") as picture:
        assert len(picture.convert("RGB").getcolors(1000)) > 40, "it shows no spectrogram"
    for path in (tmp_path / "no" / "voices.png", tmp_path / "voices.docx"):
        with pytest.raises(ConfigError, match=f"{path.name}: a folder that exists, and one of "):
            command.draw_voices(EspeakSpeech(16000), path)
