"""Thousands of damaged media files: each is used or refused with a cause; no crash, no hang, memory stays bounded."""

import json
import struct
import sys
import zlib
from collections import Counter
from pathlib import Path

import pytest

from tests.helpers.faults.media_files import kind_of, originals
from tests.helpers.faults.media_worker import decode_all
from tests.helpers.faults.mutations import mutants
from tests.helpers.proofs import sized

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import media_headers

CAUSES = {"unreadable_media", "too_big_media", "silent_audio", "changed"}
SECONDS = 300  # after which a file hangs its reader; the slowest took well under one
PEAK_MIB = 500  # of the process that decodes; one of 24,000 files took 298


@pytest.fixture(scope="module")
def files(sample_dir):
    return originals(sample_dir / "speech", sample_dir / "video")


def write(folder, named):
    folder.mkdir()
    for name, data in named:
        (folder / name).write_bytes(data)
    return sorted(folder.iterdir())


def check(outcomes, count):
    """Every file ended as it may; returns how many ended with each cause."""
    assert len(outcomes) == count
    bugs = [f"{outcome.name} {outcome.bug}" for outcome in outcomes if outcome.bug]
    assert not bugs, "\n".join(bugs)
    for outcome in outcomes:
        assert outcome.cause in CAUSES | {""}, outcome
        assert not outcome.cause or outcome.name in outcome.message
    assert max(outcome.seconds for outcome in outcomes) < SECONDS
    assert max(outcome.peak_mib for outcome in outcomes) < PEAK_MIB
    return Counter(outcome.cause for outcome in outcomes)


def test_undamaged_files_can_be_used(files, tmp_path):
    outcomes = decode_all(write(tmp_path / "media", files.items()), SECONDS)
    assert check(outcomes, len(files)) == {"": len(files)}, [o for o in outcomes if o.cause]
    assert Counter(kind_of(name) for name in files) >= Counter(image=12, audio=6, video=5)


@pytest.mark.parametrize("count", [60, pytest.param(sized(600, 6000), marks=pytest.mark.slow)])
def test_damaged_files_are_used_or_refused(files, tmp_path, count):
    found = check(decode_all(write(tmp_path / "media", mutants(files, count, seed=1)), SECONDS), count)
    assert 0.2 * count < found["unreadable_media"] < 0.9 * count


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc fills what it allocates")
@pytest.mark.parametrize("count", [60, pytest.param(sized(400, 4000), marks=pytest.mark.slow)])
def test_nothing_is_returned_that_was_not_decoded(files, tmp_path, monkeypatch, count):
    """Whole and damaged files decode alike whatever byte glibc fills the memory with that is handed to the decoders.

    Half of the damaged ones are every container of audio with headers that lie.
    """
    named = [*files.items(), *mutants(files, count, seed=3)]
    for number, (kind, data) in enumerate(media_headers.mutants(count, seed=4)):
        # The last ending only tells the worker what to read it as.
        named.append((f"{number:05d}-lies-{kind.name}{'.mp4' if kind.film else '.wav'}", data))
    paths, found = write(tmp_path / "media", named), []
    for byte in (85, 170):
        monkeypatch.setenv("MALLOC_PERTURB_", str(byte))
        outcomes = decode_all(paths, SECONDS)
        check(outcomes, len(paths))
        found.append([(outcome.name, outcome.cause, outcome.digest) for outcome in outcomes])
    assert sum(bool(digest) for _, _, digest in found[0]) > len(files)
    for one, other in zip(*found, strict=True):
        assert one == other


def test_bombs_are_refused_before_they_are_decoded(files, tmp_path):
    """Small files whose headers announce 900 megapixels, four gigapixels, days of audio."""
    png, gif, wav, flac = (files[name] for name in ("a.png", "a.gif", "a.wav", "a.flac"))
    header = b"IHDR" + struct.pack(">II", 30000, 30000) + png[24:29]
    samples = 200_000_000_000
    bombs = {
        "a.png": png[:12] + header + struct.pack(">I", zlib.crc32(header)) + png[33:],
        "a.gif": gif[:6] + b"\xff\xff\xff\xff" + gif[10:],
        "a.bmp": files["a.bmp"][:18] + struct.pack("<ii", 50000, 50000) + files["a.bmp"][26:],
        "rate.wav": wav[:24] + struct.pack("<I", 2_000_000) + wav[28:],
        "channels.wav": wav[:22] + struct.pack("<H", 1000) + wav[24:32] + struct.pack("<H", 2000) + wav[34:],
        "a.flac": flac[:21]
        + bytes([flac[21] & 0xF0 | samples >> 32])
        + struct.pack(">I", samples & 2**32 - 1)
        + flac[26:],
    }
    outcomes = decode_all(write(tmp_path / "media", bombs.items()), SECONDS)
    assert check(outcomes, len(bombs)) == {"too_big_media": len(bombs)}, outcomes
    assert max(outcome.peak_mib for outcome in outcomes) < 150


TAGS = {
    "image": '<img_start_baichuan>{"path": "%s"}<img_end_baichuan>',
    "audio": '<audio_start_baichuan>{"path": "%s"}<audio_end_baichuan>',
    "video": '<video_start_baichuan>{"path": "%s"}<video_end_baichuan>',
}


@pytest.mark.slow
def test_every_damaged_file_is_in_a_row_or_counted(files, tmp_path):
    """Through index, plan and two workers, which decode images, frames and mels."""
    from baichuan_omni_jax.config import Budgets, DataConfig, SourceConfig, tiny
    from data_pipelines.pipeline import open_pipeline

    paths = write(tmp_path / "media", mutants(files, sized(200, 1000), seed=2))
    documents = [
        {"id": path.name, "text": TAGS[kind_of(path.name)] % path.name + "<trainable_start>x<trainable_end>"}
        for path in paths
    ]
    manifest = tmp_path / "media" / "all.jsonl"
    manifest.write_text("\n".join(json.dumps(document) for document in documents))
    config = DataConfig(
        root=str(tmp_path / "media"),
        mixture=(SourceConfig(name="all", manifest="all.jsonl"),),
        rows=2,
        budgets=Budgets(tokens=4096, patches=16384, audio_frames=2048, audio_targets=16, mel_windows=64),
        workers=2,
        max_bad_fraction=1.0,
        mel_frames=(400, 3000),
    )
    pipeline = open_pipeline(config, tiny())
    kept, lost = 0, Counter()
    for step in pipeline.steps(None, epochs=1):
        firsts = (step.batch["segment_ids"] > 0) & (step.batch["positions"] == 0)
        kept += int(firsts.sum())
        lost.update(cause for _, cause, _ in step.failed.values())
    skipped = pipeline.causes()
    assert kept + lost.total() + skipped.total() == len(paths)
    assert set(lost) | set(skipped) <= CAUSES | {"too_long"}
    assert kept > len(paths) // 10
    assert lost["unreadable_media"] > len(paths) // 100
    assert skipped["unreadable_media"] > len(paths) // 10
