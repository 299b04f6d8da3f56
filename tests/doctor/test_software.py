"""Versions beside what is asked for: packages, constraints, what drives the devices, and other hosts."""

import json
from importlib import metadata

import pytest

from baichuan_omni_jax.doctor import Setting, Verdict, software
from baichuan_omni_jax.doctor.software import check_versions, constraints_file, host_facts, host_lines, read_constraints
from tests.helpers.service import hosts_that_say


@pytest.fixture
def versions(monkeypatch):
    """Versions that are told instead of the installed ones: a dict to fill; "" is not installed."""
    told: dict[str, str] = {}

    def version(name: str) -> str:
        if not (found := told[name] if name in told else software_version(name)):
            raise metadata.PackageNotFoundError(name)
        return found

    software_version = metadata.version
    monkeypatch.setattr(software.metadata, "version", version)
    return told


def problems(setting: Setting | None = None) -> list[str]:
    return [line.text for line in check_versions(setting or Setting(expect="cpu")) if line.verdict is not Verdict.OK]


def test_what_is_installed_here_is_as_asked_for():
    lines = list(check_versions(Setting(expect="cpu")))
    assert not [line for line in lines if line.verdict is Verdict.FAIL]
    assert any("required packages are as asked for" in line.text for line in lines)


def test_an_old_and_a_missing_package_are_named_with_what_installs_them(versions):
    versions |= {"flax": "0.10.0", "grain": ""}
    failed = [line for line in check_versions(Setting(expect="cpu")) if line.verdict is Verdict.FAIL]
    assert [line.text.split(" ")[0] for line in failed] == ["flax", "grain"]
    assert "flax 0.10.0 is not >=" in failed[0].text
    assert failed[1].text == "grain is not installed"
    assert failed[1].advice.startswith("pip install 'grain>=")


def test_jax_and_jaxlib_of_two_releases(versions):
    versions |= {"jaxlib": "0.9.1"}
    assert any("with jaxlib 0.9.1: they are released together" in text for text in problems())


def test_a_tpu_without_libtpu(versions):
    versions |= {"libtpu": ""}
    assert "libtpu is not installed, and a TPU is expected here" in problems(Setting(expect="tpu"))


def test_another_libtpu_than_the_one_of_this_jax(versions):
    versions |= {"libtpu": "0.0.1"}
    assert any(text.startswith("libtpu 0.0.1; jax ") for text in problems(Setting(expect="tpu")))


def test_constraints_are_found_by_accelerator_and_compared(tmp_path, monkeypatch, versions):
    for name in ("constraints-cpu.txt", "constraints-cuda.txt", "constraints-tpu.txt", "notes-cpu.txt"):
        (tmp_path / name).write_text("# pins\njax==0.0.7  # old\nnumpy==999.0 \\\n    --hash=sha256:00\n-c other.txt\n")
    assert constraints_file("gpu", tmp_path).name == "constraints-cuda.txt"
    assert constraints_file("cpu", tmp_path).name == "constraints-cpu.txt"
    assert {name: str(asked) for name, asked in read_constraints(tmp_path / "constraints-cpu.txt").items()} == {
        "jax": "==0.0.7",
        "numpy": "==999.0",
    }
    monkeypatch.setattr(software, "constraints_file", lambda expected: tmp_path / "constraints-cpu.txt")
    versions |= {"jax": "0.10.2", "numpy": "2.4.6"}
    assert "other versions than constraints-cpu.txt has: jax 0.10.2 instead of 0.0.7, numpy 2.4.6 instead of 999.0" in (
        problems()
    )


def test_the_odd_host_is_named_with_both_versions():
    facts = host_facts()
    odd = json.dumps(facts | {"flax": "0.0.1"})
    lines = list(host_lines(hosts_that_say("versions", json.dumps(facts), odd), facts))
    assert [line.verdict for line in lines] == [Verdict.FAIL]
    assert lines[0].text == f"flax: 0.0.1 on host 2; {facts['flax']} on host 0 and host 1"
    assert lines[0].advice == "give host 2 the same as host 0 and host 1"


def test_host_0_may_be_the_odd_one():
    facts = {"jax": "1"}
    others = [json.dumps({"jax": "2"})] * 2
    (line,) = host_lines(hosts_that_say("versions", *others), facts)
    assert line.text == "jax: 1 on host 0; 2 on host 1 and host 2"


def test_of_two_hosts_the_second_is_the_odd_one():
    (line,) = host_lines(hosts_that_say("versions", json.dumps({"jax": "2"})), {"jax": "1"})
    assert line.text == "jax: 2 on host 1; 1 on host 0"


def test_a_host_that_says_nothing_is_named():
    (line,) = host_lines(hosts_that_say("versions", None), {"jax": "1"})
    assert (line.verdict, line.text) == (Verdict.FAIL, "no word from host 1")


def test_hosts_that_are_alike():
    (line,) = host_lines(hosts_that_say("versions", json.dumps({"jax": "1"})), {"jax": "1"})
    assert line.verdict is Verdict.OK
