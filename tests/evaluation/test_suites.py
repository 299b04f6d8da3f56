"""Suites from files to scores: by a script whose score is known, resumed after a kill, judged over HTTP."""

import json
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from baichuan_omni_jax.cli import evaluate_suites
from baichuan_omni_jax.cli.chat import OpenedChat
from baichuan_omni_jax.cli.main import main
from baichuan_omni_jax.config import GenerationConfig
from baichuan_omni_jax.config.generation import settings_fields
from baichuan_omni_jax.errors import ConfigError, RequestError
from baichuan_omni_jax.evaluation.suites.answers import AnswerFile, select_items
from baichuan_omni_jax.evaluation.suites.report import Judging, score_suite
from baichuan_omni_jax.evaluation.suites.table import SUITES
from tests.helpers.suite_files import (
    RIGHT,
    JudgeDouble,
    ScriptedModel,
    save_random_model,
    serve_judge,
    write_exam,
    write_image_choice,
    write_omni_bench,
    write_open_audio_bench,
    write_recordings,
)
from tests.helpers.typecheck import unchecked

ROOT = Path(__file__).resolve().parents[2]
GREEDY = GenerationConfig(max_tokens=64).greedy()


def run(name, folder, out, script, likelihoods=None, checkpoint="C", settings=GREEDY, limit=None, judging=None):
    """Answers a suite and scores it; returns the model, the lines and the scores."""
    suite, model = SUITES[name], ScriptedModel(script)
    items = select_items(suite.read(folder), limit=limit)
    answers = AnswerFile(out / "answers.jsonl", suite, checkpoint, settings)
    answers.fill(items, model, likelihoods, at_once=4)
    lines = answers.lines(items)
    return model, lines, score_suite(name, suite, items, lines, judging or Judging())


def test_choices_about_images(tmp_path):
    """Twelve items, the right letters A B C in turn; the answer is always B. One says none, one image is broken."""
    folder, number = write_image_choice(tmp_path / "data"), []

    def script(media, text):
        number.append(text)
        return "no idea" if "shown, 1?" in text else "The answer is B."

    table = folder / "OpenMM_Medical.tsv"
    lines = table.read_text().split("\n")
    lines[3] = lines[3][:-40] + "?" * 40
    table.write_text("\n".join(lines))
    model, lines, scores = run("openmm-medical", folder, tmp_path / "out", script)
    assert model.asked == 11
    # B is the answer to 1, 4, 7, 10; number 1 gave no letter, number 2 (C) could not be seen.
    everything, xray, microscope = scores.groups
    assert everything.value == pytest.approx(100 * 3 / 11)
    assert (everything.invalid, everything.problems) == (1, {"bad_media": 1})
    assert (xray.name, xray.items, xray.value) == ("X-ray", 5, pytest.approx(100 * 2 / 5))
    assert (microscope.items, microscope.value) == (6, pytest.approx(100 / 6))
    assert scores.as_json()["groups"][0]["report"] == 83.8
    # Every item has a line that says what was asked, how, and of whom.
    assert [line["id"] for line in lines] == [str(100 + n) for n in range(12)]
    assert lines[0]["settings"] == settings_fields(GREEDY)
    assert lines[0]["settings"]["text"] == {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}
    kinds = [part["type"] for part in lines[5]["prompt"]]
    assert kinds == ["image", "image", "text"]
    assert len(lines[5]["prompt"][0]["sha256"]) == 64
    assert lines[2]["cause"] == "bad_media"
    assert "base64 is damaged" in lines[2]["error"]


def test_what_is_mended_is_asked_again_and_nothing_else(tmp_path):
    folder = write_omni_bench(tmp_path / "data")
    image = folder / "mm_data" / "image" / "3.png"
    data = image.read_bytes()
    image.write_bytes(b"no image")
    model, lines, scores = run("omnibench", folder, tmp_path / "out", lambda *_: "A")
    assert (model.asked, scores.groups[0].problems) == (7, {"bad_media": 1})
    image.write_bytes(data)
    model, lines, scores = run("omnibench", folder, tmp_path / "out", lambda *_: "D")
    assert (model.asked, lines[3]["text"], lines[2]["text"]) == (1, "D", "A")
    assert scores.groups[0].value == pytest.approx(100 * 3 / 8)


def test_answers_to_something_else_are_refused(tmp_path):
    folder, out = write_omni_bench(tmp_path / "data"), tmp_path / "out"
    run("omnibench", folder, out, lambda *_: "A", limit=2)
    before = (out / "answers.jsonl").read_bytes()
    for changes, sentence in (
        ({"checkpoint": "other"}, "was answered with checkpoint C, not other"),
        ({"settings": GenerationConfig(max_tokens=65).greedy()}, "was answered with max_tokens 64, not 65: another"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            run("omnibench", folder, out, lambda *_: "A", **changes)
    with pytest.raises(ConfigError, match="has another prompt than the suite has now"):
        run("omnibench-caption-transcript", folder, out, lambda *_: "A")
    assert (out / "answers.jsonl").read_bytes() == before
    # Fewer items than were answered are fine, and more of them go on.
    model, lines, _ = run("omnibench", folder, out, lambda *_: "A", limit=1)
    assert (model.asked, len(lines)) == (0, 2)
    model, lines, _ = run("omnibench", folder, out, lambda *_: "A")
    assert (model.asked, len(lines)) == (4, 8)


def test_error_rates_over_the_corpus(tmp_path):
    """Edits over words, summed: of 4 and 3 words one is changed and one left out."""
    for library in ("whisper_normalizer", "jiwer", "cn2an"):
        pytest.importorskip(library, reason="the extra `evaluate` brings it")
    spoken = {"84-1-0": "GO DO YOU HEAR", "84-1-1": "BUT LESS NOW"}
    folder = write_recordings(tmp_path / "data", spoken)
    heard = iter(("Go, do you here?", "But less."))
    _, lines, scores = run("asr-en", folder, tmp_path / "out", lambda *_: next(heard))
    assert scores.groups[0].value == pytest.approx(100 * 2 / 7)
    assert scores.rates
    # Recognition has its own prompt, before the recording.
    assert [part["type"] for part in lines[0]["prompt"]] == ["text", "audio"]


def test_letters_by_likelihood(tmp_path):
    """Several questions at a time; one that is refused costs itself; subjects have equal weight in Chinese."""
    folder = write_exam(tmp_path / "data", {"law": 6, "art": 2}, "cmmlu")
    batches = []

    def likelihoods(asked):
        batches.append(len(asked))
        assert all(endings == [" A", " B", " C", " D"] for _, endings in asked)
        return [
            RequestError("too_long", "too long") if "art, 1," in text.split("\n\n")[-1] else [-3.0, -1.0, -2.0, -9.0]
            for text, _ in asked
        ]

    _, lines, scores = run("cmmlu", folder, tmp_path / "out", lambda *_: "", likelihoods)
    assert lines[2]["log_likelihoods"] == {"A": -3.0, "B": -1.0, "C": -2.0, "D": -9.0}
    assert batches[0] == 4
    assert sum(batches) == 8
    values = {group.name: group.value for group in scores.groups}
    # B is right for questions 1 and 5 of law, for none of art that was scored.
    assert values == {"all": pytest.approx((100 * 2 / 6 + 0) / 2), "art": 0.0, "law": pytest.approx(100 * 2 / 6)}
    assert scores.groups[0].problems == {"too_long": 1}


def opened(model, branches=("llm", "vision", "audio_head", "audio_encoder")):
    model.processor, model.model = object(), None
    return lambda *_, **__: OpenedChat(model, None, "", True, frozenset(branches))


def command(folder, out, *more, suite="openaudiobench", checkpoint="llm=C"):
    return ["evaluate", "--checkpoint", checkpoint, "--suite", suite, "--data", str(folder), "--out", str(out), *more]


def answers_right_by_half(media, text):
    return f"It is {RIGHT}." if int(media[0]["path"][-5]) % 2 else "It is Rome."


def test_the_command_judges_over_http_and_goes_on_after_failures(tmp_path, monkeypatch, capsys):
    """Both scales beside the report's; verdicts that fail are asked for again, by a command that answers nothing."""
    folder, out = write_open_audio_bench(tmp_path / "data"), tmp_path / "out"
    model = ScriptedModel(answers_right_by_half)
    monkeypatch.setattr(evaluate_suites, "open_chat", opened(model))
    broken = [True]

    def reply(count, message):
        right = f"It is {RIGHT}." in message
        if "trivia_qa, question 3" in message and broken[0]:
            return 400
        if "web_questions, question 0" in message:
            return "cannot say"
        if "alpaca_eval" in message:
            return "Fine. [[7]]"
        if "llama_questions" in message:
            return f"the score is [{'Correct' if right else 'Incorrect'}]"
        if "reasoning_qa" in message:
            return f"so {4 if right else 1}"
        return json.dumps({"analysis": "", "judgment": "correct" if right else "incorrect"})

    double = JudgeDouble(reply)
    with unchecked(), serve_judge(double) as url:
        assert main(command(folder, out, "--judge", url)) == 1
        first = capsys.readouterr().out
        assert "not_judged" in first
        assert "answers 400" in first
        broken[0] = False
        assert main(command(folder, out, "--judge", url)) == 0
    table = capsys.readouterr().out
    scores = json.loads((out / "openaudiobench" / "scores.json").read_text())
    values = {group["name"]: group["value"] for group in scores["groups"]}
    by_hand = {"alpaca_eval": 70, "llama_questions": 50, "reasoning_qa": 50, "trivia_qa": 50, "web_questions": 200 / 3}
    assert values == pytest.approx(by_hand | {"all": sum(by_hand.values()) / 5})
    assert model.asked == 20
    rows = {line.split("|")[1].strip(): line for line in table.splitlines() if line.startswith("|")}
    assert "7.00" in rows["alpaca_eval"]
    assert "7.79 of 10 (77.9 %)" in rows["alpaca_eval"]
    assert "50 %" in rows["reasoning_qa"]
    assert "1 unparsable" in rows["web_questions"]
    assert "by our own rubrics" in table
    # Five rounds for each of the reasoning items, one for each of the others.
    kept = (out / "openaudiobench" / "verdicts.jsonl").read_text().splitlines()
    assert len(kept) == 4 * 4 + 4 * 5
    assert all({"key", "id", "value"} == set(json.loads(line)) for line in kept)


def test_rules_and_no_judge(tmp_path, monkeypatch, capsys):
    folder, out = write_open_audio_bench(tmp_path / "data"), tmp_path / "out"
    monkeypatch.setattr(evaluate_suites, "open_chat", opened(ScriptedModel(answers_right_by_half)))
    with unchecked():
        assert main(command(folder, out)) == 0
        scores = json.loads((out / "openaudiobench" / "scores.json").read_text())
        assert main([*command(folder, out, "--judge", "none"), "--score-only"]) == 0
        assert "answers only: no judge" in capsys.readouterr().out
        assert main([*command(folder, out, "--judge", "exact"), "--score-only"]) == 0
    values = {group["name"]: (group["value"], group["problems"]) for group in scores["groups"]}
    assert values["trivia_qa"] == values["web_questions"] == values["llama_questions"] == (50.0, {})
    assert values["alpaca_eval"] == values["reasoning_qa"] == (None, {"not_scored": 4})
    # "It is Paris." holds the reference and is none.
    exact = json.loads((out / "openaudiobench" / "scores.json").read_text())
    assert {group["value"] for group in exact["groups"]} == {0.0, None}


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--suite", "omnibensh"], "there is no suite 'omnibensh'; the nearest known one is omnibench"),
        (["--judge", "ftp://x"], "--judge ftp://x is no URL"),
        (["--rubrics", "x.json"], "--rubrics are for a judge"),
        (["--limit", "0"], "--limit must be at least 1"),
        (["--group", "x"], "the suite has no group 'x'"),
        (["--checkpoint", ""], "--checkpoint must be given"),
        (["--checkpoint", "/none"], "/none is neither a checkpoint"),
        (["--suite", "omnibench,mmlu"], "--data names the files of one suite"),
    ],
)
def test_flags_that_cannot_be_used_are_one_sentence(tmp_path, more, sentence, capsys):
    folder = write_open_audio_bench(tmp_path, 1)
    assert main([*command(folder, tmp_path / "out"), *more]) == 2
    assert sentence in capsys.readouterr().err.splitlines()[-1]


def test_a_checkpoint_without_the_branch_is_refused_before_the_first_item(tmp_path, monkeypatch, capsys):
    folder, model = write_open_audio_bench(tmp_path / "data", 1), ScriptedModel(answers_right_by_half)
    monkeypatch.setattr(evaluate_suites, "open_chat", opened(model, ("llm",)))
    with unchecked():
        assert main(command(folder, tmp_path / "out")) == 2
    assert "has no branch audio_encoder, which OpenAudioBench needs" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# A process of its own, which is killed: it answers slowly what the resumed run answers at once.
SLOW = """
import sys
import time
from importlib.util import find_spec
from pathlib import Path
sys.path.insert(0, {root!r})
from tests.evaluation.test_suites import GREEDY, answers_right_by_half
from tests.helpers.suite_files import ScriptedModel
from baichuan_omni_jax.evaluation.suites.answers import AnswerFile, select_items
from baichuan_omni_jax.evaluation.suites.table import SUITES
suite = SUITES["openaudiobench"]
items = select_items(suite.read(Path({folder!r})))
AnswerFile(Path({out!r}) / "answers.jsonl", suite, "C", GREEDY).fill(items, ScriptedModel(answers_right_by_half, 0.2))
"""


def test_killed_at_any_moment_the_run_goes_on(tmp_path):
    """SIGKILL in the middle: the lines that are there stay, the rest is answered, the scores are the same."""
    folder = write_open_audio_bench(tmp_path / "data")
    whole, out = tmp_path / "whole", tmp_path / "killed"
    _, _, expected = run("openaudiobench", folder, whole, answers_right_by_half)
    code = SLOW.format(root=str(ROOT), folder=str(folder), out=str(out))
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    path, deadline = out / "answers.jsonl", time.monotonic() + 300
    while not (path.exists() and path.read_bytes().count(b"\n") >= 2):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = path.read_bytes()
    answered = before.count(b"\n")
    assert 2 <= answered < 20
    with path.open("ab") as file:
        file.write(b'{"line": 99, "id": "ha')
    model, lines, scores = run("openaudiobench", folder, out, answers_right_by_half)
    assert model.asked == 20 - answered
    assert path.read_bytes().startswith(before)
    assert [line["id"] for line in lines] == [line["id"] for line in map(json.loads, (whole / "answers.jsonl").open())]
    assert scores.groups == expected.groups
    assert np.isfinite(scores.groups[0].value)


@pytest.mark.slow
def test_a_random_checkpoint_from_the_command_to_the_table(tmp_path, capsys):
    """All ways to the model: images and audio, recognition, likelihoods; a clip that is none costs itself."""
    save_random_model(tmp_path / "model", "llm", "vision", "audio_head", "audio_encoder")
    data = tmp_path / "data"
    write_omni_bench(data / "OmniBench", 3)
    (data / "OmniBench" / "mm_data" / "audio" / "1.mp3").write_bytes(b"no audio")
    write_open_audio_bench(data / "OpenAudioBench", 1)
    write_recordings(data / "LibriSpeech", {"84-1-0": "GO", "84-1-1": "STOP"})
    write_exam(data / "MMLU", {"law": 3})
    suites = ["omnibench", "openaudiobench", "mmlu"]
    if all(find_spec(library) for library in ("whisper_normalizer", "jiwer", "cn2an")):
        suites.append("asr-en")
    out = tmp_path / "out"
    flags = ["evaluate", "--checkpoint", str(tmp_path / "model"), "--length", "1024", "--max-tokens", "4"]
    flags += ["--slots", "2"]
    mp = pytest.MonkeyPatch()
    mp.chdir(tmp_path)
    with mp.context():
        assert main([*flags, "--suite", ",".join(suites), "--out", str(out)]) == 0
        first = {name: (out / name / "answers.jsonl").read_bytes() for name in suites}
        tables = capsys.readouterr().out
        # Nothing is asked twice but what was refused, and that alone is written anew.
        assert main([*flags, "--suite", ",".join(suites), "--out", str(out)]) == 0
    mp.undo()
    for name in suites:
        lines = [json.loads(line) for line in first[name].splitlines()]
        again = [json.loads(line) for line in (out / name / "answers.jsonl").read_bytes().splitlines()]
        assert sorted(map(str, again)) == sorted(map(str, lines))
    causes = [json.loads(line).get("cause") for line in first["omnibench"].splitlines()]
    assert causes == [None, "bad_media", None]
    assert "1 bad_media" in tables
    for line in map(json.loads, first["mmlu"].splitlines()):
        scores = line["log_likelihoods"]
        assert sorted(scores) == list("ABCD")
        assert all(value < 0 for value in scores.values())
        assert line["text"] == max(scores, key=scores.get)
