"""The report page: of empty, half done and finished folders, with odd lines, escaped, and whole in itself."""

import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from baichuan_omni_jax.cli.main import main
from baichuan_omni_jax.config.recipes import SMALL, Target
from baichuan_omni_jax.evaluation.chain_record import (
    ChainWriter,
    MetricsFile,
    Score,
    ability_scores,
    number,
    read_chain,
    read_metrics,
    read_scores,
)
from baichuan_omni_jax.evaluation.report_figures import COLORS, Axes, line_chart, loss_curves, media_tag, thin
from baichuan_omni_jax.evaluation.report_page import collect, render, target_value, write_report
from baichuan_omni_jax.evaluation.samples import Sample, read_samples, write_samples
from tests.helpers.chain_folder import STEPS, ability, step_record, write_chain, write_lines, write_media, write_stage

NAMES = [stage.name for stage in SMALL.stages]
SEEN = {"digit": ("accuracy", 0.98), "shape": ("accuracy", 0.5)}
VOID = {"meta", "img", "line", "circle", "polyline", "br"}


class Page(HTMLParser):
    """The text of a page, and its tags; fails where they are not closed in order."""

    def __init__(self, html: str):
        super().__init__()
        self.text, self.tags, self.open = "", [], []
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def sources(self) -> list[str]:
        return [value for _, attrs in self.tags for key, value in attrs.items() if key in ("src", "href") and value]


@pytest.fixture
def finished(tmp_path) -> Path:
    """All stages of the small recipe; what was seen and heard is measured from the fifth on."""
    folder = tmp_path / "small"
    write_chain(folder, {"data": 1, **dict.fromkeys(NAMES, STEPS), "evaluation": 1})
    for n, name in enumerate(NAMES):
        write_stage(folder / name, abilities=SEEN | {"sentences": ("cer", 0.1)} if n >= 4 else None)
    return folder


def test_an_empty_folder_has_a_page(tmp_path):
    page = Page(write_report(tmp_path).read_text())
    assert "No run is here yet." in page.text


def test_a_finished_chain(finished):
    page = Page(write_report(finished).read_text())
    assert "10 of 10 training runs finished" in page.text
    for heading in ("What it can do", "How it came", "What stays", "Loss", "Times", "Machine and versions"):
        assert heading in page.text
    assert "accuracy 98.0 %at least 97 % ✓ met" in page.text
    assert "accuracy 50.0 %at least 90 % ✗ missed" in page.text
    assert "a <fast> one" in page.text
    assert "questions, a score above" not in page.text  # as many
    # Of all stages: 9 trained, and the data and the evaluation.
    assert "12.0" in page.text


def test_points_of_fewer_questions_than_the_scores(finished):
    scores = {"color": {"accuracy": 0.9, "chance": 0.1, "items": 200}, "digit": {"accuracy": 0.8, "items": 120}}
    (finished / "evaluation").mkdir(exist_ok=True)
    (finished / "evaluation" / "abilities.json").write_text(json.dumps({"steps": {"100": scores}}))
    page = Page(write_report(finished).read_text())
    assert "A point is of 64 questions, a score above of 120 to 200." in page.text


def test_a_chain_at_work(tmp_path):
    write_chain(tmp_path, dict.fromkeys(NAMES, STEPS))
    write_stage(tmp_path / NAMES[0])
    write_stage(tmp_path / NAMES[1], until=30)
    page = Page(write_report(tmp_path).read_text())
    assert "1 of 10 training runs finished" in page.text
    assert "30/100" in page.text
    assert "not measured" in page.text


def test_folders_that_no_recipe_made(tmp_path):
    """Of `stages` before there was a record, and of one run alone."""
    for name in ("b", "a"):
        write_stage(tmp_path / name)
        (tmp_path / name / "run_config.json").write_text('{"train": {"steps": 100}}')
        (tmp_path / name / "parent.json").write_text("{}")
    assert [stage.title for stage in collect(tmp_path).stages] == ["b", "a"]
    page = Page(render(collect(tmp_path / "a")))
    assert "100/100" in page.text
    assert "1 of 1 training runs finished" in page.text


def test_lines_that_are_none_and_values_that_are_no_numbers(tmp_path):
    write_chain(tmp_path, {"a": STEPS})
    write_lines(tmp_path / "a" / "metrics.jsonl", [step_record(1), step_record(2, **ability("digit", 0.5))])
    odd = (
        b'\xff\xfe\x00\n[]\n"text"\n{"loss": 1.0}\n{"step": "3", "loss": 1}\n{"step": -1}\n{"step": true, "loss": 2}\n'
        b'{"step": 3, "loss": null, "loss_text": "much", "step_time_s": NaN, "ability/digit/accuracy": []}\n'
        b'{"step": 4, "loss": 1e999, "eval/a/loss": {}}\n' + b'{"step": ' + b"[" * 5000 + b"\n" + b'{"step": 5, "lo'
    )
    with open(tmp_path / "a" / "metrics.jsonl", "ab") as file:
        file.write(odd)
        file.write(
            b'ss"}\n{"step": 1'
            + 40 * b"0"
            + b', "loss": 1}\n{"step": 6, "loss": 1e308, "loss_text": 1'
            + 400 * b"0"
            + b"}\n"
        )
    records = read_metrics(tmp_path / "a" / "metrics.jsonl")
    assert [record["step"] for record in records] == [1, 2, 3, 4, 6]
    assert [x for x, _ in loss_curves(records)["loss"]] == [1.0, 2.0]
    assert read_scores(tmp_path / "a", records)["digit"].score == 0.5
    Page(write_report(tmp_path).read_text())


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{",
        '{"stages": 7}',
        '{"stages": [1, {"name": 2}, {"name": "../x"}, {"name": "a", "steps": "b"}]}',
        '{"stages": [{"name": "a"}, {"name": ".."}, {"name": "a\\u0000"}, {"name": "\\ud800"}]}',
    ],
)
def test_records_of_chains_that_are_none(tmp_path, text):
    (tmp_path / "chain.json").write_text(text)
    assert {stage.name for stage in read_chain(tmp_path).stages} <= {"a"}
    Page(write_report(tmp_path).read_text())


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"steps": []}',
        '{"steps": {"x": {}, "9": {"digit": 3, "shape": {}}}}',
        '{"steps": {"²": {"digit": {"cer": 1}}, "1' + 5000 * "0" + '": {}}}',
    ],
)
def test_abilities_that_are_none(tmp_path, text):
    (tmp_path / "abilities.json").write_text(text)
    assert read_scores(tmp_path, []) == {}


def test_abilities_with_what_stands_beside_them(tmp_path):
    entry = {"accuracy": 0.5, "chance": 0.1, "low": 0.4, "high": 0.6, "items": 64, "media_gain": 0.7, "kind": "exact"}
    steps = {"9": {"digit": {"cer": 1.0}}, "10": {"digit": entry}}
    (tmp_path / "abilities.json").write_text(json.dumps({"steps": steps}))
    assert read_scores(tmp_path, []) == {"digit": Score("accuracy", 0.5, 0.1, 64.0, 0.4, 0.6, 0.7)}
    # Metrics alone know less, and of an earlier version nothing of the gain.
    record = {"step": 1, **ability("digit", 0.25), "eval/held_out/digit/media_gain": 0.3}
    assert read_scores(tmp_path / "none", [record]) == {"digit": Score("accuracy", 0.25, 0.25, 64.0, media_gain=0.3)}


def test_targets_are_compared_with_what_was_measured(finished):
    report = collect(finished)
    lost = Target(measure="lost", bound=0.02, since=NAMES[4])
    assert target_value(report, "digit", lost) == pytest.approx(0.0)
    assert target_value(report, "sentences", Target(measure="cer", bound=0.2)) == pytest.approx(0.1)
    assert target_value(report, "sentences", Target(measure="accuracy", bound=0.2)) is None
    assert target_value(report, "nothing", lost) is None
    assert lost.is_met(0.97 - 0.95)
    assert not lost.is_met(0.03)
    assert Target(measure="media_gain", bound=0.5).is_met(0.5)


def test_everything_from_files_is_escaped(tmp_path):
    evil = '<script>alert("x")</script>\'"&'
    picture, sound = write_media(tmp_path / "media")
    write_chain(tmp_path, {"a": STEPS})
    records = [step_record(1, **{f"loss_{evil}": 1.0}), {"step": 2, **ability(evil.replace("/", ""), 0.5)}]
    write_lines(tmp_path / "a" / "metrics.jsonl", records)
    media = (("image", str(picture)), ("audio", str(sound)), ("image", f"{tmp_path}/{evil}.png"))
    (tmp_path / "evaluation").mkdir()
    write_samples(
        tmp_path / "evaluation" / "samples.jsonl",
        [Sample(ability=evil, prompt=evil, reference=evil, answer=evil, media=media, right=False, speech=str(sound))],
    )
    page = Page(write_report(tmp_path).read_text())
    assert not [tag for tag, _ in page.tags if tag == "script"]
    assert page.text.count('alert("x")') >= 5
    assert "cannot be shown" in page.text


def test_nothing_is_fetched(finished):
    picture, sound = write_media(finished / "media")
    sample = Sample(ability="color", prompt="?", reference="red", answer="red", media=(("image", str(picture)),))
    spoken = Sample(ability="tts", prompt="one", reference="one", answer="one", speech=str(sound))
    (finished / "evaluation").mkdir()
    write_samples(finished / "evaluation" / "samples.jsonl", [sample, spoken])
    html = write_report(finished).read_text()
    sources = Page(html).sources()
    assert [source.split(";")[0] for source in sources] == ["data:image/png", "data:audio/mpeg"]
    assert not re.search(r"https?://|@import|url\(", html)


def test_a_few_of_each_kind_of_answer_are_shown(tmp_path):
    (tmp_path / "evaluation").mkdir()
    samples = [
        Sample(ability="color", prompt=f"question {n}", reference="red", answer="red" if n < 8 else "blue", right=n < 8)
        for n in range(10)
    ]
    write_samples(tmp_path / "evaluation" / "samples.jsonl", samples)
    text = Page(render(collect(tmp_path))).text
    assert (text.count("✓ right"), text.count("✗ wrong")) == (2, 2)
    assert render(collect(tmp_path)).count("question 3") == render(collect(tmp_path)).count("question 3")


def test_samples_are_read_as_they_were_written(tmp_path):
    sample = Sample(
        ability="tts", prompt="one", reference="one", answer="won", media=(("audio", "a.wav"),), speech="b.wav"
    )
    write_samples(tmp_path / "samples.jsonl", [sample])
    with open(tmp_path / "samples.jsonl", "a") as file:
        file.write('[]\n{"ability": "tts"}\n{"media": [{}]}\ncut')
    (found,) = read_samples(tmp_path / "samples.jsonl")
    # Paths are relative to the file's folder.
    assert found.media == (("audio", str(tmp_path / "a.wav")),)
    assert found.speech == str(tmp_path / "b.wav")
    assert read_samples(tmp_path / "none.jsonl") == []


def test_videos_are_moving_pictures(sample_dir):
    tag = media_tag("video", next((sample_dir / "video").glob("*.mp4")))
    assert tag.startswith('<img src="data:image/gif;base64,')


def test_a_chart_leaves_out_what_it_has_no_color_for_and_stays_inside():
    curves = {f"curve {n}": [(0.0, float(n)), (10.0, 1e9)] for n in range(COLORS + 2)}
    html = line_chart("losses", curves, Axes((0.0, 10.0), (0.0, 5.0)), {"chance": 2.5})
    assert html.count("<polyline") == COLORS
    heights = [float(y) for points in re.findall(r'points="([^"]*)"', html) for y in re.findall(r",([\d.]+)", points)]
    assert min(heights) >= 0
    assert max(heights) <= 170
    assert "chance" in html


def test_long_curves_are_averaged():
    points = thin([(float(n), float(n % 2)) for n in range(1000)], 10)
    assert len(points) == 10
    assert all(value == pytest.approx(0.5) for _, value in points)


def test_numbers():
    assert number(3) == 3.0
    assert [number(value) for value in (True, None, "1", float("nan"), float("inf"), 10**400, [])] == [None] * 7
    assert ability_scores({"ability/a/b/cer": 1, "ability/c/chance": 1, "ability/accuracy": 1}) == {"a/b": ("cer", 1.0)}


def test_metrics_are_followed_as_they_grow(tmp_path):
    path = tmp_path / "metrics.jsonl"
    follow = MetricsFile(path)
    assert follow.read() == ([], False)
    path.write_text('{"step": 1}\n{"ste')
    assert follow.read() == ([{"step": 1}], True)
    with open(path, "a") as file:
        file.write('p": 2}\n')
    assert follow.read() == ([{"step": 2}], False)
    # A run that goes on replaces the file.
    (tmp_path / "other").write_text('{"step": 1}\n')
    (tmp_path / "other").replace(path)
    assert follow.read() == ([{"step": 1}], True)


def test_times_add_up_over_starts(tmp_path):
    seconds = []
    for _ in range(2):
        record = ChainWriter(tmp_path, {"a": 5, "b": 5}, "small")
        with record.timed("a"):
            subprocess.run([sys.executable, "-c", "import time; sum(range(10**7)); time.sleep(0.1)"], check=True)
            record.note(every=0.0)
        seconds.append(read_chain(tmp_path).stages[0])
    (first, second) = read_chain(tmp_path).stages
    assert 0.2 <= seconds[0].wall < seconds[1].wall == first.wall
    assert 0.1 <= seconds[0].cpu < first.cpu
    assert (second.name, second.wall) == ("b", 0.0)
    assert read_chain(tmp_path).recipe == "small"
    assert read_chain(tmp_path).versions["jax"]


def test_names_of_half_characters_are_drawn(tmp_path):
    line = (
        '{"ability": "\\ud800", "prompt": "\\udfff", "reference": "", "answer": "<b>", "media": null, "right": true}\n'
    )
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "samples.jsonl").write_text(line)
    write_chain(tmp_path, {"a": STEPS})
    write_lines(tmp_path / "a" / "metrics.jsonl", [step_record(1, **ability("\ud800", 0.5))])
    page = Page(write_report(tmp_path).read_text("utf-8"))
    assert "<b> ✓ right" in page.text
    assert "?, accuracy" in page.text


def test_media_that_are_no_files_or_too_large_are_told(tmp_path):
    picture, _ = write_media(tmp_path)
    os.truncate(picture, 2**31)
    os.mkfifo(tmp_path / "pipe.wav")
    for kind, path, sentence in (
        ("image", picture, "it has more than 64 MiB"),
        ("audio", tmp_path / "pipe.wav", "there is no such file"),
        ("video", Path("/dev/zero"), "there is no such file"),
        ("image", tmp_path, "it is a folder"),
        ("image", tmp_path / "\ud800.png", "cannot be shown"),
        ("image", tmp_path / ("n" * 5000), "cannot be shown"),
    ):
        assert sentence in media_tag(kind, path)


def test_the_command_draws_it(finished, capsys):
    assert main(["recipe", "report", "--workdir", str(finished)]) == 0
    assert capsys.readouterr().out.strip() == str(finished / "report.html")
    for none in (finished / "none", finished / ("n" * 5000)):
        assert main(["recipe", "report", "--workdir", str(none)]) == 2
        assert "is no folder" in capsys.readouterr().err
