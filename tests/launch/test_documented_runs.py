"""Every training command in docs and recipes is accepted on devices of its slice: configuration, mesh, shapes."""

import itertools
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from baichuan_omni_jax.config import AUDIO_RUNS, MACHINES, STAGES, load_run_config
from tests.helpers.stand_ins import REPOSITORY
from tests.test_docs import PRESENT, code_blocks, commands

# How many JAX devices a slice of each of Google's names has.
DEVICES = {"v5litepod-8": 8, "v5p-8": 4, "v5p-16": 8, "v5p-128": 64, "v6e-8": 8, "v6e-32": 32, "v6e-256": 256}
NAMED = (*STAGES, *AUDIO_RUNS, *(f"{name}_tiny" for name in (*STAGES, *AUDIO_RUNS)))
# A run's step on devices that are not there: mesh, budgets, groups, and the state by shape.
PROGRAM = """
import json, sys
import jax
from baichuan_omni_jax.config import load_run_config, resolve_model
from baichuan_omni_jax.errors import ConfigError
from baichuan_omni_jax.train.preflight.compile import abstract_step

for line in json.load(sys.stdin):
    run = load_run_config(line["config"], line["settings"])
    devices = jax.devices()[: line["devices"]]
    assert len(devices) == line["devices"]
    try:
        spec, state, batch = abstract_step(run, resolve_model(run.model), devices)
        print(json.dumps({"rows": run.data.rows, "parameters": sum(x.size for x in state.trainable.values())}))
    except ConfigError as error:
        print(json.dumps({"error": str(error)}))
"""


def calls(page: Path) -> Iterator[tuple[dict[str, str], list[str]]]:
    """Yields the recipes that a page or script calls: the variables before them, and their arguments."""
    text = page.read_text(encoding="utf-8")
    if page.suffix != ".md":
        text = "\n".join(line.removeprefix("#") for line in text.splitlines() if line.startswith("#   "))
        blocks = [text]
    else:
        blocks = list(code_blocks(text))
    for block in blocks:
        for line in re.sub(r"\\\n\s*", " ", block).split("\n"):
            if "launch/recipes/" in line and "--config" in line:
                words = shlex.split(line.strip().split(" && ")[-1], comments=True)
                place = next(i for i, word in enumerate(words) if word.startswith("launch/recipes/"))
                variables = dict(word.split("=", 1) for word in words[:place] if re.match(r"[A-Z_0-9]+=", word))
                yield variables, words[place + 1 :]


def accepted(lines: list[dict]) -> list[dict]:
    """What becomes of these runs, each on the first of as many devices as a CPU can have."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=256",
        "PYTHONPATH": str(REPOSITORY),
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        input=json.dumps(lines),
        env=environment,
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def settings_of(arguments: list[str]) -> tuple[str, list[str]]:
    """The configuration of a command, and its overrides without placeholders of the documentation."""
    pairs = list(itertools.pairwise(arguments))
    settings = [
        value for flag, value in pairs if flag == "--set" and not re.match(r"a\.b=|model=weights/|.*=[A-Z_]+$", value)
    ]
    return next(value for flag, value in pairs if flag == "--config"), settings


def recipes() -> Iterator[dict]:
    """Yields every recipe's run: its configuration, its settings, and how many devices it would have."""
    scripts = [path for path in (REPOSITORY / "launch" / "recipes").iterdir() if path.suffix == ".sh"]
    for page in (*PRESENT, *scripts):
        for variables, arguments in calls(page):
            config, settings = settings_of(arguments)
            settings = [setting for setting in settings if not setting.startswith("mesh.slices=")]
            kind, slices = variables.get("TYPE", ""), int(variables.get("SLICES", "1"))
            if not kind:
                # It runs on whatever GPUs there are.
                yield {"config": config, "settings": settings, "devices": mesh_size(config, settings)}
            # With all slices, and with fewer where the run may go on with them. Devices of a CPU form none.
            for count in range(int(variables.get("MIN_SLICES", slices)), slices + 1) if kind else ():
                mesh = [f"mesh.data={count}", *variables.get(f"MESH_{count}", "").split()] if slices > 1 else []
                yield {"config": config, "settings": [*settings, *mesh], "devices": DEVICES[kind] * count}


def trainings() -> Iterator[dict]:
    """Yields the documentation's plain training commands, and every configuration as it is."""
    for page in PRESENT:
        for command in commands(page.read_text(encoding="utf-8")):
            if "--config" in command and ("omni train " in command or "launch/tpu_pretrain.py" in command):
                config, settings = settings_of(shlex.split(command))
                if "/" not in config or (REPOSITORY / config).exists():
                    yield {"config": config, "settings": settings, "devices": mesh_size(config, settings)}
    for file in sorted((REPOSITORY / "configs").rglob("*.py")):
        config = str(file.relative_to(REPOSITORY))
        yield {"config": config, "settings": [], "devices": mesh_size(config, [])}


def located(config: str) -> str | Path:
    return config if config in NAMED else REPOSITORY / config


def mesh_size(config: str, settings: list[str]) -> int:
    mesh = load_run_config(located(config), settings).mesh
    return mesh.data * mesh.fsdp * mesh.context * mesh.tensor


def check(lines: Iterable[dict]) -> None:
    # The same run of several pages once.
    runs = list({json.dumps(line): line for line in lines}.values())
    for run, said in zip(runs, accepted(runs), strict=True):
        assert "error" not in said, (run, said)
        assert said["rows"] == load_run_config(located(run["config"]), run["settings"]).data.rows


def test_every_recipe_in_the_documentation_is_accepted_on_its_slice():
    lines = list(recipes())
    assert {line["devices"] for line in lines} >= {8, 64, 128}
    check(lines)


def test_the_first_command_of_version_0_2_is_still_refused():
    """Four rows are not split over eight devices: the documented command has more rows, the configuration not."""
    line = {"config": "configs/tiny.py", "settings": ["mesh.fsdp=8"], "devices": 8}
    assert "data.rows" in accepted([line])[0]["error"]


@pytest.mark.slow
def test_every_documented_training_and_configuration_is_accepted():
    check(trainings())


@pytest.mark.slow
def test_the_released_size_is_laid_out_on_every_machine():
    """As shapes; the largest slices with all their devices."""
    check(
        {"config": name, "settings": [f"machine={machine}", "home=gs://b/omni"], "devices": chips}
        for name in STAGES
        for machine, chips in MACHINES.items()
    )
