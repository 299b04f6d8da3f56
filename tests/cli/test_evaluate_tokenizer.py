"""`baichuan-omni evaluate tokenizer`: numbers of untrained branches, what it skips, the measures by themselves."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import soundfile

from baichuan_omni_jax.checkpoint import save_branches
from baichuan_omni_jax.cli.main import main
from baichuan_omni_jax.config import MeshConfig, tiny
from baichuan_omni_jax.config.mel_targets import decoded_target
from baichuan_omni_jax.evaluation import tokenizer_evaluator
from baichuan_omni_jax.evaluation.tokenizer_evaluator import (
    RATE,
    Clip,
    RecognitionErrors,
    TokenizerEvaluator,
    join_windows,
    measure,
    read_clips,
    samples_with_codes,
)
from baichuan_omni_jax.nn.param import ComputePolicy
from baichuan_omni_jax.omni.flow_matching_model import FlowMatchingModel
from baichuan_omni_jax.sharding import make_mesh
from data_pipelines.errors import SampleError
from data_pipelines.media.features import clip_windows
from data_pipelines.media.location import Media

REPOSITORY = Path(__file__).parents[2]
SCRIPT = REPOSITORY / "launch" / "evaluate_tokenizer.py"
COMMAND = ("evaluate", "tokenizer")
TRANSCRIPT = "The plums are fresh."


def asr(name: str) -> str:
    """A line of a manifest."""
    audio = f"<audio_start_baichuan>{json.dumps({'path': f'{name}.wav'})}<audio_end_baichuan>"
    text = f"Write:{audio}<trainable_start>{TRANSCRIPT}<trainable_end>"
    return json.dumps({"id": name, "type": "asr", "text": text})


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    """Bursts, as syllables are: measures of speech find something to listen to."""
    rng, count = np.random.default_rng(seed), int(seconds * RATE)
    loudness = np.abs(np.sin(np.arange(count) * 2 * np.pi * 2 / RATE))
    return (0.2 * loudness * rng.standard_normal(count)).astype(np.float32)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory) -> Path:
    """Two clips of noise; one that is silent, one too short, one that is not there, and a line that is no JSON."""
    folder = tmp_path_factory.mktemp("clips")
    waves = {"one": noise(2.0), "two": noise(1.5, seed=1), "silent": np.zeros(RATE), "short": noise(0.02)}
    for name, wave in waves.items():
        soundfile.write(folder / f"{name}.wav", wave, RATE)
    lines = [asr(name) for name in (*waves, "missing")]
    (folder / "clips.jsonl").write_text("\n".join([*lines, "{"]))
    return folder / "clips.jsonl"


def test_clips_of_a_manifest_and_their_transcripts(manifest):
    skipped = Counter()
    clips = list(read_clips(manifest, manifest.parent, skipped))
    assert [clip.name for clip in clips] == ["one", "two", "silent", "short"]
    assert {clip.text for clip in clips} == {TRANSCRIPT}
    assert skipped == {"missing_file": 1, "bad_json": 1}
    assert len(clips[0].samples(8000)) == 16000


def test_errors_of_a_recognizer():
    """Two words of eight wrong; Chinese is counted by characters; a hook that fails is a cause."""
    words = {4: "the plums are fresh", 3: "The plum are fish!"}
    english = RecognitionErrors(lambda samples, rate: words[len(samples)])
    for length in words:
        english.count(english.recognize(np.zeros(length, np.float32), RATE), TRANSCRIPT)
    assert english.rates()["wer"] == pytest.approx(2 / 8)
    assert english.rates()["cer"] == pytest.approx((1 + 2) / (2 * 16))
    chinese = RecognitionErrors(lambda samples, rate: "")
    chinese.count("一只狗在桥上等。", "一只狗在桥上等着。")
    assert chinese.rates() == {"wer": pytest.approx(1 / 8), "cer": pytest.approx(1 / 8)}
    assert RecognitionErrors(lambda samples, rate: "").rates() == {}
    with pytest.raises(SampleError, match="it heard NoneType, not text"):
        RecognitionErrors(lambda samples, rate: None).recognize(np.zeros(4, np.float32), RATE)


@pytest.mark.slow
def test_measures_fall_with_noise():
    """As it was: the best there is. More noise: worse. Silence and a click have none."""
    pytest.importorskip("pystoi", reason="the extra `evaluate` brings it")
    pytest.importorskip("pesq", reason="the extra `evaluate` brings it")
    clean, rng = noise(3.0), np.random.default_rng(1)
    hiss = rng.standard_normal(len(clean)).astype(np.float32)
    found = [measure(clean, clean + level * hiss) for level in (0, 0.05, 0.5)]
    assert found[0]["stoi"] == pytest.approx(1.0, abs=1e-3)
    assert found[0]["pesq"] > 4.5
    for better, worse in ((0, 1), (1, 2)):
        assert all(found[better][name] > found[worse][name] for name in ("stoi", "pesq"))
    assert measure(np.zeros(RATE, np.float32), np.zeros(RATE, np.float32)) == {}
    assert measure(clean[:200], clean[:200]) == {}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("voice") / "ckpt"
    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
        model = jax.jit(lambda: FlowMatchingModel(jax.random.key(0), tiny(), ComputePolicy()))()
        save_branches(path, {name: getattr(model, name) for name in model.branches}, tiny())
    return path


def run(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    path = str(REPOSITORY)
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})


def hears_half(samples: np.ndarray, rate: int) -> str:
    """A recognizer for the command: two of the four words."""
    assert rate == RATE
    return "the plums"


def hears_recordings(samples: np.ndarray, rate: int) -> str:
    """One that fails on what comes from codes."""
    if not np.allclose(samples, noise(2.0), atol=1e-3):
        raise RuntimeError("no speech")
    return TRANSCRIPT


@pytest.mark.slow
def test_numbers_of_an_untrained_tokenizer(checkpoint, manifest, tmp_path):
    """By its own mel and by flow matching; with a recognizer, one that fails, and a plot."""
    pytest.importorskip("matplotlib", reason="the extra `show` brings it")
    numbers, page = tmp_path / "numbers.json", tmp_path / "page.png"
    by_decoder = f"audio_encoder={checkpoint},audio_decoder={checkpoint}"
    hook = "tests.cli.test_evaluate_tokenizer:hears_half"
    done = run("--checkpoint", by_decoder, "--manifest", manifest, "--json", numbers, "--plot", page, "--asr", hook)
    assert done.returncode == 0, done.stderr
    found = json.loads(numbers.read_text())
    assert found["clips"] == 2
    assert found["seconds"] == pytest.approx(3.5)
    assert found["skipped"] == {"missing_file": 1, "bad_json": 1, "silent_audio": 1, "too_short": 1}
    assert found["waveform"] == "16000 Hz by griffin_lim"
    assert found["wer_original"] == found["wer_from_codes"] == 0.5
    assert found["mel_mae"] == found["mel_mae_q7"] > 0
    assert 0 < found["bits_per_second"] <= found["max_bits_per_second"] == pytest.approx(12.5 * 36.585, rel=1e-3)
    assert page.stat().st_size > 10_000
    hook = "tests.cli.test_evaluate_tokenizer:hears_recordings"
    done = run("--checkpoint", checkpoint, "--manifest", manifest, "--limit", 1, "--asr", hook, "--json", numbers)
    assert done.returncode == 0, done.stderr
    assert "24000 Hz by griffin_lim" in done.stdout
    found = json.loads(numbers.read_text())
    assert found["skipped"] == {"recognizer_failed": 1}
    assert "wer_original" not in found  # rates of both are of the same clips


def test_waves_are_compared_where_they_belong():
    """Each window's in its own place, cut where the clip ends; and which samples of the clip they are of."""
    waves = [np.array([1, 2, 3], np.float32), np.array([4, 5, 6], np.float32)]
    whole, covered = join_windows(waves, [0, 4], 6)
    np.testing.assert_array_equal(whole, [1, 2, 3, 0, 4, 5])
    np.testing.assert_array_equal(covered, [True, True, True, False, True, True])
    whole, covered = join_windows(waves, [0, 4], 6, 1.5)
    np.testing.assert_array_equal(whole, [1, 2, 3, 0, 0, 0, 4, 5, 6])
    np.testing.assert_array_equal(covered, [True, True, False, False, True, True])
    np.testing.assert_array_equal(samples_with_codes(np.arange(5), covered), [0, 1, 4])


class RecordedClip(Clip):
    """A clip without a file."""

    def __init__(self, name, wave):
        super().__init__(name, Media("clip.wav", None, b""), "")
        vars(self)["wave"] = wave

    def samples(self, rate):
        return self.wave


@pytest.mark.parametrize("samples", [17_283, 480_000 + 23_477])
def test_measures_of_an_exact_decoder_compare_a_recording_with_itself(monkeypatch, samples):
    """Whatever the length, one window or two: the same samples, but for what has no code; mels alike on the plot."""
    wave = (0.1 * np.random.default_rng(0).standard_normal(samples)).astype(np.float32)
    audio, settings, spans = tiny().audio, decoded_target(tiny().post_net), iter(clip_windows(samples, tiny().audio))

    def exact(mel, target):
        codes = audio.bridge_length(len(mel))
        return np.zeros((codes, audio.levels), np.int32), target[: (4 * codes - 1) * 5 // 4]

    def recorded(mel):
        return wave[next(spans).start :][: len(mel) * settings.hop]

    class Exact(SimpleNamespace):
        def __call__(self, mel, target):
            return exact(mel, target)

    pairs = []
    monkeypatch.setattr(tokenizer_evaluator, "measure", lambda *pair: pairs.append(pair) or {})
    evaluator = TokenizerEvaluator.__new__(TokenizerEvaluator)
    fields = {
        "scores": Exact(settings=settings),
        "_audio": audio,
        "_speech_decoder": None,
        "_recognitions": {},
        "mels": [],
    }
    vars(evaluator).update(fields, clips=0, _seconds=0.0, _measures={})
    vars(evaluator)["_waves"] = type("Waves", (), {"name": "exact", "__call__": staticmethod(recorded)})()
    evaluator.add(RecordedClip("clip", wave), Counter())
    ((original, again),) = pairs
    np.testing.assert_array_equal(original, again)
    windows = clip_windows(samples, audio)
    assert samples - 0.1 * len(windows) * RATE < len(original) < samples
    ((_, target, made),) = evaluator.mels
    np.testing.assert_array_equal(target, made)


def test_files_that_cannot_be_written_are_named_first(tmp_path, capsys):
    given = ["--checkpoint", "nowhere", "--manifest", "nowhere"]
    for arguments, sentence in (
        (["--json", str(tmp_path / "no" / "n.json")], f"there is no folder {tmp_path / 'no'}"),
        (["--plot", str(tmp_path / "no" / "p.png")], f"there is no folder {tmp_path / 'no'}"),
        (["--limit", "0"], "--limit must be at least 1, not 0"),
    ):
        assert main([*COMMAND, *given, *arguments]) == 2
        assert sentence in capsys.readouterr().err


@pytest.mark.slow
def test_what_cannot_be_used_is_named(checkpoint, manifest, tmp_path, capsys):
    (tmp_path / "none.jsonl").write_text("{")
    for arguments, sentence in (
        (("--checkpoint", f"flow={checkpoint}", "--manifest", manifest), "has no branch audio_encoder"),
        (("--checkpoint", checkpoint, "--manifest", tmp_path / "no.jsonl"), "no.jsonl cannot be read"),
        (("--checkpoint", checkpoint, "--manifest", tmp_path / "none.jsonl"), "holds no clip that can be used"),
        (("--checkpoint", checkpoint, "--manifest", manifest, "--asr", "json:hear"), "--asr json:hear cannot be"),
    ):
        assert main([*COMMAND, *map(str, arguments)]) == 2
        assert sentence in capsys.readouterr().err.splitlines()[-1]
