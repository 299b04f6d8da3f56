"""`baichuan-omni doctor`: its lines, exit codes and JSON; the whole of it; two hosts of mixed versions."""

import json
import os
import socket
import subprocess
import sys

import pytest

from baichuan_omni_jax import doctor
from baichuan_omni_jax.cli.main import main
from baichuan_omni_jax.doctor import Check, Line, Verdict
from tests.helpers.micro import REPOSITORY
from tests.helpers.proofs import HANG


def says(*lines: Line) -> tuple[Check, ...]:
    return (Check("kernels", lambda setting: lines),)


OKAY = Line("kernels", Verdict.OK, "attention is right", values={"error": 1e-6})
WARNING = Line("kernels", Verdict.WARN, "it is [slow]", "take a profile")
FAILURE = Line("kernels", Verdict.FAIL, "attention is WRONG", "do not train", {"error": float("inf")})


@pytest.mark.parametrize(
    ("lines", "code", "counts"),
    [((OKAY, WARNING), 0, "1 ok, 1 warn, 0 fail"), ((OKAY, FAILURE), 1, "1 ok, 0 warn, 1 fail")],
)
def test_the_exit_code_says_whether_a_line_fails(lines, code, counts, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(doctor, "CHECKS", says(*lines))
    report = tmp_path / "report.json"
    assert main(["doctor", "--json", str(report)]) == code
    printed = capsys.readouterr().out
    assert counts in printed
    for line in lines:
        assert f"{line.verdict:<5}kernels      {line.text}\n" in printed
        assert f"-> {line.advice}" in printed or not line.advice
    written = json.loads(report.read_text())
    assert written["passed"] is (code == 0)
    assert [(line["verdict"], line["text"], line["host"]) for line in written["lines"]] == [
        (line.verdict, line.text, 0) for line in lines
    ]
    assert list(written["seconds"]) == ["kernels"]


def test_a_report_that_cannot_be_written_is_refused_before_anything_runs(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(doctor, "CHECKS", says(FAILURE))
    assert main(["doctor", "--json", str(tmp_path / "none" / "report.json")]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "there is no folder" in printed.err


# Host 1 has another flax. Checks on devices would make this the test of a minute, but for the exchange.
_TWO_HOSTS = """
import sys
from baichuan_omni_jax import doctor
from baichuan_omni_jax.cli.main import main
from baichuan_omni_jax.doctor import software, workdir

workdir.PROBE_BYTES = workdir._PIECE  # not the test of a disk
if "--host=1" in sys.argv:
    installed = software.installed
    software.installed = lambda name: "0.0.1" if name == "flax" else installed(name)
kept = ("versions", "workdir", "devices", "collectives")
doctor.CHECKS = tuple(check for check in doctor.CHECKS if check.name in kept)
sys.exit(main(["doctor", *sys.argv[1:]]))
"""


def test_mixed_versions_on_two_hosts_are_named(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    flags = ["--workdir", str(tmp_path / "run"), "--multihost", f"--coordinator=localhost:{port}", "--hosts=2"]
    variables = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(REPOSITORY),
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
    }
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [sys.executable, "-c", _TWO_HOSTS, *flags, "--json", str(tmp_path / "report.json")]
    hosts = [subprocess.Popen([*command, f"--host={host}"], env=variables, **pipes) for host in (0, 1)]
    try:
        outputs = [host.communicate(timeout=HANG) for host in hosts]
    finally:
        for host in hosts:
            host.kill()
    assert [host.returncode for host in hosts] == [1, 1], outputs
    lines = json.loads((tmp_path / "report.json").read_text())["lines"]
    # Both know; each says it once.
    failed = [line for line in lines if line["verdict"] == "fail"]
    assert {line["host"] for line in failed} == {0, 1}
    assert any(line["text"].startswith("flax: 0.0.1 on host 1; ") for line in failed), failed
    # The rest of the machine is in order, the exchange over all four devices too.
    told = {(line["check"], line["host"]): line["verdict"] for line in lines}
    assert told["workdir", 1] in ("ok", "warn"), [line for line in lines if line["check"] == "workdir"]
    assert any("over 4 devices" in line["text"] for line in lines)
    assert all(line["verdict"] == "ok" for line in lines if line["check"] == "collectives")
    assert "host 1: " in outputs[0][0]
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_whole_of_it_passes_on_this_cpu(compiled, tmp_path):
    variables = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(REPOSITORY),
        "JAX_COMPILATION_CACHE_DIR": str(compiled),
    }
    report = tmp_path / "report.json"
    command = [sys.executable, "-m", "baichuan_omni_jax", "doctor", "--workdir", str(tmp_path / "run")]
    done = subprocess.run([*command, "--json", str(report)], env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    written = json.loads(report.read_text())
    assert written["passed"]
    assert {line["check"] for line in written["lines"]} == {check.name for check in doctor.CHECKS}
