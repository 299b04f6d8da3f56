"""baichuan-omni resynthesize: codes and audio of untrained branches, and the sentence for what cannot be used."""

import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import soundfile

from baichuan_omni_jax.checkpoint import save_branches
from baichuan_omni_jax.cli.evaluate import mels_in_place
from baichuan_omni_jax.cli.main import main
from baichuan_omni_jax.config import tiny
from baichuan_omni_jax.nn.param import ComputePolicy
from baichuan_omni_jax.omni.flow_matching_model import FlowMatchingModel

SCRIPT = Path(__file__).parents[2] / "launch" / "resynthesize.py"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    from baichuan_omni_jax.config import MeshConfig
    from baichuan_omni_jax.sharding import make_mesh

    path = tmp_path_factory.mktemp("voice") / "ckpt"
    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
        model = jax.jit(lambda: FlowMatchingModel(jax.random.key(0), tiny(), ComputePolicy()))()
        save_branches(path, {name: getattr(model, name) for name in model.branches}, tiny())
    return path


def run(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(SCRIPT), *map(str, arguments)], capture_output=True, text=True)


@pytest.mark.slow
def test_two_windows_of_audio_come_back(checkpoint, tmp_path):
    """31 s: two windows; codes of both, half a second of audio at 24 kHz for 6.25 of them, give or take a frame."""
    wave = 0.1 * np.random.default_rng(0).standard_normal(31 * 16000)
    soundfile.write(tmp_path / "in.wav", wave, 16000)
    out, codes = tmp_path / "out.wav", tmp_path / "codes.npy"
    done = run("--checkpoint", checkpoint, "--audio", tmp_path / "in.wav", "--out", out, "--codes", codes)
    assert done.returncode == 0, done.stderr
    assert "untrained: audio_encoder, audio_decoder, flow" in done.stdout
    assert "griffin_lim" in done.stdout
    spoken, rate = soundfile.read(out)
    found = np.load(codes)
    assert rate == 24000
    assert found.shape == (375 + 12, tiny().audio.levels)
    assert abs(len(spoken) / rate - len(found) / 12.5) < 0.1


def test_a_plot_shows_each_window_where_it_was():
    mels = [np.full((3, 2), 1.0, np.float32), np.full((3, 2), 2.0, np.float32)]
    mel = mels_in_place(mels, [0, 4], np.zeros((6, 2), np.float32))
    np.testing.assert_array_equal(mel[:, 0], [1, 1, 1, np.nan, 2, 2])


def test_files_that_cannot_be_written_are_named_first(tmp_path, capsys):
    given = ["--checkpoint", "nowhere", "--audio", "nowhere.wav", "--out"]
    for arguments, sentence in (
        ([str(tmp_path / "no" / "out.wav")], f"there is no folder {tmp_path / 'no'}"),
        ([str(tmp_path / "out.speech")], "waveforms are written as .wav"),
        ([str(tmp_path / "out.wav"), "--codes", str(tmp_path / "no" / "c.npy")], f"--codes {tmp_path / 'no'}"),
    ):
        assert main(["resynthesize", *given, *arguments]) == 2
        assert sentence in capsys.readouterr().err


@pytest.mark.slow
def test_what_cannot_be_used_is_named(checkpoint, tmp_path):
    (tmp_path / "in.wav").write_bytes(b"no audio")
    for arguments, sentence in (
        (("--checkpoint", f"flow={checkpoint}"), "has no branch audio_encoder; it has flow"),
        (("--checkpoint", tmp_path), "is neither a checkpoint"),
        (("--checkpoint", checkpoint), "in.wav is not a readable"),
    ):
        done = run(*arguments, "--audio", tmp_path / "in.wav", "--out", tmp_path / "out.wav")
        assert done.returncode == 2, done.stderr
        assert sentence in done.stderr.splitlines()[-1]
        assert not (tmp_path / "out.wav").exists()
