"""A recipe as a chain of processes: passed over, gone on with, ended by any trouble. The runs are pretended."""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import fsspec
import pytest
from etils import epath

from baichuan_omni_jax.cli import recipe as recipe_module
from baichuan_omni_jax.cli import stages as stages_module
from baichuan_omni_jax.cli.main import main
from baichuan_omni_jax.cli.stages import plan_chain
from baichuan_omni_jax.config import load_run_config
from baichuan_omni_jax.config.recipes import RECIPES, SMALL, Recipe, RecipeStage
from baichuan_omni_jax.errors import ConfigError
from baichuan_omni_jax.evaluation.chain_record import read_chain, read_metrics
from baichuan_omni_jax.train.optimizers import schedule
from tests.helpers.bucket import bucket_server, in_this_process

FAKE = Path(__file__).parents[1] / "helpers" / "fake_train.py"
STEPS = 5


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """Runs a recipe of three pretended runs, the last of which has two parents; returns the exit code."""
    rows = (
        RecipeStage(name="image_text_1_tiny"),
        RecipeStage(name="image_text_2_tiny", parents={"checkpoint.init_from": "{image_text_1_tiny}"}),
        RecipeStage(
            name="sft_tiny",
            parents={
                "checkpoint.init_from": "llm={image_text_2_tiny}",
                "data.audio_tokenizer": "{image_text_1_tiny}",
            },
        ),
    )
    monkeypatch.setitem(RECIPES, "small", Recipe(stages=rows, data=str(tmp_path / "data")))
    command = property(
        lambda stage: [
            *(sys.executable, str(FAKE), "--config", stage.config, "--workdir", str(stage.workdir)),
            *(part for change in (f"train.steps={STEPS}", *stage.changes) for part in ("--set", change)),
        ]
    )
    monkeypatch.setattr(stages_module.ChainStage, "command", command)
    monkeypatch.setattr(stages_module, "_TICK", 0.02)

    def run(*arguments: str, workdir: str = str(tmp_path / "run"), **trouble: str) -> int:
        monkeypatch.setenv("FAKE_TRAIN", json.dumps(trouble))
        # Nothing to ask: the runs are pretended, so there are no weights that could answer.
        sets = ("--set", f"train.steps={STEPS}", "--set", "eval.abilities=()")
        return main(["recipe", "small", "--workdir", workdir, *sets, *arguments])

    return run


def whole(folder: Path) -> None:
    """Every stage has each of its steps once."""
    for name in ("image_text_1_tiny", "image_text_2_tiny", "sft_tiny"):
        assert [record["step"] for record in read_metrics(folder / name / "metrics.jsonl")] == [*range(1, STEPS + 1)]


def test_stages_begin_from_their_parents_and_are_passed_over_when_finished(recipe, tmp_path, capsys):
    folder = tmp_path / "run"
    assert recipe() == 0
    whole(folder)
    given = json.loads((folder / "sft_tiny" / "given.json").read_text())
    assert given["checkpoint.init_from"] == f"llm={folder / 'image_text_2_tiny'}"
    assert given["data.audio_tokenizer"] == str(folder / "image_text_1_tiny")
    assert given["data.root"] == str(tmp_path / "data")
    printed = capsys.readouterr().out
    assert "stage 3 of 3: sft_tiny" in printed
    assert f"baichuan-omni serve --checkpoint {folder / 'sft_tiny'}" in printed
    assert (folder / "report.html").is_file()
    # Nothing is started again.
    before = (folder / "sft_tiny" / "log.txt").read_bytes()
    assert recipe() == 0
    assert "stage " not in capsys.readouterr().out
    assert (folder / "sft_tiny" / "log.txt").read_bytes() == before


def test_until_a_stage_and_on(recipe, tmp_path):
    assert recipe("--until", "image_text_2") == 0
    assert not (tmp_path / "run" / "sft_tiny").exists()
    assert recipe() == 0
    whole(tmp_path / "run")


@pytest.mark.parametrize(
    ("how", "code", "sentence"),
    [
        ("killed", 3, "error: image_text_2_tiny was killed by SIGKILL"),
        ("refused", 2, "error: image_text_2_tiny: it was refused ("),
        ("stopped", 3, "error: image_text_2_tiny: it was stopped ("),
        ("broken", 3, "error: image_text_2_tiny: it was broken ("),
    ],
)
def test_a_stage_that_fails_is_told_in_one_sentence_and_gone_on_with(recipe, tmp_path, capsys, how, code, sentence):
    assert recipe(image_text_2_tiny=how) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(sentence)
    assert "the same command goes on" in line
    assert str(tmp_path / "run" / "image_text_2_tiny" / "log.txt") in line
    assert recipe() == 0
    whole(tmp_path / "run")
    times = {stage.name: stage.wall for stage in read_chain(tmp_path / "run").stages}
    assert all(seconds > 0 for seconds in times.values())


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_reaches_the_stage_at_work_which_saves(recipe, tmp_path, capsys, number, code):
    waits = tmp_path / "run" / "image_text_2_tiny" / "trouble"

    def send() -> None:
        while not waits.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=send)
    thread.start()
    assert recipe(image_text_2_tiny="slow") == code
    thread.join()
    printed = capsys.readouterr()
    assert "the same command goes on" in printed.out + printed.err
    # Its third step, which no checkpoint was due at, is not computed again.
    assert (tmp_path / "run" / "image_text_2_tiny" / "checkpoints" / "3").exists()
    assert not (tmp_path / "run" / "sft_tiny").exists()
    assert recipe() == 0
    whole(tmp_path / "run")
    assert "begins at 3" in (tmp_path / "run" / "image_text_2_tiny" / "log.txt").read_text()


def test_a_recipe_in_a_bucket(recipe, tmp_path, monkeypatch, capsys):
    """Broken off and gone on with; numbers, table and page are in the bucket, and nothing is left here."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    url = "gs://bucket/recipe"
    with bucket_server() as server, in_this_process(server):
        assert recipe(workdir=url, image_text_2_tiny="broken") == 3
        assert f"({url}/image_text_2_tiny/log.txt has all of its output" in capsys.readouterr().err
        assert b"it was broken" in server.read("recipe/image_text_2_tiny/log.txt")
        assert recipe(workdir=url) == 0
        printed = capsys.readouterr().out
        assert f"baichuan-omni serve --checkpoint {url}/sft_tiny" in printed
        given = json.loads(server.read("recipe/sft_tiny/given.json"))
        assert given["checkpoint.init_from"] == f"llm={url}/image_text_2_tiny"
        log = server.read("recipe/image_text_2_tiny/log.txt").decode()
        assert log.index("it was broken") < log.index("begins at 2")
        assert b"recipe" in server.read("recipe/report.html")
        whole(server.download("recipe", tmp_path / "copy"))
        assert all(stage.wall > 0 for stage in read_chain(tmp_path / "copy").stages)
        # The page again, by the other command, from what is there.
        fsspec.filesystem("gs").rm("bucket/recipe/report.html")
        assert main(["recipe", "report", "--workdir", url]) == 0
        assert b"sft_tiny" in server.read("recipe/report.html")
        assert main(["recipe", "report", "--workdir", "gs://bucket/none"]) == 2
        assert "gs://bucket/none holds no run, nor a chain of them" in capsys.readouterr().err
    assert list(Path.cwd().iterdir()) == []
    assert not [path for path in (tmp_path / "cache" / "baichuan_omni_jax" / "workdirs").glob("*") if path.is_dir()]


def test_two_recipes_in_one_folder(recipe, tmp_path, capsys):
    from baichuan_omni_jax.storage import take_lock

    (tmp_path / "run").mkdir()
    lock = take_lock(tmp_path / "run" / ".lock", "")
    try:
        assert recipe() == 2
    finally:
        lock.release()
    assert "another recipe is at work in" in capsys.readouterr().err


def test_a_folder_that_cannot_be_made(recipe, tmp_path, capsys):
    (tmp_path / "run").write_text("")
    assert recipe() == 2
    assert f"--workdir {tmp_path / 'run'} cannot be made" in capsys.readouterr().err


def test_stages_in_a_file_and_on_a_full_disk(tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    assert main(["stages", "--tiny", "--workdir", str(tmp_path / "file")]) == 2
    assert f"--workdir {tmp_path / 'file'} cannot be made" in capsys.readouterr().err

    def refuse(path, values):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("baichuan_omni_jax.evaluation.chain_record.write_json", refuse)
    monkeypatch.setattr(stages_module.ChainStage, "command", property(lambda stage: ["true"]))
    assert main(["stages", "--tiny", "--workdir", str(tmp_path / "run")]) == 3
    assert capsys.readouterr().err.splitlines()[-1].endswith("No space left on device; the same command goes on")


def test_workdirs_with_braces_and_with_what_cuts_a_spec(tmp_path):
    rows = [
        RecipeStage(name="image_text_1_tiny"),
        RecipeStage(name="sft_tiny", parents={"x": "llm={image_text_1_tiny}"}),
    ]
    chain = plan_chain(rows, epath.Path(tmp_path / "{a}"), [])
    assert chain[1].changes == (f"x=llm={tmp_path / '{a}' / 'image_text_1_tiny'}",)
    for name in ("a,b", "a=b"):
        with pytest.raises(ConfigError, match=f"{name}.*: a workdir whose stages begin from others has no comma"):
            plan_chain(rows, epath.Path(tmp_path / name), [])


def test_a_run_that_cannot_be_watched_any_more_is_let_save(recipe, tmp_path, capsys, monkeypatch):
    """The disk fills while a stage is at work: it is asked to save and leave, not waited for."""
    waits = tmp_path / "run" / "image_text_2_tiny" / "trouble"

    def refuse(writer):
        if waits.exists():
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("baichuan_omni_jax.evaluation.chain_record.ChainWriter.note", refuse)
    assert recipe(image_text_2_tiny="slow") == 3
    assert "No space left on device" in capsys.readouterr().err
    assert (tmp_path / "run" / "image_text_2_tiny" / "checkpoints" / "3").exists()


def test_stages_without_a_step(tmp_path):
    for steps in (0, -1):
        with pytest.raises(ConfigError, match=f"train.steps of sft_tiny must be at least 1, not {steps}"):
            plan_chain([RecipeStage(name="sft_tiny")], epath.Path(tmp_path), [f"train.steps={steps}"])


def test_a_disk_that_is_full(recipe, tmp_path, capsys, monkeypatch):
    def refuse(path, values):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("baichuan_omni_jax.evaluation.chain_record.write_json", refuse)
    assert recipe() == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert "No space left on device; the same command goes on" in line
    monkeypatch.undo()


def test_unknown_stages_and_shares(recipe, capsys):
    assert recipe("--until", "rlhf") == 2
    assert "--until rlhf: there is no such stage, but image_text_1_tiny, " in capsys.readouterr().err
    assert recipe("--share", "0") == 2
    assert "'0' is no share" in capsys.readouterr().err


def test_a_share_shortens_the_whole_schedule(tmp_path):
    rows = [RecipeStage(name="sft")]
    own = lambda run: recipe_module._own_changes(run, 0.1, [])  # noqa: E731
    (stage,) = plan_chain(rows, epath.Path(tmp_path), [], own)
    whole = plan_chain(rows, epath.Path(tmp_path), [])[0].run
    assert stage.run.train.steps == whole.train.steps // 10
    assert stage.run.optimizer.decay_steps == whole.optimizer.decay_steps // 10
    assert stage.run.checkpoint.every <= stage.run.train.steps / 8 + 1


def test_parents_are_stages_before(tmp_path):
    rows = [RecipeStage(name="sft_tiny", parents={"checkpoint.init_from": "{omni_64k_tiny}"})]
    with pytest.raises(ConfigError, match="there is no such stage before this one"):
        plan_chain(rows, epath.Path(tmp_path), [])
    with pytest.raises(ConfigError, match="two stages of the chain have one name"):
        plan_chain([RecipeStage(name="sft_tiny"), RecipeStage(name="sft_tiny")], epath.Path(tmp_path), [])


def test_parents_of_the_small_recipe_are_stages_before():
    known: list[str] = []
    for stage in SMALL.stages:
        for template in stage.parents.values():
            named = [part.split("}")[0] for part in template.split("{")[1:]]
            assert named
            assert set(named) <= set(known)
        known.append(stage.name)


@pytest.mark.parametrize("share", [0.001, 0.01, 0.1])
def test_a_share_of_every_stage_has_a_schedule_that_training_takes(share):
    for stage in SMALL.stages:
        run = load_run_config(stage.name)
        changed = load_run_config(stage.name, recipe_module._own_changes(run, share, ()))
        assert 1 <= changed.train.steps <= max(1, round(run.train.steps * share))
        # Refused where the warm-up is not shorter than the decay.
        rates = [schedule(changed.optimizer, group) for group in changed.optimizer.groups if group.learning_rate]
        assert all(rate(1) > 0 for rate in rates)


def test_a_report_of_a_folder_without_runs_is_refused(tmp_path, capsys):
    assert main(["recipe", "report", "--workdir", str(tmp_path)]) == 2
    assert "holds no run" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
