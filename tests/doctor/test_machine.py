"""Which devices are expected and found; memory and disks of the host."""

import importlib.util
import shutil

import pytest

from baichuan_omni_jax.doctor import Setting, Verdict, machine
from baichuan_omni_jax.doctor.machine import check_devices, check_disks, check_host, expected_platform, host_memory
from tests.helpers.service import hosts_that_say


@pytest.fixture
def no_drivers(monkeypatch):
    """Nothing that drives an accelerator is installed, whatever is."""
    find = importlib.util.find_spec
    hidden = {name for names, _ in machine._DRIVERS.values() for name in names}
    monkeypatch.setattr(machine, "find_spec", lambda name: None if name in hidden else find(name))


@pytest.fixture
def unnamed(monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)


def pci(root, vendor: str, device: str, place: str = "0") -> None:
    folder = root / "sys" / "bus" / "pci" / "devices" / place
    folder.mkdir(parents=True)
    (folder / "vendor").write_text(f"{vendor}\n")
    (folder / "device").write_text(f"{device}\n")


def test_a_tpu_is_known_by_its_chips_and_not_by_googles_network_card(tmp_path, unnamed):
    pci(tmp_path, "0x1ae0", "0x0042", "card")
    assert expected_platform(None, tmp_path)[0] == "cpu"
    pci(tmp_path, "0x1ae0", "0x0062", "a")
    pci(tmp_path, "0x1ae0", "0x0062", "b")
    assert expected_platform(None, tmp_path) == ("tpu", "2 TPU chips on the PCI bus")


def test_a_gpu_is_known_by_its_device_file(tmp_path, unnamed):
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev" / "nvidia0").touch()
    assert expected_platform(None, tmp_path)[0] == "gpu"


@pytest.mark.parametrize(("value", "platform"), [("tpu", "tpu"), ("cuda,cpu", "gpu"), ("cpu", "cpu")])
def test_what_the_user_says_comes_first(value, platform, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", value)
    pci(tmp_path, "0x1ae0", "0x0062")
    assert expected_platform(None, tmp_path)[0] == platform
    assert expected_platform("gpu", tmp_path)[0] == "gpu"


@pytest.mark.parametrize(
    ("expect", "package", "extra"), [("tpu", "libtpu", "tpu"), ("gpu", "jax-cuda12-plugin", "cuda")]
)
def test_what_drives_the_expected_device_is_missing(expect, package, extra, no_drivers):
    (line,) = check_devices(Setting(expect=expect))
    assert line.verdict is Verdict.FAIL
    assert line.text == f"a {expect.upper()} is expected (--expect), but {package} is not installed"
    assert line.advice == f"pip install 'baichuan_omni_jax[{extra}]'"


def test_jax_on_the_cpu_where_a_tpu_is_expected(monkeypatch):
    monkeypatch.setattr(machine, "find_spec", lambda name: True)
    (line,) = check_devices(Setting(expect="tpu"))
    assert (line.verdict, line.text) == (Verdict.FAIL, "JAX runs on cpu, but a TPU is expected (--expect)")


def test_devices_are_not_started_while_another_host_cannot():
    (line,) = check_devices(Setting(expect="cpu", hosts=hosts_that_say("drivers", "missing")))
    assert (line.verdict, line.text) == (Verdict.FAIL, "not started: host 1 cannot start devices")


def test_a_cpu_is_as_expected():
    (line,) = check_devices(Setting(expect="cpu"))
    assert line.verdict is Verdict.OK
    assert line.values["platform"] == "cpu"


def test_a_disk_that_is_nearly_full_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100 << 30, 99 << 30, 1 << 30))
    lines = list(check_disks(Setting(workdir=str(tmp_path / "not" / "yet"))))
    assert all(line.verdict is Verdict.WARN for line in lines)
    assert lines[0].text == f"1.07 GB of 107 GB free for the workdir ({tmp_path})"


def test_a_bucket_is_no_disk():
    assert not any("gs:" in line.text for line in check_disks(Setting(workdir="gs://bucket/run")))


def test_little_shared_memory_is_named_with_what_gives_more(monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(64 << 20, 0, 64 << 20))
    (line,) = [line for line in check_host(Setting(expect="cpu")) if "/dev/shm" in line.text]
    assert line.verdict is Verdict.WARN
    assert "--shm-size" in line.advice


def test_memory_is_that_of_the_container(tmp_path):
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "meminfo").write_text("MemTotal: 8000 kB\nMemAvailable: 6000 kB\n")
    assert host_memory(tmp_path) == (8000 * 1024, 6000 * 1024)
    folder = tmp_path / "sys" / "fs" / "cgroup"
    folder.mkdir(parents=True)
    (folder / "memory.max").write_text("4096000\n")
    (folder / "memory.current").write_text("1000000\n")
    assert host_memory(tmp_path) == (4096000, 3096000)
