"""Public benchmarks put to the weights in training: what is refused before the run, and a run that answers two."""

import json
from dataclasses import replace

import pytest

from baichuan_omni_jax.config import load_run_config
from baichuan_omni_jax.errors import ConfigError
from baichuan_omni_jax.train.ability_hook import check_answers
from baichuan_omni_jax.train.suite_hook import check_suites, find_judge, read_suites
from tests.helpers.micro import CONFIG, read_metrics
from tests.helpers.suite_files import write_exam, write_omni_bench
from tests.helpers.typecheck import unchecked


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            ["eval.suites=('omnibenh',)"],
            "eval.suites: there is no suite 'omnibenh'; the nearest known one is omnibench",
        ),
        (["eval.suites=('tts-en',)"], "eval.suites tts-en is scored by a recognizer"),
        (["eval.suites=('mmlu',)"], r"eval.suites mmlu: .*MMLU is no folder \(eval.suite_data\)"),
        (["eval.suites=('omnibench',)", "branches=('llm','audio_head')"], "needs the branch vision"),
    ],
)
def test_suites_that_cannot_be_answered_are_refused_before_the_run(changes, message, tmp_path):
    run = load_run_config(CONFIG, [*changes, f"eval.suite_data={tmp_path}"])
    with pytest.raises(ConfigError, match=message):
        check_suites(run)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ("suites='mmlu'", "eval.suites must be a list, not 'mmlu'"),
        ("suites=('mmlu', None)", r"eval.suites\[1\] must be str, not None"),
        ("abilities='held_out'", "eval.abilities must be a list"),
        ("abilities=(('a',),)", r"eval.abilities\[0\] must be str"),
        ("suite_data=None", "eval.suite_data must be str, not None"),
        ("suite_judge=5", "eval.suite_judge must be str, not 5"),
        ("suite_items='3'", "eval.suite_items must be int, not '3'"),
        ("ability_items=2.5", "eval.ability_items must be int, not 2.5"),
        ("mixtures=(5,)", r"eval.mixtures\[0\]. must be a mapping, not int"),
        ("mixtures='x'", "eval.mixtures must be a list"),
        ("steps=-1", "eval.steps must be at least 0, not -1"),
        ("every=-1", "eval.every must be at least 0, not -1"),
    ],
)
def test_values_of_a_file_are_refused_by_their_keys(tmp_path, fields, message):
    """A configuration is Python: nothing else looks at what a field is given."""
    path = tmp_path / "run.py"
    path.write_text(
        "from dataclasses import replace\n"
        "from baichuan_omni_jax.config import load_run_config\n"
        "def get_config():\n"
        "    run = load_run_config('sft_tiny')\n"
        f"    return replace(run, eval=replace(run.eval, {fields}))\n"
    )
    with unchecked(), pytest.raises(ConfigError, match=message):
        check_answers(load_run_config(path))


def test_files_and_judges_that_cannot_be_used_are_told_by_their_keys(tmp_path):
    (tmp_path / "MMLU").mkdir()
    run = load_run_config(CONFIG, ["eval.suites=('mmlu',)", f"eval.suite_data={tmp_path}"])
    with pytest.raises(ConfigError, match=r"^eval.suites mmlu: .*MMLU is empty \(eval.suite_data\)$"):
        read_suites(run)
    for judge, message in (("maybe", "'maybe' is no URL"), ("http://[::1", "is none that can be asked")):
        with pytest.raises(ConfigError, match=f"^eval.suite_judge.*{message}"):
            find_judge(judge)


def test_suites_of_a_run_are_found_by_name(tmp_path):
    write_exam(tmp_path / "MMLU", {"birds": 2})
    run = load_run_config(CONFIG, ["eval.suites=('mmlu',)"])
    run = replace(run, eval=replace(run.eval, suite_data=str(tmp_path)))
    assert [suite.title for suite in check_suites(run).values()] == ["MMLU"]
    assert check_suites(load_run_config(CONFIG)) == {}


@pytest.mark.slow
def test_a_run_answers_suites_and_keeps_what_they_were_answered(pretrain, tmp_path):
    """Letters by likelihood, and a chat with images and recordings; the run ends as one without them."""
    write_exam(tmp_path / "suites" / "MMLU", {"birds": 4, "bees": 3})
    write_omni_bench(tmp_path / "suites" / "OmniBench", count=3)
    changes = ["train.steps=2", "eval.suites=('mmlu','omnibench')", "eval.suite_items=2", "eval.suite_every=1"]
    done = pretrain(tmp_path / "run", *changes, f"eval.suite_data={tmp_path / 'suites'}")
    assert done.returncode == 0, done.stderr
    assert "MMLU" in done.stdout
    assert "suites after step 2" in " ".join(done.stdout.split())
    rows = {row["step"]: row for row in read_metrics(tmp_path / "run")}
    for step in (1, 2):
        assert rows[step]["suite/mmlu/items"] == 4
        # Two of each group: two subjects there, and here two kinds of task, one of which has one item.
        assert rows[step]["suite/omnibench/items"] == 3
        for name, items in (("mmlu", 4), ("omnibench", 3)):
            folder = tmp_path / "run" / "suites" / str(step) / name
            lines = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
            assert [line for line in lines if "cause" in line] == []
            assert len(lines) == items
            assert json.loads((folder / "scores.json").read_text())["groups"][0]["items"] == items
            assert 0 <= rows[step][f"suite/{name}/score"] <= 100
