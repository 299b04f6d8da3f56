"""Suites whose files are damaged, and files of answers that are: one sentence, the others go on, no answer is lost."""

import json
import os
import re
from pathlib import Path

import pytest

from baichuan_omni_jax.checkpoint.branches import BRANCHES_FILE
from baichuan_omni_jax.checkpoint.checksums import write_checksums
from baichuan_omni_jax.cli import evaluate_suites
from baichuan_omni_jax.cli.chat import OpenedChat
from baichuan_omni_jax.cli.main import main
from baichuan_omni_jax.config import GenerationConfig
from baichuan_omni_jax.errors import ConfigError, RequestError
from baichuan_omni_jax.evaluation.suites.answers import AnswerFile, select_items
from baichuan_omni_jax.evaluation.suites.items import ItemMedia
from baichuan_omni_jax.evaluation.suites.report import Judging, score_suite
from baichuan_omni_jax.evaluation.suites.table import SUITES
from tests.helpers.suite_files import (
    ScriptedModel,
    write_agieval,
    write_exam,
    write_image_choice,
    write_omni_bench,
    write_open_audio_bench,
    write_recordings,
    write_video_mme,
)
from tests.helpers.typecheck import unchecked

GREEDY = GenerationConfig(max_tokens=64).greedy()


def edit(path: Path, before: str | bytes, after: str | bytes) -> None:
    before, after = (text.encode() if isinstance(text, str) else text for text in (before, after))
    data = path.read_bytes()
    assert before in data
    path.write_bytes(data.replace(before, after, 1))


def only(folder: Path, pattern: str) -> Path:
    (path,) = folder.glob(pattern)
    return path


WRITERS = {
    "openmm-medical": (write_image_choice, "*.tsv"),
    "omnibench": (write_omni_bench, "dataset/*.jsonl"),
    "openaudiobench": (lambda folder: write_open_audio_bench(folder, 2), "eval_datas/trivia_qa/*.csv"),
    "mmlu": (lambda folder: write_exam(folder, {"law": 4}), "data/test/*.csv"),
    "cmmlu": (lambda folder: write_exam(folder, {"law": 4}, "cmmlu"), "test/*.csv"),
    "agieval": (write_agieval, "data/v1/sat-en.jsonl"),
    "video-mme": (lambda folder: write_video_mme(folder, 2), "test.jsonl"),
}


def read(name: str, folder: Path, before: str | bytes, after: str | bytes):
    """The items of a suite one of whose files was changed."""
    write, pattern = WRITERS[name]
    write(folder)
    edit(only(folder, pattern), before, after)
    return [item for _, item in select_items(SUITES[name].read(folder))]


@pytest.mark.parametrize(
    ("name", "before", "after", "sentence"),
    [
        ("openmm-medical", "\tB\tmicro", "\tZ\tmicro", r"\.tsv:3: its answer 'Z' is no letter of its 4 options"),
        ("openmm-medical", "\tB\tmicro", "\tAB\tmicro", "its answer 'AB' is no letter"),
        ("omnibench", '"answer": "it is late"', '"answer": "late"', r"\.jsonl:2: its answer 'late' is none of its"),
        ("omnibench", '"question": "Why, 1?"', '"questions": ""', r"\.jsonl:2 has no column 'question'"),
        ("omnibench", '"options": ["it rains", "it is late"', '"options": [null, []', "is none of its options"),
        ("mmlu", ",B\r\n", ",E\r\n", r"law_test\.csv:2: its answer 'E' is no letter of its 4 options"),
        ("mmlu", ",B\r\n", "\r\n", "has no column 'answer'"),
        ("cmmlu", ",B\r\n", ",\r\n", "its answer '' is no letter"),
        ("agieval", '"label": "B"', '"label": null', r"sat-en\.jsonl:2: its label '' is no letter of its 4 options"),
        ("video-mme", '"answer": "B"', '"answer": "Q"', "its answer 'Q' is no letter of its 4 options"),
    ],
)
def test_a_damaged_row_costs_itself(tmp_path, name, before, after, sentence):
    items = read(name, tmp_path / "data", before, after)
    (bad,) = [item for item in items if item.problem]
    assert re.search(sentence, bad.problem)
    assert len(items) > 1
    # It is asked and told as any other, with its cause.
    chosen = [(number, item) for number, item in enumerate(items, 1) if item.problem]
    answers = AnswerFile(tmp_path / "answers.jsonl", SUITES[name], "C", GREEDY)
    answers.fill(chosen, ScriptedModel(lambda *_: "A"))
    (line,) = answers.lines(chosen)
    assert (line["cause"], line["error"]) == ("bad_item", bad.problem)
    scores = score_suite(name, SUITES[name], chosen, [line], Judging())
    assert scores.groups[0].problems == {"bad_item": 1}


def test_a_table_of_damaged_rows_alone_is_refused(tmp_path):
    (tmp_path / "b.tsv").write_text("index\tquestion\tA\tB\tanswer\timage\n1\t?\tx\ty\tZ\tz\n")
    items = SUITES["openmm-medical"].read(tmp_path)
    with pytest.raises(ConfigError, match=r"b\.tsv:2: its answer 'Z' is no letter"):
        select_items(items)


@pytest.mark.parametrize(
    ("name", "before", "after", "sentence"),
    [
        ("openmm-medical", "What is shown, 3", '"What is shown, 3', r"\.tsv:5 has a quotation mark that the file does"),
        ("openmm-medical", "What", b"\xce\xd2", r"\.tsv:2 cannot be read, it is not UTF-8"),
        ("openaudiobench", "trivia_qa_0", b"\xff", "cannot be read, it is not UTF-8"),
        ("omnibench", '{"index": 1', '{"index": ' + 100000 * "[", r"\.jsonl:2 is not JSON"),
        ("omnibench", '"index": 1', '"index": 0', "two items '0'"),
    ],
)
def test_a_damaged_table_is_named_with_its_line(tmp_path, name, before, after, sentence):
    with pytest.raises(ConfigError, match=sentence):
        read(name, tmp_path, before, after)


def test_a_table_without_a_row_is_named(tmp_path):
    folder = write_open_audio_bench(tmp_path, 1)
    table = folder / "eval_datas" / "trivia_qa" / "trivia_qa.csv"
    for data in (table.read_bytes().split(b"\n")[0], b"\0" * 500):
        table.write_bytes(data)
        items = SUITES["openaudiobench"].read(folder)
        with pytest.raises(ConfigError, match=r"trivia_qa\.csv has no row"):
            list(items)


@pytest.mark.parametrize("mark", ["\u2028", "\x0b", "\x0c", "\x1c", "\x85"])
def test_line_ends_that_only_text_knows_end_no_row(tmp_path, mark):
    """The row is read again when its image is asked for: it must be the same row."""
    items = read("openmm-medical", tmp_path, "What is shown, 1?", f"What{mark}is shown?")
    assert items[1].question == f"What{mark}is shown?"
    assert items[1].media[0].load()[0]["bytes"].startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("change", "options"),
    [
        ('["5", "3.5 m", "C. x", "D"]', ("5", "3.5 m", "x", "D")),
        ('["A.1", "J. Smith", "(C) x", "D) y "]', ("1", "J. Smith", "x", "y")),
        ('["", "(", "B. x", "."]', ("", "(", "B. x", ".")),
    ],
)
def test_letters_are_taken_from_options_that_begin_with_their_own(tmp_path, change, options):
    items = read("video-mme", tmp_path, '["A. A car.", "B. A dog.", "C. Nothing.", "D. A leaf."]', change)
    assert items[0].options == options


def test_half_characters_and_odd_lists_are_text(tmp_path):
    items = read("omnibench", tmp_path, "Why, 1?", "Why \\ud800?")
    assert items[1].question == "Why ??"
    for odd in ("[" * 5000 + "]", "[{[]: 1}]", "[0-9]"):
        write_open_audio_bench(tmp_path / "audio", 1) if not (tmp_path / "audio").exists() else None
        table = tmp_path / "audio" / "eval_datas" / "trivia_qa" / "trivia_qa.csv"
        table.write_text(f"audio_filename,question,answer_normalized_aliases\na.mp3,?,{odd}\n")
        item = next(item for item in SUITES["openaudiobench"].read(tmp_path / "audio") if item.group == "trivia_qa")
        assert item.references == (odd,)


def test_what_is_no_file_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path, sentence in (
        (tmp_path / "pipe", "it is no file"),
        (Path("/dev/zero"), "it is no file"),
        (tmp_path, "it is a folder"),
        (tmp_path / "loop", "cannot be read"),
        (tmp_path / "a\0b", "cannot be read"),
        (tmp_path / ("a" * 5000), "cannot be read"),
    ):
        with pytest.raises(RequestError, match=sentence) as caught:
            ItemMedia("image", "x.png", path).load()
        assert caught.value.cause == "bad_media"


@pytest.mark.parametrize(
    ("text", "spoken"),
    [
        (b"\xef\xbb\xbfa-1 GO DO\r\na-2 NOW\r\n", {"a-1": "GO DO", "a-2": "NOW"}),
        (b"a-1\tGO DO\na-2\t\n", {"a-1": "GO DO", "a-2": ""}),
        ("a-1 GO\u2028DO\n".encode(), {"a-1": "GO\u2028DO"}),
    ],
)
def test_transcripts_with_other_line_ends_and_tabs(tmp_path, text, spoken):
    folder = write_recordings(tmp_path, {"a-1": "", "a-2": ""})
    only(folder, "**/*.trans.txt").write_bytes(text)
    items = list(SUITES["asr-en"].read(folder))
    assert {item.id: item.references[0] for item in items} == spoken
    assert all(item.media[0].path.is_file() for item in items)


def test_transcripts_that_are_none(tmp_path):
    folder = write_recordings(tmp_path / "a", {"a-1": ""})
    only(folder, "**/*.trans.txt").write_bytes(b"<html>\n<body>Sign in</body>")
    with pytest.raises(ConfigError, match=r"trans\.txt is a web page, not the file itself"):
        list(SUITES["asr-en"].read(folder))
    (tmp_path / "b" / "text").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"holds no \*\.trans\.txt"):
        list(SUITES["asr-en"].read(tmp_path / "b"))


@pytest.fixture
def answered(tmp_path):
    """Four items with their answers; returns them, the file, and what answers again: the numbers that are asked."""
    name, folder = "omnibench", write_omni_bench(tmp_path / "data", 4)
    items = select_items(SUITES[name].read(folder))
    answers = AnswerFile(tmp_path / "out" / "answers.jsonl", SUITES[name], "C", GREEDY)
    answers.fill(items, ScriptedModel(lambda *_: "A"))

    def again() -> list[int]:
        before = {line["line"] for line in answers.lines(items)}
        model = ScriptedModel(lambda *_: "A")
        answers.fill(items, model)
        assert [line["text"] for line in answers.lines(items)] == ["A"] * 4
        assert answers.path.read_bytes().count(b"\n") == 4
        assert model.asked == 4 - len(before)
        return sorted({1, 2, 3, 4} - before)

    return answers.path, again


@pytest.mark.parametrize(
    ("change", "asked"),
    [
        (lambda line: b"\0" * len(line), [2]),
        (lambda line: line[:30], [2]),
        (lambda line: b"[" * 100000, [2]),
        (lambda line: b"", [2]),
        (lambda line: json.dumps(json.loads(line) | {"text": None}).encode(), [2]),
        (lambda line: json.dumps(json.loads(line) | {"prompt": None}).encode(), [2]),
        (lambda line: json.dumps(json.loads(line) | {"settings": []}).encode(), [2]),
        (lambda line: json.dumps(json.loads(line) | {"line": []}).encode(), [2]),
        (lambda line: json.dumps(json.loads(line) | {"cause": 7}).encode(), [2]),
        (lambda line: line + b"\n" + line, []),
        (lambda line: line + b"\r", None),
    ],
)
def test_a_damaged_line_costs_its_own_answer_alone(answered, change, asked):
    path, again = answered
    lines = path.read_bytes().split(b"\n")
    lines[1] = change(lines[1])
    path.write_bytes(b"\n".join(lines))
    assert again() == (asked or [])


def test_zeros_before_a_whole_line_cost_nothing(answered):
    """A crash of the machine leaves them where a line, with its end, was to be."""
    path, again = answered
    lines = path.read_bytes().split(b"\n")
    lines[1] = b"\0" * len(lines[1])
    path.write_bytes(lines[0] + b"\n" + lines[1] + b"\n".join(lines[2:]))
    assert again() == [2]


def test_a_mark_of_byte_order_is_taken_away(answered):
    path, again = answered
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert again() == []


def test_a_file_of_something_else_is_left_alone(answered):
    path, again = answered
    path.write_bytes(b"hello\nworld\n")
    with pytest.raises(ConfigError, match="was not written by this command"):
        again()
    assert path.read_bytes() == b"hello\nworld\n"


def test_cut_anywhere_only_the_line_at_the_cut_is_asked_again(answered):
    path, again = answered
    whole = path.read_bytes()
    for cut in range(0, len(whole), len(whole) // 13):
        path.write_bytes(whole[:cut])
        assert len(again()) == 4 - whole[:cut].count(b"\n")


def command(folder: Path, out: Path, *more: str) -> list[str]:
    flags = ["evaluate", "--checkpoint", "llm=C", "--suite", "openaudiobench"]
    return [*flags, "--data", str(folder), "--out", str(out), *more]


@pytest.fixture
def scripted(monkeypatch):
    """The command with a model that answers by a script."""
    model = ScriptedModel(lambda *_: "It is Paris.")
    model.processor = object()
    branches = frozenset(("llm", "audio_head", "audio_encoder"))
    monkeypatch.setattr(evaluate_suites, "open_chat", lambda *_, **__: OpenedChat(model, None, "", True, branches))
    return model


def test_folders_that_cannot_be_written(tmp_path, scripted, capsys):
    folder = write_open_audio_bench(tmp_path / "data", 1)
    (tmp_path / "file").write_text("")
    places = [(tmp_path / "file", 2, "cannot be made")]
    for name, code, sentence in (
        ("answers.jsonl", 2, "answers.jsonl"),
        ("lock", 2, "lock cannot be written"),
        ("scores.json", 3, "Is a directory"),
    ):
        (tmp_path / name / "openaudiobench" / name).mkdir(parents=True)
        places.append((tmp_path / name, code, sentence))
    for out, code, sentence in places:
        with unchecked():
            assert main(command(folder, out)) == code
        assert sentence in capsys.readouterr().err.splitlines()[-1]


def test_a_disk_that_is_full_ends_the_run_which_goes_on(tmp_path, scripted, capsys, monkeypatch):
    folder, out = write_open_audio_bench(tmp_path / "data", 1), tmp_path / "out"

    def refuse(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as full, unchecked():
        full.setattr(evaluate_suites, "write_scores", refuse)
        assert main(command(folder, out)) == 3
    sentence = capsys.readouterr().err.splitlines()[-1]
    assert "No space left on device; what is answered is kept, the same command goes on" in sentence
    with unchecked():
        assert main(command(folder, out)) == 0
    assert scripted.asked == 5


@pytest.mark.parametrize(
    "more",
    [
        ("--rubrics", "/none.json", "--judge", "http://127.0.0.1:9/v1", "--judge-model", "x"),
        ("--asr", "no_such_module:hear"),
        ("--mos", "os:no_such_function"),
        ("--judge", "http://127.0.0.1:9/v1", "--judge-timeout", "0"),
        ("--voice-clips", "/none"),
    ],
)
def test_what_scores_is_refused_before_the_first_item(tmp_path, scripted, more):
    folder = write_open_audio_bench(tmp_path / "data", 1)
    with unchecked():
        assert main(command(folder, tmp_path / "out", *more)) == 2
    assert scripted.asked == 0
    assert not (tmp_path / "out").exists()


def test_abilities_of_what_is_no_run_and_into_what_is_no_folder(tmp_path, capsys):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / BRANCHES_FILE).write_text("{}")
    (tmp_path / "run" / "checkpoints" / "3").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "3" / BRANCHES_FILE).write_text("{}")
    write_checksums(tmp_path / "run" / "checkpoints" / "3")
    # Digits that are no number are no step.
    (tmp_path / "run" / "checkpoints" / "²").mkdir()
    (tmp_path / "file").write_text("")
    for run, out, sentence in (
        ("model", "out", "model is a checkpoint: the workdir of the run that made it has its questions"),
        ("run", "file", "file cannot be made: File exists"),
    ):
        assert main(["evaluate", "abilities", "--run", str(tmp_path / run), "--out", str(tmp_path / out)]) == 2
        assert capsys.readouterr().err.splitlines()[-1].endswith(sentence)
    assert not (tmp_path / "out").exists()
