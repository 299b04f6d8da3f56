"""baichuan-omni verify: it passes on the goldens, for any sizes, and fails on whatever is wrong or left out."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from baichuan_omni_jax.cli.main import main
from baichuan_omni_jax.verify import CHECKS, Golden, verify
from baichuan_omni_jax.verify import run as run_module
from baichuan_omni_jax.verify.language import slots_of
from baichuan_omni_jax.verify.media import patch_places, settle_ties
from tests.helpers.golden import golden_path
from tests.helpers.typecheck import unchecked

SCRIPT = Path(__file__).resolve().parents[2] / "launch" / "verify_parity.py"
CODEBOOK = "audio_tokenizer.audio_bridge_model.vq_list.0.codebook.embed"


@pytest.fixture(scope="module")
def command():
    return lambda *arguments: main(["verify", *map(str, arguments)])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The golden folder as links: a test replaces those that it damages."""
    for path in golden_path("omni_a").iterdir():
        (tmp_path / path.name).symlink_to(path)
    return tmp_path


def rewrite(path: Path, data: bytes) -> None:
    path.unlink(missing_ok=True)
    path.write_bytes(data)


def with_tensor(path: Path, name: str, value: np.ndarray) -> None:
    arrays = load_file(path) | {name: value}
    path.unlink()
    save_file(arrays, path)


def perturbed(data: bytes, name: str) -> bytes:
    """A safetensors file whose bf16 tensor `name` has its first 64 values negated."""
    length = int.from_bytes(data[:8], "little")
    start = 8 + length + json.loads(data[8 : 8 + length])[name]["data_offsets"][0]
    values = np.frombuffer(data[start : start + 128], np.uint16) ^ 0x8000
    return data[:start] + values.tobytes() + data[start + 128 :]


@pytest.mark.slow
def test_the_goldens_pass(tmp_path):
    report = tmp_path / "report.json"
    command = [sys.executable, SCRIPT, "--fixtures", golden_path("omni_a"), "--json", report]
    environment = os.environ | {"PYTHONPATH": str(SCRIPT.parents[1])}
    run = subprocess.run([*map(str, command)], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stdout + run.stderr
    rows = json.loads(report.read_text())["rows"]
    assert all(row["passed"] and row["relative_error"] <= row["tolerance"] for row in rows)
    assert {row["check"] for row in rows} == set(CHECKS)
    assert "generate_audio" in run.stdout


@pytest.mark.slow
def test_any_sizes(tmp_path):
    """Weights and references are unrelated, so values differ; names and shapes must not."""
    from tests.helpers.golden_folder import write_fixtures

    rows = [row for _, lines in verify(write_fixtures(tmp_path / "other")) for row in lines]
    assert {row.check for row in rows} == set(CHECKS)
    # How many frames random weights say is up to them.
    wrong = [
        row for row in rows if row.check != "generate_audio" and (row.note.startswith("shape") or "not" in row.note)
    ]
    assert not wrong
    assert all(
        row.passed for row in rows if row.tensor.endswith(("length", "lengths", "before_dconv2")) and not row.tolerance
    )


def test_a_check_passes_and_fails_with_a_wrong_weight(command, folder, tmp_path, capsys):
    report = tmp_path / "report.json"
    assert command("--fixtures", folder, "--only", "rvq", "--json", report) == 0
    assert json.loads(report.read_text())["passed"] is True
    rewrite(folder / "model.safetensors", perturbed((folder / "model.safetensors").read_bytes(), CODEBOOK))
    capsys.readouterr()
    assert command("--fixtures", folder, "--only", "rvq", "--json", report) == 1
    assert "1 comparisons, 1 failed" in capsys.readouterr().out
    assert json.loads(report.read_text())["passed"] is False


def test_what_is_not_checked_fails(command, folder, monkeypatch, capsys):
    with_tensor(folder / "rvq.safetensors", "distances", np.zeros((2,), np.float32))
    save_file({"smell": np.zeros((1,), np.float32)}, folder / "nose.safetensors")
    for name in set(CHECKS) - {"rvq"}:
        (folder / f"{name}.safetensors").unlink()
    monkeypatch.setattr(run_module, "CHECKS", {"rvq": CHECKS["rvq"]})
    rows = {(row.check, row.tensor): row for _, lines in verify(folder) for row in lines}
    assert set(rows) == {("rvq", "codes"), ("rvq", "distances"), ("nose", "smell")}
    assert rows["rvq", "codes"].passed
    for name in (("rvq", "distances"), ("nose", "smell")):
        assert not rows[name].passed
        assert rows[name].note == "not checked"
    assert command("--fixtures", folder) == 1
    assert "not checked" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--fixtures", "nowhere"), "nowhere/config.json"),
        (("--fixtures", "{folder}", "--only", "vison"), "check 'vison' is not one of vision, audio_encoder"),
        (("--fixtures", "{folder}", "--json", "{folder}/no/report.json"), "there is no folder {folder}/no"),
    ],
)
def test_wrong_arguments(command, folder, capsys, arguments, message):
    assert command(*(text.format(folder=folder) for text in arguments)) == 2
    output = capsys.readouterr().err.strip().splitlines()[-1]
    assert output.startswith("error: ")
    assert message.format(folder=folder) in output


@pytest.mark.parametrize("name", ["config.json", "vocoder_config.json", "model", "vocoder", "packed", "rvq"])
def test_a_missing_file_is_named(command, folder, capsys, name):
    path = folder / (name if name.endswith(".json") else f"{name}.safetensors")
    path.unlink()
    assert command("--fixtures", folder) == 2
    assert str(path.name) in capsys.readouterr().err


@pytest.mark.parametrize("name", ["model", "vocoder", "rvq"])
def test_a_truncated_file_is_named(command, folder, capsys, name):
    path = folder / f"{name}.safetensors"
    rewrite(path, path.read_bytes()[:-100])
    assert command("--fixtures", folder, "--only", "rvq") == 2
    assert f"{path} is truncated" in capsys.readouterr().err


def test_inputs_that_do_not_fit_are_refused_by_name(command, folder, capsys):
    with_tensor(folder / "rvq.safetensors", "x", np.zeros((257, 8), np.float32))
    with unchecked():
        assert command("--fixtures", folder, "--only", "rvq") == 2
    assert f"{folder}/rvq.safetensors does not fit its config: " in capsys.readouterr().err


def test_comparisons(tmp_path):
    save_file({"x": np.array([1.0, -4.0]), "n": np.array([3, 70000000])}, tmp_path / "a.safetensors")
    gold = Golden("a", tmp_path / "a.safetensors")
    gold.compare("x", np.array([1.0, -3.0]), 0.25)
    gold.compare("x", np.array([1.0, -3.0]), 0.2)
    gold.compare("x", np.array([1.0, np.nan]), 1.0)
    gold.compare("x", np.zeros((2, 1)), 1.0)
    gold.equal("n", np.array([3, 70000001]))
    rows = gold.comparisons()
    assert [row.passed for row in rows] == [True, False, False, False, False]
    assert (rows[0].max_abs_error, rows[0].relative_error) == (1.0, 0.25)
    assert rows[3].note == "shape [2, 1], not [2]"
    assert rows[4].max_abs_error == 1.0


def test_near_ties():
    books = [np.array([[0.0], [2.0], [9.0]]), np.array([[1.0], [-1.0]])]
    # 1 lies in the middle of codes 0 and 2 of the first level: either is right, with its own second code.
    x, theirs = np.array([[1.0], [1.0], [0.5]]), np.array([[0, 0], [0, 0], [0, 0]])
    ours = np.array([[1, 1], [1, 0], [1, 1]])
    settled, ties = settle_ties(ours, theirs, x, books)
    assert ties == 1
    np.testing.assert_array_equal(settled, [[0, 0], [1, 0], [1, 1]])


def test_places_and_slots():
    places, frames = patch_places(np.array([[2, 2, 4]]), merge=2)
    np.testing.assert_array_equal(frames, [1] * 8 + [2] * 8)
    np.testing.assert_array_equal(places[:5], [[0, 0], [0, 1], [1, 0], [1, 1], [0, 2]])
    taken = np.array([[0, 1, 1], [0, 0, 1]], bool)
    order, slots = slots_of(taken, np.array([[0, 5, 6], [0, 0, 7]]))
    np.testing.assert_array_equal(order, [[5, 6], [7, 0]])
    np.testing.assert_array_equal(slots, [[1, 2], [2, 3]])
