"""Audio that nobody should train on, and audio that only looks odd: what becomes of it on its way to mel slots."""

import json
from collections import Counter

import numpy as np
import pytest
import soundfile

from baichuan_omni_jax.config import Budgets, DataConfig, SourceConfig, tiny
from baichuan_omni_jax.config.mel_targets import flow_target, reconstruction_targets
from data_pipelines.pipeline import open_pipeline
from tests.helpers.small_media import tone, write_audio

RATE, SLOT = 16000, 256
SQUARE = np.sign(tone(2)) * np.float32(1)
WAVES = {
    "plain": tone(2),
    "clipped": SQUARE,  # every sample at full scale
    "overshooting": 1.5 * SQUARE,  # as lossy codecs do
    "equal": np.full(2 * RATE, 0.25, np.float32),  # no audio, but no silence either
    "long": tone(70),
    "silent": 0 * tone(2),
    "nan": np.where(np.arange(2 * RATE) == 9, np.nan, tone(2)).astype(np.float32),
    "wrong_scale": 32768 * tone(2),
    "no_frame": tone(0.02),  # 320 samples, shorter than one transform
    "no_code": tone(0.05),  # five mel frames; eight make a code
}
NAMES = ("damaged", *WAVES)  # one frame of it cannot be decoded
USED = ("plain", "clipped", "overshooting", "equal", "long", "damaged")


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    """(pipeline, steps of one epoch): every wave a document of its own."""
    root, omni = tmp_path_factory.mktemp("odd"), tiny()
    for name, wave in WAVES.items():
        soundfile.write(root / f"{name}.wav", wave, RATE, subtype="FLOAT")
    data = bytearray(write_audio(root / "damaged.flac", 3, RATE).read_bytes())
    data[len(data) // 2] ^= 0x55
    (root / "damaged.wav").write_bytes(data)  # what decides is the content
    text = '<audio_start_baichuan>{"path": "%s.wav"}<audio_end_baichuan><trainable_start>said<trainable_end>'
    lines = [json.dumps({"id": name, "text": text % name}) for name in NAMES]
    (root / "odd.jsonl").write_text("\n".join(lines))
    config = DataConfig(
        root=str(root),
        mixture=(SourceConfig(name="odd", manifest="odd.jsonl"),),
        rows=1,
        budgets=Budgets(tokens=1200, patches=0, audio_frames=1000, audio_targets=1000, mel_windows=3),
        mel_frames=(SLOT,),
        max_bad_fraction=1.0,
        workers=0,
    )
    targets = reconstruction_targets(((1024, 256), (400, 160)), omni.post_net) | {"flow": flow_target(omni.flow)}
    pipeline = open_pipeline(config, omni, targets=targets)
    return pipeline, list(pipeline.steps(None, epochs=1))


def test_unusable_audio_is_counted_by_cause(steps):
    """Some when it is measured, the rest when it is decoded, whose rows stay as padding; nothing twice."""
    pipeline, steps = steps
    lost = Counter(cause for step in steps for _, cause, _ in step.failed.values())
    assert pipeline.causes() == {"unreadable_media": 2}  # no_frame and no_code give no code
    assert lost == {"silent_audio": 1, "unreadable_media": 2}
    assert pipeline.documents - pipeline.causes().total() - lost.total() == len(USED)


def test_damaged_packets_are_counted_by_document(steps):
    _, steps = steps
    assert {key: count for step in steps for key, count in step.damaged.items()} == {(0, NAMES.index("damaged")): 1}


def test_what_is_left_is_finite_and_the_long_clip_is_cut_in_windows(steps):
    _, steps = steps
    numbers = [int(i) for step in steps for i in np.unique(step.batch["document_ids"]) if i >= 0]
    assert sorted(NAMES[number] for number in numbers) == sorted(USED)
    slots = 0
    for step in steps:
        lengths = step.batch["mel_lengths"]
        slots += (lengths > 0).sum()
        assert (lengths <= SLOT).all()
        for name, values in step.batch.items():
            assert np.isfinite(values).all(), name
        for name in ("scale_0", "scale_1", "flow"):
            assert ((step.batch[f"target_{name}_lengths"] > 0) == (lengths > 0)).all()
    assert slots == len(USED) - 1 + 3  # 30 + 30 + 10 s


def test_full_scale_audio_stays_in_range(steps):
    """Whisper's mel ends 2 below its loudest value, which here lies below 2.5; the target's floor holds."""
    pipeline, steps = steps
    heard = [step.batch["mel"][step.batch["mel_lengths"] > 0] for step in steps]
    assert -1.5 <= min(mel.min(initial=0) for mel in heard) <= max(mel.max(initial=0) for mel in heard) <= 2.5
    floor = np.log(flow_target(pipeline.omni.flow).floor)
    assert min(step.batch["target_flow"].min() for step in steps) >= floor - 1e-5
