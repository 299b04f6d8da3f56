"""A recipe of two real runs, by the command: killed on the way, gone on with, evaluated with speech, reported."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from baichuan_omni_jax.checkpoint import save_branches
from baichuan_omni_jax.config import tiny
from baichuan_omni_jax.evaluation.samples import read_samples
from baichuan_omni_jax.nn.param import ComputePolicy
from baichuan_omni_jax.omni.flow_matching_model import FlowMatchingModel
from tests.helpers.micro import CONFIG, REPOSITORY, environment, one_device, read_metrics
from tests.helpers.proofs import HANG, wait_for

pytestmark = pytest.mark.slow

STEPS = 6
ABILITIES = ("image_qa", "tts")
RUN = """
import runpy
from dataclasses import replace
from baichuan_omni_jax.config import sample_eval

def get_config():
    run = runpy.run_path({config!r})["get_config"]()
    asked = replace(sample_eval(every=0, items=2, abilities={abilities}), sample=False)
    return replace(run, name={name!r}, eval=asked)
"""
START = """
import sys
from baichuan_omni_jax.cli.main import main
from baichuan_omni_jax.config.recipes import RECIPES, Recipe, RecipeStage

RECIPES["small"] = Recipe(
    data={root!r},
    stages=(
        RecipeStage(name="one", config={one!r}),
        RecipeStage(name="two", config={two!r}, parents={{"checkpoint.init_from": "{{one}}"}}),
    ),
    chat="llm={{two}},vision={{two}},audio_head={{two}},audio_encoder={{two}},audio_decoder={voice},flow={voice}",
)
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def start(micro_root, compiled, tmp_path):
    """Starts the recipe in a process of its own."""
    voice, files = tmp_path / "voice", {}
    with jax.set_mesh(one_device()):
        model = FlowMatchingModel(jax.random.key(0), tiny(), ComputePolicy())
        save_branches(voice, {"audio_decoder": model.audio_decoder, "flow": model.flow}, tiny())
    for name in ("one", "two"):
        files[name] = tmp_path / f"{name}.py"
        files[name].write_text(RUN.format(config=str(CONFIG), name=name, abilities=ABILITIES))
    script = tmp_path / "start.py"
    script.write_text(START.format(root=str(micro_root), voice=voice, **{k: str(v) for k, v in files.items()}))
    sets = [part for change in ("data.sample=false", f"train.steps={STEPS}") for part in ("--set", change)]
    command = [sys.executable, str(script), "recipe", "small", "--workdir", str(tmp_path / "run"), *sets]
    pipe = subprocess.PIPE
    return lambda: subprocess.Popen(
        command, stdout=pipe, stderr=pipe, text=True, env=environment(compiled, quick=True), cwd=REPOSITORY
    )


def test_killed_on_the_way_the_same_command_goes_on(start, tmp_path):
    folder = tmp_path / "run"
    with start() as process:
        wait_for(lambda: list(folder.glob("one/checkpoints/*/checksums.json")), "a checkpoint", process)
        process.send_signal(signal.SIGKILL)
    with start() as process:
        out, err = process.communicate(timeout=HANG)
    assert process.returncode == 0, out + err
    assert "talk to it:" in out, out + err
    for name in ("one", "two"):
        assert [row["step"] for row in read_metrics(folder / name) if "loss" in row] == [*range(1, STEPS + 1)]
    assert json.loads((folder / "two" / "parent.json").read_text())["runs"].popitem()[1] == "one"
    # Its own weights answer, in the other checkpoint's voice.
    (scores,) = json.loads((folder / "evaluation" / "abilities.json").read_text())["steps"].values()
    assert set(scores) == set(ABILITIES)
    samples = read_samples(folder / "evaluation" / "samples.jsonl")
    assert {sample.ability for sample in samples} == set(ABILITIES)
    for sample in samples:
        assert all(Path(path).is_file() for _, path in sample.media)
        assert bool(sample.media) == (sample.ability == "image_qa")
        assert Path(sample.recording).is_file() == (sample.ability == "tts")
        assert not sample.speech or Path(sample.speech).is_file()
    page = (folder / "report.html").read_text()
    assert "data:image/png" in page
    assert "data:audio/mpeg" in page
    assert (folder / "retention.md").is_file()
