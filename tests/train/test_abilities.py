"""Abilities in a run, by the command: what is written, that training stays as it is, and that answers are the weights'.

The answers are those that the saved step gives, by the engine, on other devices too.
"""

import json
from pathlib import Path

import pytest

from baichuan_omni_jax.config import load_run_config
from baichuan_omni_jax.errors import ConfigError
from baichuan_omni_jax.train.ability_hook import check_answers, is_answer_step
from tests.helpers.micro import CONFIG, TIMES, read_metrics

ABILITIES = ("image_qa", "asr", "tts")
# Of every evaluation: its scores stand in the row of the step, and only there.
MEASURED = ("eval/", "ability/", "suite/")


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    """The micro configuration with held-out documents that are asked."""
    path = tmp_path_factory.mktemp("config") / "asked.py"
    path.write_text(
        "import runpy\n"
        "from dataclasses import replace\n"
        "from baichuan_omni_jax.config import sample_eval\n"
        "def get_config():\n"
        f"    run = runpy.run_path({str(CONFIG)!r})['get_config']()\n"
        f"    return replace(run, eval=replace(sample_eval(every=2, items=6, abilities={ABILITIES}), sample=False))\n"
    )
    return path


def trained(workdir: Path) -> list[dict]:
    """Rows of metrics.jsonl without what was measured beside the steps."""
    rows = [row for row in read_metrics(workdir) if "loss" in row]
    return [
        {key: value for key, value in row.items() if key not in TIMES and not key.startswith(MEASURED)} for row in rows
    ]


def answers(workdir: Path, step: int) -> list[dict]:
    return [json.loads(line) for line in (workdir / "abilities" / f"{step}.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("step", "every", "due"), [(0, 2, False), (2, 2, True), (3, 2, False), (5, 0, True), (5, 2, True), (4, 0, False)]
)
def test_weights_answer_after_so_many_steps_and_the_last(step, every, due):
    assert is_answer_step(step, every, steps=5) == due


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("eval.abilities=('other',)", "eval.abilities 'other' is not one of eval.mixtures"),
        ("mesh.context=2", "eval.abilities needs mesh.context 1, not 2"),
        ("eval.ability_items=0", "eval.ability_items must be at least 1, not 0"),
        ("task=audio_tokenizer", "swapped is of task omni"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_the_run(config, change, message):
    with pytest.raises(ConfigError, match=message):
        check_answers(load_run_config(config, [change]))


def test_a_run_on_own_data_is_not_asked_of_the_sample_data():
    """`configs/tiny.py` with another root; held-out documents of one's own are named by their folder."""
    own = ["data.sample=false", "data.mixture=[{'name': 'photos', 'manifest': 'shown/photos.jsonl'}]"]
    tiny_config = CONFIG.with_name("tiny.py")
    assert load_run_config(tiny_config).eval.abilities == ("held_out",)
    assert load_run_config(tiny_config, own).eval.mixtures == ()
    assert load_run_config(tiny_config, own).eval.abilities == ()
    (mixture,) = load_run_config(tiny_config, [*own, "eval.held_out=new"]).eval.mixtures
    assert (mixture.name, mixture.swapped) == ("held_out", True)
    (source,) = mixture.sources
    assert (source.name, source.manifest, source.root) == ("photos", "new/photos.jsonl", "shown")
    with pytest.raises(ConfigError, match="has a mixture 'held_out' already"):
        load_run_config(tiny_config, ["eval.held_out=new"])


@pytest.fixture(scope="module")
def measured(pretrain, config, tmp_path_factory) -> Path:
    """Two steps and their abilities, then two more: a run that was stopped between."""
    workdir = tmp_path_factory.mktemp("measured") / "run"
    for steps in (2, 4):
        done = pretrain(workdir, f"train.steps={steps}", "eval.ability_every=2", config=config)
        assert done.returncode == 0, done.stderr
    return workdir


@pytest.mark.slow
def test_training_with_abilities_is_training_without_bit_for_bit(measured, finished):
    assert trained(measured) == trained(finished)[:4]


@pytest.mark.slow
def test_scores_are_in_metrics_and_by_step_in_a_file(measured):
    by_step = json.loads((measured / "abilities.json").read_text())["steps"]
    assert list(by_step) == ["2", "4"]
    rows = {row["step"]: row for row in read_metrics(measured)}
    for step, scores in by_step.items():
        assert set(scores) == set(ABILITIES)
        for name, score in scores.items():
            measure = "accuracy" if name == "image_qa" else "cer"
            assert rows[int(step)][f"ability/{name}/{measure}"] == score[measure]
            assert rows[int(step)][f"ability/{name}/chance"] == score["chance"] > 0
            assert score["items"] + sum(score["left_out"].values()) == 6
            assert score["low"] <= score[measure] <= score["high"]
        assert scores["image_qa"]["media_gain"] == rows[int(step)]["eval/held_out/image_qa/media_gain"]


@pytest.mark.slow
def test_answers_are_those_of_the_saved_step(measured):
    """The engine over the checkpoint's branches, asked the same recordings, writes the same transcripts."""
    from baichuan_omni_jax.config import GenerationConfig
    from baichuan_omni_jax.generation.chat import OmniChat
    from baichuan_omni_jax.generation.loading import load_for_generation, make_chat_model
    from data_pipelines.documents.chat_prompt import ChatPrompts
    from data_pipelines.documents.processor import Processor
    from data_pipelines.documents.prompt_writing import ASR_PROMPT
    from data_pipelines.tokenizers.tokenizer import load_tokenizer

    loaded = load_for_generation(str(measured / "checkpoints" / "2"))
    tokenizer = load_tokenizer(loaded.tokenizer)
    chat = OmniChat(
        make_chat_model(loaded, tokenizer, slots=2, length=512), ChatPrompts(Processor(loaded.config, tokenizer))
    )
    root = Path(json.loads((measured / "run_config.json").read_text())["data"]["root"])
    manifest = [json.loads(line) for line in (root / "held_out" / "asr.jsonl").read_text().splitlines()]
    lines = [line for line in answers(measured, 2) if line["ability"] == "asr"]
    assert len(lines) == 6
    assert any(line["answer"] for line in lines[:3])
    for line in lines[:3]:
        text = manifest[int(line["document"].rpartition(":")[2]) - 1]["text"]
        path = json.loads(text.split("<audio_start_baichuan>")[1].split("<audio_end_baichuan>")[0])["path"]
        content = [{"type": "text", "text": ASR_PROMPT}, {"type": "audio", "path": str(root / path)}]
        settings = GenerationConfig(max_tokens=200).greedy()
        answer = chat.complete(content, stream=False, settings=settings)
        # Written as far as the limit of the ability goes, or the model's end.
        assert answer.text.startswith(line["answer"].rstrip("\ufffd"))


@pytest.mark.slow
def test_weights_that_are_split_over_four_devices_answer_alike(measured, pretrain, config, tmp_path):
    workdir = tmp_path / "run"
    done = pretrain(
        workdir, "train.steps=2", "mesh.fsdp=2", "mesh.tensor=2", "data.media_shards=2", devices=4, config=config
    )
    assert done.returncode == 0, done.stderr
    split, whole = answers(workdir, 2), answers(measured, 2)
    assert [line["document"] for line in split] == [line["document"] for line in whole]
    same = sum(a["answer"] == b["answer"] for a, b in zip(split, whole, strict=True))
    assert same >= len(whole) - 2, "all but for ties that another order of sums breaks"
    assert "18 questions in" in " ".join(done.stdout.split())
