"""`launch/recipes/tpu.sh` against stand-ins of gcloud: from the request to the last step, preempted and refused."""

import shlex
import subprocess

import pytest

from tests.helpers.stand_ins import REPOSITORY, Cloud, ended, wait_for

WHERE = {"NAME": "omni", "ZONE": "us-east5-a", "TYPE": "v5p-16"}
# A value that two shells would take apart, did nobody quote it.
RUN = ("run", "--config", "tiny", "--workdir", "gs://b/runs/x", "--set", "eval.abilities=('held out',)")


@pytest.fixture
def cloud(tmp_path):
    cloud = Cloud(tmp_path, hosts=2)
    yield cloud
    cloud.close()


def created(cloud: Cloud) -> list[str]:
    return [call[4] for call in cloud.calls("gcloud") if call[:4] == ["compute", "tpus", "queued-resources", "create"]]


def test_a_run_is_requested_installed_trained_and_deleted(cloud):
    code, said = cloud.run("tpu.sh", *RUN, SPOT="1", **WHERE)
    assert code == 0, said
    request = next(call for call in cloud.calls("gcloud") if "create" in call)
    assert shlex.join(request[3:]) == (
        "create omni --node-id omni --zone us-east5-a --accelerator-type v5p-16 --runtime-version v2-alpha-tpuv5 --spot"
    )
    for host in ("omni-0", "omni-1"):
        # The machine's own Python has no say; versions are those of the constraints.
        venv, install = (cloud.path / "uv" / host).read_text().splitlines()
        assert venv.endswith("--python 3.12 .venv")
        assert install.endswith("--constraint launch/recipes/constraints-tpu.txt .[tpu,gcs]")
        assert cloud.starts(host) == [["train", *RUN[1:], "--stopped-code", "75", "--multihost"]]
    assert cloud.slices() == []
    assert (cloud.path / "omni.log").exists()


def test_hosts_are_looked_over_before_a_run(cloud):
    """By default in seconds, together; a host that is not fit ends the recipe, unless nobody asks."""
    assert cloud.run("tpu.sh", *RUN, **WHERE)[0] == 0
    for host in ("omni-0", "omni-1"):
        assert cloud.doctors(host) == ["doctor --short --workdir gs://b/runs/x --multihost"]
    (cloud.path / "ill").write_text("2")
    code, said = cloud.run("tpu.sh", *RUN, DOCTOR="full", **WHERE)
    assert code == 2, said
    assert cloud.doctors("omni-1")[1:] == ["doctor --workdir gs://b/runs/x --multihost"]
    assert len(cloud.starts("omni-1")) == 1
    assert cloud.run("tpu.sh", *RUN, DOCTOR="no", **WHERE)[0] == 0
    assert len(cloud.doctors("omni-1")) == 2
    code, said = cloud.run("tpu.sh", *RUN, DOCTOR="maybe", **WHERE)
    assert code == 2
    assert "DOCTOR=maybe is none of short, full and no" in said


def test_one_host_joins_nobody(tmp_path):
    cloud = Cloud(tmp_path)
    code, said = cloud.run("tpu.sh", *RUN, **WHERE | {"TYPE": "v5litepod-8"})
    assert code == 0, said
    assert "--multihost" not in cloud.starts("omni-0")[0]


@pytest.mark.parametrize("grace", [0.0, 5.0], ids=["killed", "told"])
def test_a_preempted_slice_is_requested_anew_and_the_run_goes_on(grace, cloud):
    cloud.outcomes(*["train"] * 5)
    process = cloud.start("tpu.sh", *RUN, SPOT="1", **WHERE)
    wait_for(lambda: cloud.starts("omni-0") and cloud.starts("omni-1"))
    cloud.preempt("omni", grace=grace)
    wait_for(lambda: len(created(cloud)) >= 2)
    cloud.finish()
    code, said = ended(process)
    assert code == 0, said
    assert created(cloud) == ["omni", "omni"]
    first, *others = cloud.starts("omni-1")
    assert others
    assert all(other == first for other in others)
    assert cloud.slices() == []


def test_a_crash_is_mended_on_the_host_that_has_it(cloud):
    cloud.outcomes("crash", "finish")
    code, said = cloud.run("tpu.sh", *RUN, **WHERE)
    assert code == 0, said
    assert created(cloud) == ["omni"]
    assert len(cloud.starts("omni-0")) == 2


@pytest.mark.parametrize(("outcome", "left", "delete"), [("refuse", 2, "finished"), ("nonfinite", 3, "always")])
def test_a_run_that_cannot_go_on_ends_the_recipe(outcome, left, delete, cloud):
    cloud.outcomes(outcome)
    code, said = cloud.run("tpu.sh", *RUN, DELETE=delete, **WHERE)
    assert code == left
    assert len(cloud.starts("omni-0")) == 1
    assert cloud.slices() == ([] if delete == "always" else ["omni"]), said
    if delete == "finished":
        assert "cost money" in said
        assert cloud.run("tpu.sh", "down", **WHERE)[0] == 0
        assert cloud.slices() == []


def test_a_stop_saves_and_ends_the_recipe(cloud):
    cloud.outcomes("train", "train")
    process = cloud.start("tpu.sh", *RUN, **WHERE)
    wait_for(lambda: cloud.starts("omni-0") and cloud.starts("omni-1"))
    assert cloud.run("tpu.sh", "start", *RUN[1:], **WHERE)[0] == 2  # one run at a time
    assert cloud.run("tpu.sh", "status", **WHERE)[1].split() == ["running", "running"]
    assert cloud.run("tpu.sh", "stop", **WHERE)[0] == 0
    code, said = ended(process)
    assert code == 143, said
    assert len(cloud.starts("omni-0")) == len(cloud.starts("omni-1")) == 1
    assert "saved" in (cloud.path / "omni.log").read_text()


def test_the_same_command_again_waits_for_the_run_that_is_at_work(cloud):
    cloud.outcomes("train")
    process = cloud.start("tpu.sh", *RUN, **WHERE)
    wait_for(lambda: cloud.starts("omni-0") and cloud.starts("omni-1"))
    process.kill()
    process.communicate()
    before = len(cloud.calls("gcloud"))
    again = cloud.start("tpu.sh", *RUN, **WHERE)
    # It has looked at the host, and watches.
    wait_for(lambda: len(cloud.calls("gcloud")) > before + 10)
    cloud.finish()
    code, said = ended(again)
    assert code == 0, said
    assert created(cloud) == ["omni"]
    assert len(cloud.starts("omni-0")) == 1


def test_what_cannot_be_had_is_not_left_behind(cloud):
    cloud.set(create_state="FAILED")
    code, said = cloud.run("tpu.sh", *RUN, **WHERE)
    assert code == 1, said
    assert "the request for omni failed" in said
    assert cloud.slices() == []
    cloud.set(create_state="PROVISIONING")
    code, said = cloud.run("tpu.sh", *RUN, WAIT_FOR="1", **WHERE)
    assert code == 1
    assert "0 of 1 slices after 1 s" in said
    assert cloud.slices() == []


def test_an_installation_that_fails_is_said_and_nothing_starts(cloud):
    (cloud.path / "no_uv").touch()
    code, said = cloud.run("tpu.sh", *RUN, **WHERE)
    assert code == 1
    assert "no matching version" in said
    assert "the installation failed" in said
    assert not cloud.starts("omni-0")


def test_slices_that_are_left_go_on_and_a_new_one_joins(cloud):
    """Two slices, of which one is lost, and comes back."""
    cloud.outcomes("train", "train", "train")
    sizes = {"SLICES": "2", "MIN_SLICES": "1", "MESH_1": "mesh.fsdp=8", "MESH_2": "mesh.fsdp=4 mesh.context=2"}
    process = cloud.start("tpu.sh", *RUN, **WHERE | sizes)
    hosts = ["omni-0-0", "omni-0-1", "omni-1-0", "omni-1-1"]
    wait_for(lambda: all(cloud.starts(host) for host in hosts))
    two = cloud.starts("omni-1-1")[0]
    assert set(two[-4:]) == {
        "MEGASCALE_COORDINATOR_ADDRESS=10.0.0.2",
        "MEGASCALE_PORT=8080",
        "MEGASCALE_NUM_SLICES=2",
        "MEGASCALE_SLICE_ID=1",
    }
    settings = [two[place + 1] for place, word in enumerate(two) if word == "--set"]
    assert settings[1:] == ["mesh.slices=2", "mesh.data=2", "mesh.fsdp=4", "mesh.context=2"]

    # The request for a new one is not met at once: the other slice goes on alone meanwhile.
    cloud.set(create_state="PROVISIONING")
    cloud.preempt("omni-0")
    wait_for(lambda: len(cloud.starts("omni-1-0")) == 2 and len(cloud.starts("omni-1-1")) == 2)
    alone = cloud.starts("omni-1-1")[1]
    settings = [alone[place + 1] for place, word in enumerate(alone) if word == "--set"]
    assert settings[1:] == ["mesh.slices=1", "mesh.data=1", "mesh.fsdp=8"]
    assert {"MEGASCALE_NUM_SLICES=1", "MEGASCALE_SLICE_ID=0"} <= set(alone)

    (cloud.path / "slices" / "omni-0" / "state").write_text("ACTIVE")
    wait_for(lambda: [len(cloud.starts(host)) for host in hosts] == [2, 2, 3, 3])
    assert "MEGASCALE_NUM_SLICES=2" in cloud.starts("omni-0-1")[1]
    cloud.finish()
    code, said = ended(process)
    assert code == 0, said
    assert cloud.slices() == []


def test_a_slice_that_gcloud_cannot_look_at_for_a_while_is_not_requested_anew(cloud):
    """As without a network, or with a login that has run out: first told, later waited for."""
    cloud.set(login="has run out")
    code, said = cloud.run("tpu.sh", *RUN, **WHERE)
    assert code == 2
    assert "gcloud does not tell the state of omni: the login has run out" in said
    assert created(cloud) == []
    cloud.set(login="")
    cloud.outcomes("train")
    process = cloud.start("tpu.sh", *RUN, **WHERE)
    wait_for(lambda: cloud.starts("omni-0") and cloud.starts("omni-1"))
    cloud.set(login="has run out")
    before = len(cloud.calls("gcloud"))
    wait_for(lambda: len(cloud.calls("gcloud")) > before + 12)
    cloud.set(login="")
    cloud.finish()
    code, said = ended(process)
    assert code == 0, said
    assert created(cloud) == ["omni"]


def test_a_bucket_is_mounted_only_if_it_can_rename_folders(cloud):
    run = ("run", "--config", "tiny", "--workdir", "/mnt/omni/runs/x")
    code, said = cloud.run("tpu.sh", *run, **WHERE)
    assert (code, "FUSE=BUCKET" in said) == (2, True)
    code, said = cloud.run("tpu.sh", *run, FUSE="flat", **WHERE)
    assert code == 2
    assert "bucket gs://flat has no hierarchical namespace" in said
    assert created(cloud) == []
    cloud.set(namespace="True")
    code, said = cloud.run("tpu.sh", *run, FUSE="deep", DELETE="never", **WHERE)
    assert code == 0, said
    for host in ("0", "1"):
        assert (cloud.path / "slices" / "omni" / host / "mounted").read_text() == "deep /mnt/omni"


def test_a_number_that_a_run_has_left_behind_is_no_run(cloud):
    """The process of that number may be anybody's: it is neither waited for nor signaled."""
    assert cloud.run("tpu.sh", "up", **WHERE)[0] == 0
    folder = cloud.path / "slices" / "omni" / "0" / "omni"
    with subprocess.Popen(["sleep", "600"]) as other:
        (folder / "train.pid").write_text(str(other.pid))
        code, said = cloud.run("tpu.sh", "start", *RUN[1:], **WHERE)
        assert code == 2
        assert "a run is at work here" in said
        (folder / "train.code").write_text("143")
        assert cloud.run("tpu.sh", "stop", **WHERE)[0] == 0
        assert other.poll() is None
        assert cloud.run("tpu.sh", "start", *RUN[1:], **WHERE)[0] == 0
        wait_for(lambda: cloud.starts("omni-0"))
        other.kill()


def test_data_are_copied_to_every_host(cloud):
    (cloud.path / "buckets" / "b" / "data").mkdir(parents=True)
    (cloud.path / "buckets" / "b" / "data" / "text.jsonl").write_text("{}\n")
    code, said = cloud.run("tpu.sh", *RUN, DATA="gs://b/data", DELETE="never", **WHERE)
    assert code == 0, said
    for host in ("0", "1"):
        assert (cloud.path / "slices" / "omni" / host / "omni" / "data" / "omni" / "text.jsonl").exists()
        assert cloud.starts(f"omni-{host}")[0][-2:] == ["--set", "data.root=data/omni"]


@pytest.mark.parametrize(
    ("arguments", "variables", "sentence"),
    [
        ((), {}, "--workdir must be given"),
        (("--workdir", "runs/x"), {}, "the hosts of v5p-16 share no disk"),
        (("--workdir=runs/x",), {"TYPE": "v6e-8"}, "goes with it"),
        (("--workdir", "runs/x"), {"TYPE": "v6e-8", "DELETE": "never", "SPOT": "1"}, "goes with it"),
        (("--workdir", "gs://b/x"), {"EXTRAS": ""}, "needs EXTRAS=gcs"),
        (("--workdir", "gs://b/x"), {"TYPE": "v5e-8"}, "v5e-8 is no accelerator type"),
        (("--workdir", "gs://b/x"), {"TYPE": ""}, "TYPE must be given"),
        (("--workdir", "gs://b/x"), {"NAME": "my run"}, "NAME 'my run' cannot be used"),
        (("--workdir", "gs://b/x"), {"SLICES": "two"}, "SLICES must be a whole number of at least 1, not 'two'"),
        (("--workdir", "gs://b/x"), {"WAIT_FOR": "5m"}, "WAIT_FOR must be a whole number of at least 0, not '5m'"),
        (("--workdir", "gs://b/x"), {"SLICES": "2", "MIN_SLICES": "3"}, "MIN_SLICES 3 is more than SLICES 2"),
        (("--workdir", "gs://b/x"), {"FUSE": "gs://b"}, "FUSE 'gs://b' cannot be used"),
        (("--workdir", "gs://b/x"), {"DELETE": "no"}, "DELETE 'no' cannot be used: finished, always or never"),
    ],
)
def test_what_would_be_lost_is_refused_before_anything_is_requested(arguments, variables, sentence, cloud):
    code, said = cloud.run("tpu.sh", "run", "--config", "tiny", *arguments, **WHERE | variables)
    assert code == 2, said
    assert sentence in said
    assert created(cloud) == []


def test_a_program_that_is_missing_is_named():
    script = ". launch/recipes/lib.sh; has_program no-such-program; echo later"
    done = subprocess.run(["bash", "-c", script], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: no-such-program is not installed, or not on the PATH\n"


@pytest.mark.parametrize(
    ("kind", "chips", "hosts"),
    [
        ("v5litepod-8", 8, 1),
        ("v5p-8", 4, 1),
        ("v5p-128", 64, 16),
        ("v6e-8", 8, 1),
        ("v6e-32", 32, 8),
        ("v6e-256", 256, 64),
    ],
)
def test_sizes_of_slices(kind, chips, hosts):
    script = f". launch/recipes/lib.sh; chips_of {kind}; hosts_of {kind}"
    done = subprocess.run(["bash", "-c", script], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(chips), str(hosts)]
