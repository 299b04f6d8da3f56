"""What a run on audio logs of held-out clips: images, waveforms, events, and the settings that are refused."""

import io
import json
import struct
from fractions import Fraction
from pathlib import Path

import jax
import numpy as np
import pytest
import soundfile
from PIL import Image
from tensorboardX.proto.event_pb2 import Event

from baichuan_omni_jax.checkpoint import save_branches
from baichuan_omni_jax.checkpoint.branches import VOCODER_CONFIG
from baichuan_omni_jax.config import apply_overrides, load_run_config, tiny
from baichuan_omni_jax.config.mel_targets import flow_target
from baichuan_omni_jax.config.vocoder import tiny_vocoder, vocoder_to_json
from baichuan_omni_jax.errors import ConfigError
from baichuan_omni_jax.nn.param import ComputePolicy
from baichuan_omni_jax.train.audio_samples import AudioSamples, MelWaves, check_samples, mel_image
from baichuan_omni_jax.train.metrics import MetricsWriter
from baichuan_omni_jax.vocoder.model import Vocoder
from tests.helpers.micro import REPOSITORY, numbers, one_device

TOKENIZER, FLOW = (REPOSITORY / "configs" / f"{name}_tiny.py" for name in ("audio_tokenizer", "flow_matching"))
SMALL = ("data.workers=0", "data.sample=false", "eval.every=0", "data.mel_frames=(256,)", "data.rows=1")
LISTEN = ("eval.audio_every=2", "eval.audio_samples=1")


def events(workdir: Path) -> dict[tuple[str, int], object]:
    """(tag, step) -> value of every TensorBoard summary that is no scalar."""
    found = {}
    for path in sorted((workdir / "tensorboard").iterdir()):
        data, place = path.read_bytes(), 0
        while place < len(data):
            (length,) = struct.unpack_from("<Q", data, place)
            event = Event.FromString(data[place + 12 : place + 12 + length])
            place += 16 + length
            for value in event.summary.value:
                if value.WhichOneof("value") in ("audio", "image"):
                    found[value.tag, event.step] = value
    return found


def wave_of(value) -> tuple[np.ndarray, int]:
    return soundfile.read(io.BytesIO(value.audio.encoded_audio_string))


@pytest.fixture(scope="module")
def vocoder(tmp_path_factory) -> Path:
    """A checkpoint with a random vocoder."""
    path = tmp_path_factory.mktemp("vocoder") / "ckpt"
    with jax.set_mesh(one_device()):
        model = jax.jit(lambda: Vocoder(jax.random.key(0), tiny_vocoder(), ComputePolicy()))()
        save_branches(path, {"vocoder": model}, tiny())
    (path / VOCODER_CONFIG).write_text(json.dumps(vocoder_to_json(tiny_vocoder())))
    return path


def test_an_image_has_low_filters_below_and_one_scale():
    low_tone, silent = np.full((4, 5), -8.0), np.full((2, 5), -8.0)
    low_tone[1, 0] = 0.0
    image = mel_image([low_tone, silent])
    assert image.shape == (2 * 15 + 6, 12, 3)
    brightest = np.argwhere(image[:15].sum(-1) == image[:15].sum(-1).max())
    assert (brightest.min(0) == (12, 3)).all()
    assert (brightest.max(0) == (14, 5)).all()
    assert (image[15:21] == 255).all()
    assert (image[21:] == image[0, 0]).all()
    # Frame i of the first stands over the frame of the second at its moment: 0 0 1 1 of 62.5 Hz under four of 100 Hz.
    steps, four = np.array([[1.0], [2.0], [3.0]]), np.array([[1.0], [1.0], [2.0], [2.0]])
    image = mel_image([four, steps], (Fraction(1), Fraction(5, 8)))
    assert (image[:3] == image[9:]).all()
    assert mel_image([np.full((2, 3), np.nan), np.zeros((0, 3))]).shape == (2 * 9 + 6, 6, 3)


def test_samples_are_read_back_from_the_events(tmp_path):
    """WAV in 16 bits, at its own rate; the image to the byte."""
    wave = 0.5 * np.sin(np.arange(2400) / 10).astype(np.float32)
    image = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    writer = MetricsWriter(tmp_path, 0)
    writer.write_samples(7, AudioSamples({"a/griffin_lim": (wave, 24000)}, {"mels": image}))
    writer.close()
    found = events(tmp_path)
    logged, rate = wave_of(found["a/griffin_lim", 7])
    assert rate == 24000
    assert np.abs(logged - wave).max() < 1e-4
    seen = Image.open(io.BytesIO(found["mels", 7].image.encoded_image_string))
    assert np.array_equal(np.asarray(seen), image)


def test_settings_that_do_not_fit_are_refused():
    for config, changes, message in (
        (TOKENIZER, ["eval.mixtures=()"], "eval.audio_every 2 needs eval.mixtures"),
        (
            TOKENIZER,
            ["eval.audio_samples=0"],
            "eval.audio_every 2 needs eval.mixtures and eval.audio_samples of at least 1",
        ),
        (TOKENIZER, ["eval.vocoder=hift"], "a vocoder reads the mel of flow_matching"),
        (FLOW, ["eval.vocoder=nowhere"], "is neither a checkpoint"),
        (REPOSITORY / "configs" / "micro.py", [], "task omni is none of audio_tokenizer, flow_matching"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_samples(apply_overrides(load_run_config(config), [*LISTEN, *changes]), tiny())


@pytest.mark.slow
def test_hift_gives_as_many_samples_as_griffin_lim(vocoder):
    """The same frames; a mel that is not finite is silence."""
    settings = flow_target(tiny().flow)
    mel = np.random.default_rng(0).normal(-6, 1, (130, settings.mels)).astype(np.float32)
    hift, rough = MelWaves(settings, tiny(), str(vocoder)), MelWaves(settings, tiny())
    assert (hift.name, rough.name) == ("hift", "griffin_lim")
    assert len(hift(mel)) == len(rough(mel)) == 130 * settings.hop
    assert np.abs(hift(mel)).max() > 0
    assert not rough(np.full_like(mel, np.nan)).any()


@pytest.mark.slow
def test_audio_samples_change_nothing_of_the_training(quick_pretrain, tmp_path):
    """Four steps with and without: the same numbers. A clip before the first step and after each second one.

    The first target is not the decoder's own: its audio is as long all the same.
    """
    changes = [*SMALL, "checkpoint.every=4", "train.steps=4", "tokenizer.mel_scales=((400,160),(1024,256))"]
    silent, logged = tmp_path / "silent", tmp_path / "logged"
    assert quick_pretrain(silent, *changes, config=TOKENIZER).returncode == 0
    done = quick_pretrain(logged, *changes, *LISTEN, config=TOKENIZER)
    assert done.returncode == 0, done.stderr
    assert numbers(silent) == numbers(logged)
    assert "16000 Hz by griffin_lim" in " ".join(done.stdout.split())  # lines are wrapped
    found = events(logged)
    tag = "eval/speech/clip_0"
    assert {key for key in found if key[0].startswith(f"{tag}/from_codes/")} == {
        (f"{tag}/from_codes/griffin_lim", step) for step in (0, 2, 4)
    }
    assert (f"{tag}/from_recorded_mel/griffin_lim", 0) in found
    assert (f"{tag}/recorded_above_from_codes_below", 4) in found
    recorded, _ = wave_of(found[f"{tag}/from_recorded_mel/griffin_lim", 0])
    wave, rate = wave_of(found[f"{tag}/from_codes/griffin_lim", 4])
    assert abs(len(recorded) - len(wave)) < 0.1 * rate
    assert rate == 16000
    assert np.abs(wave).max() > 0


@pytest.mark.slow
def test_flow_matching_samples_go_through_a_vocoder(quick_pretrain, vocoder, tmp_path):
    changes = [*SMALL, *LISTEN, "checkpoint.every=2", "train.steps=2", "checkpoint.init_from="]
    done = quick_pretrain(tmp_path / "run", *changes, f"eval.vocoder={vocoder}", config=FLOW)
    assert done.returncode == 0, done.stderr
    found = events(tmp_path / "run")
    wave, rate = wave_of(found["eval/speech/clip_0/from_codes/hift", 2])
    assert rate == 24000
    assert np.abs(wave).max() > 0
