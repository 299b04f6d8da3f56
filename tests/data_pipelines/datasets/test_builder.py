"""The builder: what goes into shards and what is skipped, the same whatever builds it, again after changes."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from baichuan_omni_jax.errors import ConfigError
from data_pipelines.datasets.builder.build import build_dataset, gather, main
from data_pipelines.datasets.builder.plan import first_of_same_id, list_sources
from data_pipelines.datasets.shards import open_dataset
from data_pipelines.documents.document import Document
from data_pipelines.documents.measures import load_measures
from data_pipelines.errors import SampleError
from data_pipelines.media.location import Media
from data_pipelines.media.videos import probe_video, read_video
from data_pipelines.tools.commands import make_runner
from tests.helpers.small_media import as_base64, write_audio, write_image, write_video

PICTURE = '<img_start_baichuan>{"local": "%s"}<img_end_baichuan>'
HEARD = '<audio_start_baichuan>{"path": "%s"}<audio_end_baichuan>'
SPOKEN = '<audiogen_start_baichuan>{"path": "%s"}<audiogen_end_baichuan>'
VIDEO = '<video_start_baichuan>{"local": "%s"}<video_end_baichuan>'
BASE64 = '<img_start_baichuan>{"base64": "%s"}<img_end_baichuan>'
FRAMES = "<video_start_baichuan>%s<video_end_baichuan>"
FRAME = '<videoframe_start_omni>{"local": "%s"}<videoframe_end_omni>'


def write_manifest(path: Path, documents: list) -> Path:
    lines = [one if isinstance(one, str) else json.dumps(one, ensure_ascii=False) for one in documents]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """Two manifests with every kind of media, good ones and bad ones."""
    root = tmp_path_factory.mktemp("corpus")
    (root / "media").mkdir()
    write_image(root / "media/a.png", 40, 60)
    write_image(root / "media/b.jpg", 80, 50)
    write_audio(root / "media/s.wav", 1.5)
    write_video(root / "media/v.mp4", 3, audio=3)
    (root / "media/cut.png").write_bytes((root / "media/a.png").read_bytes()[:20])
    (root / "media/empty.wav").write_bytes(b"")
    (root / "secret.png").symlink_to("/etc/hostname")
    data = as_base64(root / "media/b.jpg")
    write_manifest(
        root / "one.jsonl",
        [
            {"id": "text", "type": "text", "text": "猫"},
            {"id": "qa", "type": "qa", "text": PICTURE % "media/a.png" + "What?" + BASE64 % data + "And?"},
            {"id": "asr", "type": "asr", "text": HEARD % "media/s.wav" + "A tone."},
            "",
            {"id": "video", "type": "video QA", "text": VIDEO % "media/v.mp4" + HEARD % "media/v.mp4" + "Gray."},
            {"id": "frames", "type": "odd", "text": FRAMES % (FRAME % "media/a.png" + FRAME % "media/b.jpg")},
            {"id": "tts", "type": "tts", "text": "Say." + SPOKEN % "media/s.wav"},
            {"id": "cut", "text": PICTURE % "media/cut.png"},
            {"id": "gone", "text": PICTURE % "media/none.png"},
            {"id": "out", "text": PICTURE % "../x.png"},
            {"id": "link", "text": PICTURE % "secret.png"},
            {"id": "empty", "text": HEARD % "media/empty.wav"},
            "not JSON",
            {"id": "open", "text": "<img_start_baichuan>"},
            {"id": "base64", "text": BASE64 % "!!!"},
            {"id": "text", "text": "the second of this id"},
        ],
    )
    write_manifest(root / "two.jsonl", [{"id": "qa", "text": "again"}, {"text": "no id"}, {"id": "text", "text": "c"}])
    return root


SKIPPED = {"bad_json": 1, "bad_prompt": 1, "duplicate_id": 3, "missing_file": 1, "outside_root": 1}
SKIPPED |= {"unreadable_media": 4}


def build(root: Path, out: Path, *, workers: int = 0, documents: int = 3, runner: str = "local") -> dict:
    manifests = sorted(root.glob("*.jsonl"))
    return build_dataset(manifests, out, None, documents, 1 << 20, make_runner(runner, workers))


def tree(folder: Path) -> dict[str, bytes]:
    """Every file of a dataset, bookkeeping left out."""
    files = (path for path in folder.rglob("*") if path.is_file() and ".units" not in path.parts)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def built(corpus, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("built") / "dataset"
    build(corpus, out)
    return out


@pytest.fixture
def copies(corpus, tmp_path) -> tuple[Path, Path]:
    """A copy of the corpus and its dataset, to be changed."""
    root = shutil.copytree(corpus, tmp_path / "corpus", symlinks=True)
    build(root, tmp_path / "dataset")
    return root, tmp_path / "dataset"


def test_documents_with_their_media(corpus, built):
    dataset = open_dataset(built)
    documents = {one.id: one for shard in range(len(dataset.shards)) for one in dataset.documents_of(shard)}
    assert list(documents) == ["text", "qa", "asr", "video", "frames", "tts", "two-2"]
    assert len(dataset) == 7
    picture, sound = (corpus / "media/a.png").read_bytes(), (corpus / "media/s.wav").read_bytes()
    qa = documents["qa"]
    assert {name: media.data for name, media in qa.media.items()} == {
        "media/a.png": picture,
        "base64-1": (corpus / "media/b.jpg").read_bytes(),
    }
    assert qa.text == PICTURE % "media/a.png" + "What?" + PICTURE.replace("local", "path") % "base64-1" + "And?"
    assert (qa.type, qa.location) == ("qa", "one.jsonl:2")
    assert {name: media.data for name, media in documents["asr"].media.items()} == {"media/s.wav": sound}
    assert list(documents["video"].media) == ["media/v.mp4"]
    assert list(documents["frames"].media) == ["media/a.png", "media/b.jpg"]


def test_what_the_description_tells(built):
    description = json.loads((built / "dataset.json").read_text())
    assert description["schema"] == 1
    assert description["skipped"] == SKIPPED
    assert (description["pictures"], description["videos"], description["sounds"]) == (4, 1, 3)
    assert description["pixels"] == 2 * 40 * 60 + 2 * 80 * 50
    assert description["audio_hours"] == pytest.approx((2 * 1.5 + 3) / 3600, abs=1e-4)
    assert description["video_hours"] == pytest.approx(3 / 3600, abs=1e-4)
    assert description["types"]["asr"]["documents"] == 1
    assert description["unknown_types"] == ["", "odd"]
    assert [shard["file"] for shard in description["shards"]] == [
        "one-00000.array_record",
        "one-00001.array_record",
        "two-00000.array_record",
    ]
    assert sum(shard["documents"] for shard in description["shards"]) == description["documents"] == 7


def test_what_is_skipped_is_named(built):
    skipped = [json.loads(line) for line in (built / "skipped.jsonl").read_text().splitlines()]
    assert {one["id"]: one["cause"] for one in skipped if one["where"].startswith("one")} == {
        "cut": "unreadable_media",
        "gone": "missing_file",
        "out": "outside_root",
        "link": "unreadable_media",  # links are trusted, but a picture it is not
        "empty": "unreadable_media",
        None: "bad_json",
        "open": "bad_prompt",
        "base64": "unreadable_media",
        "text": "duplicate_id",
    }
    assert [(one["where"], one["message"]) for one in skipped if one["cause"] == "duplicate_id"] == [
        ("one.jsonl:16", "one.jsonl:16 has the id 'text' of one.jsonl:1"),
        ("two.jsonl:1", "two.jsonl:1 has the id 'qa' of one.jsonl:2"),
        ("two.jsonl:3", "two.jsonl:3 has the id 'text' of one.jsonl:1"),
    ]


def test_the_same_on_any_number_of_processes(corpus, built, tmp_path):
    build(corpus, tmp_path / "out", workers=2)
    assert tree(tmp_path / "out") == tree(built)


def test_the_same_on_beam(corpus, built, tmp_path, monkeypatch):
    pytest.importorskip("apache_beam", reason="needs the extra beam")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[3]))
    build(corpus, tmp_path / "out", runner="beam", workers=2)
    assert tree(tmp_path / "out") == tree(built)


def test_a_build_that_is_whole_stays(copies):
    root, out = copies
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.array_record")}
    description = build(root, out)
    assert description == json.loads((out / "dataset.json").read_text())
    assert {path: path.stat().st_mtime_ns for path in out.glob("*.array_record")} == before


@pytest.mark.parametrize(
    ("change", "redone"),
    [
        (lambda root: (root / "two.jsonl").write_text('{"id": "new", "text": "new"}\n'), {"two-00000"}),
        (lambda root: write_image(root / "media/b.jpg", 90, 90), {"one-00001"}),
        (lambda root: shutil.copy(root / "media/a.png", root / "media/none.png"), {"one-00002"}),
    ],
    ids=["manifest", "media", "missing media"],
)
def test_what_changed_is_built_again(copies, change, redone, tmp_path):
    root, out = copies
    before = {path.stem: path.stat().st_mtime_ns for path in (out / "parts").glob("*.npz")}
    change(root)
    build(root, out)
    after = {path.stem: path.stat().st_mtime_ns for path in (out / "parts").glob("*.npz")}
    assert {name for name in after if after[name] != before.get(name)} == redone
    build(root, tmp_path / "anew")
    assert tree(out) == tree(tmp_path / "anew")


def test_shards_that_are_no_more_go(copies, tmp_path):
    root, out = copies
    (root / "two.jsonl").unlink()
    build(root, out, documents=100)
    build(root, tmp_path / "anew", documents=100)
    assert tree(out) == tree(tmp_path / "anew")
    assert [path.name for path in out.glob("*.array_record")] == ["one-00000.array_record"]


def test_other_things_are_left_alone(corpus, tmp_path, capsys):
    (tmp_path / "mine").write_text("mine")
    arguments = [str(corpus / "one.jsonl"), "--workers", "0", "--out"]
    assert main([*arguments, str(tmp_path)]) == 2
    assert "is not empty and holds 'mine', which this program did not write" in capsys.readouterr().err
    assert main([*arguments, str(tmp_path / "mine")]) == 2
    assert os.listdir(tmp_path) == ["mine"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.jsonl"], r"none.jsonl cannot be read: No such file"),
        (["one.jsonl", "one.jsonl"], "one.jsonl is given twice"),
        (["one.jsonl", "--shard-bytes", "many"], "--shard-bytes many is no number of bytes"),
        (["one.jsonl", "--shard-documents", "0"], "at least one document"),
        (["one.jsonl", "--root", "one.jsonl"], "--root one.jsonl is no folder"),
    ],
)
def test_arguments_that_cannot_be_used(corpus, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(corpus)
    assert main([*arguments, "--workers", "0", "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("manifest", "out", "message"),
    [
        ("", "out", "m.jsonl: no document"),
        ('{"text": 1}', "out", "no document of m.jsonl can be used"),
        ('{"text": "a"}', "m.jsonl/out", "m.jsonl/out/.units: Not a directory"),
        (None, "out", "m.jsonl cannot be read: Is a directory"),
    ],
)
def test_nothing_to_build_or_no_place_for_it(tmp_path, capsys, manifest, out, message):
    path = tmp_path / "m.jsonl"
    path.mkdir() if manifest is None else path.write_text(manifest)
    assert main([str(path), "--workers", "0", "--out", str(tmp_path / out)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_root_and_names(corpus, tmp_path):
    """Manifests elsewhere with media below --root; the same file name in two folders."""
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        write_manifest(tmp_path / name / "m.jsonl", [{"text": PICTURE % "media/a.png"}])
    manifests = [tmp_path / "x/m.jsonl", tmp_path / "y/m.jsonl"]
    description = build_dataset(manifests, tmp_path / "out", corpus, 10, 1 << 20, make_runner("local", 0))
    assert (description["documents"], description["manifests"]) == (2, ["x/m.jsonl", "y/m.jsonl"])
    dataset = open_dataset(tmp_path / "out")
    assert [dataset.document(shard, 0).id for shard in range(2)] == ["x/m-1", "y/m-1"]
    slashes = [tmp_path / "a/b.jsonl", tmp_path / "a-b.jsonl"]
    assert [source.shards for source in list_sources(slashes, None)] == ["a-b", "a-b~2"]


def test_shards_are_cut_by_bytes(corpus, tmp_path):
    """Random pixels: a picture is larger than a shard, and so has one of its own."""
    documents = [{"text": PICTURE % "media/a.png"} for _ in range(3)]
    manifest = write_manifest(tmp_path / "m.jsonl", documents)
    description = build_dataset([manifest], tmp_path / "out", corpus, 10, 5000, make_runner("local", 0))
    assert [shard["documents"] for shard in description["shards"]] == [1, 1, 1]


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2)), max_size=30))
def test_the_first_of_each_id_stays(ids):
    """(0, 0) stands for no id, which nothing is the same as."""
    double, first = first_of_same_id(np.array(ids, np.uint64).reshape(-1, 2))
    seen: dict[tuple[int, int], int] = {}
    for number, one in enumerate(ids):
        expected = seen.setdefault(one, number) if any(one) else number
        assert (first[number], double[number]) == (expected, expected != number)


@pytest.mark.parametrize("size", [0, 100, -100])
def test_a_damaged_table_of_measures(built, tmp_path, size):
    (tmp_path / "a.npz").write_bytes((built / "parts/one-00000.npz").read_bytes()[:size])
    with pytest.raises(ValueError, match=r"damaged|pickle"):
        load_measures(tmp_path / "a.npz")


def test_media_too_large_for_a_record(corpus, monkeypatch):
    monkeypatch.setattr("data_pipelines.datasets.builder.build.MAX_MEDIA_BYTES", 10_000)
    document = Document("d", "", PICTURE % "media/a.png" + HEARD % "media/s.wav", "m:1", corpus)
    with pytest.raises(SampleError, match=r"more than 10000 bytes in all, with media/s\.wav") as error:
        gather(document)
    assert error.value.cause == "too_big_media"


def test_base64_of_the_same_bytes_and_taken_names(corpus):
    data = as_base64(corpus / "media/a.png")
    shutil.copy(corpus / "media/b.jpg", corpus / "base64-1")
    whole, _ = gather(Document("d", "", PICTURE % "base64-1" + BASE64 % data + BASE64 % data, "m:1", corpus))
    assert list(whole.media) == ["base64-1", "base64-2"]
    assert whole.text.count('"base64-2"') == 2
    assert whole.media["base64-2"].data == (corpus / "media/a.png").read_bytes()


def test_a_manifest_that_changes_while_it_is_built(copies):
    root, out = copies

    def runner(job, units):
        if job.title == "building":
            with (root / "one.jsonl").open("a") as file:
                file.write("\n")
        yield from make_runner("local", 0)(job, units)

    write_manifest(root / "two.jsonl", [{"id": "new", "text": "new"}])
    (root / "one.jsonl").write_text('{"id": "a", "text": "a"}\n')
    with pytest.raises(ConfigError, match=r"one\.jsonl changed while it was being built: start again"):
        build_dataset([root / "one.jsonl", root / "two.jsonl"], out, None, 3, 1 << 20, runner)
    assert not (out / "dataset.json").exists()


def test_frames_in_place_of_videos(corpus, built, tmp_path):
    """What a model of one frame a second sees is what the video shows; what is heard is left as it is."""
    out = tmp_path / "frames"
    assert main([*map(str, sorted(corpus.glob("*.jsonl"))), "--out", str(out), "--frames", "1fps"]) == 0
    description = json.loads((out / "dataset.json").read_text())
    assert description["frames"] == "1fps"
    assert description["video_hours"] == json.loads((built / "dataset.json").read_text())["video_hours"]
    (video,) = [one for shard in (0,) for one in open_dataset(out).documents_of(shard) if one.id == "video"]
    assert list(video.media) == ["media/v.mp4.frames.mov", "media/v.mp4"]
    assert video.text == VIDEO.replace("local", "path") % "media/v.mp4.frames.mov" + HEARD % "media/v.mp4" + "Gray."
    for rate, most in ((1.0, 32), (1.0, 2)):
        whole = Media("v.mp4", corpus / "media/v.mp4")
        expected, given = read_video(whole, rate, most), read_video(video.media["media/v.mp4.frames.mov"], rate, most)
        assert expected[0].times == given[0].times
        for one, other in zip(expected[1], given[1], strict=True):
            np.testing.assert_allclose(one.astype(int), other.astype(int), atol=3)


def test_other_frames_are_another_data_set(corpus, built, tmp_path):
    for spec, count in (("", 0), ("1fps", 1), ("1fps:2", 2)):
        name = tmp_path / "out"
        main([str(corpus / "one.jsonl"), "--out", str(name), *(["--frames", spec] if spec else [])])
        assert json.loads((name / "dataset.json").read_text()).get("frames", "") == spec
        if count == 2:
            video = next(one for one in open_dataset(name).documents_of(0) if one.id == "video")
            assert probe_video(video.media["media/v.mp4.frames.mov"], 1.0, 2).times == (0.0, 2.0)


@pytest.mark.parametrize("spec", ["1", "fps", "0fps", "1fps:0", "1fps:x", "-1fps"])
def test_a_rate_of_frames_that_is_none_is_refused(corpus, tmp_path, spec, capsys):
    assert main([str(corpus / "one.jsonl"), "--out", str(tmp_path / "out"), f"--frames={spec}"]) == 2
    assert f"--frames {spec} is no rate" in capsys.readouterr().err
