"""The sample data set: what it holds, that it is real and complete, and that a folder of other things is left alone."""

import json
import re
import wave
from collections import Counter

import av
import numpy as np
import pytest
from PIL import Image

from data_pipelines.documents.prompt_writing import plain_text
from data_pipelines.sample import __main__ as build
from data_pipelines.sample import documents as documents_module
from data_pipelines.sample.__main__ import HELD_OUT_SOURCES, SAMPLE_SOURCES, build_sample, main
from data_pipelines.sample.documents import plan_documents
from data_pipelines.sample.photographs import Crop, absent_parts, dominant_color, visible_parts
from data_pipelines.text.spoken_text import split_text

MEDIA = re.compile(r"<(img|video|audio|audiogen)_start_baichuan>(\{.*?\})<\1_end_baichuan>")


def media_of(document):
    """(kind, path) of every media tag, in order."""
    return [(kind, next(iter(json.loads(body).values()))) for kind, body in MEDIA.findall(document["text"])]


@pytest.fixture(scope="module")
def documents(sample_dir):
    lines = [line for _, manifest in SAMPLE_SOURCES for line in (sample_dir / manifest).read_text("utf-8").splitlines()]
    return [json.loads(line) for line in lines]


def test_counts_agree_with_the_summary(sample_dir, documents):
    summary = json.loads((sample_dir / "sample.json").read_text())
    assert summary["documents"] == len(documents) >= 400
    assert summary["by_type"] == Counter(document["type"] for document in documents)
    assert summary["text_characters"] == sum(len(plain_text(document["text"])) for document in documents) >= 60_000
    assert summary["audio_seconds"] > 600
    assert len({document["id"] for document in documents}) == len(documents)
    assert all(set(document) == {"id", "type", "text"} for document in documents)
    assert len({document["text"] for document in documents}) > 0.98 * len(documents)


def test_every_subset_of_modalities_occurs(documents):
    subsets = Counter(frozenset(kind for kind, _ in media_of(document)) for document in documents)
    assert len(subsets) == 16
    assert min(subsets.values()) >= 6


def test_every_file_is_referenced_and_opens(sample_dir, documents):
    for _, manifest in HELD_OUT_SOURCES:
        documents = documents + [json.loads(line) for line in (sample_dir / manifest).read_text("utf-8").splitlines()]
    named = {path for document in documents for _, path in media_of(document)}
    folders = ("images", "speech", "video")
    made = {path.relative_to(sample_dir).as_posix() for name in folders for path in sample_dir.glob(f"{name}/*")}
    assert named <= made
    # A video may be left out by chance, an image or a clip of speech never.
    assert all(path.startswith("video/") for path in made - named)
    for path in made:
        check_file(sample_dir / path)


def check_file(path):
    if path.suffix in (".jpg", ".png"):
        with Image.open(path) as image:
            image.load()
            assert image.format == {".jpg": "JPEG", ".png": "PNG"}[path.suffix]
            assert 56 <= min(image.size) <= max(image.size) <= 300
    elif path.suffix == ".wav":
        with wave.open(str(path)) as clip:
            samples = np.frombuffer(clip.readframes(clip.getnframes()), np.int16)
            assert (clip.getnchannels(), clip.getsampwidth(), clip.getframerate()) == (1, 2, 22050)
        assert 1 <= len(samples) / 22050 <= 6, path
        assert np.abs(samples).max() > 3000, f"{path} is silent"
    else:
        check_video(path)


def check_video(path):
    with av.open(str(path)) as video:
        images = [frame.to_ndarray(format="gray") for frame in video.decode(video=0)]
    with av.open(str(path)) as video:
        audio = np.concatenate([frame.to_ndarray().ravel() for frame in video.decode(audio=0)])
        rate = video.streams.audio[0].rate
    assert 16 <= len(images) <= 48
    assert abs(len(images) / 8 - len(audio) / rate) < 0.3
    assert np.abs(audio).max() > 0.1
    assert np.abs(images[0].astype(int) - images[-1]).mean() > 5, f"{path} does not move"


def test_every_document_is_well_formed_and_carries_loss(documents):
    for document in documents:
        text = document["text"]
        marks = re.findall(r"<trainable_(?:start|end)>", text)
        assert marks
        assert marks == ["<trainable_start>", "<trainable_end>"] * (len(marks) // 2), document["id"]
        outside = re.sub(r"<trainable_start>.*?<trainable_end>", "", text, flags=re.DOTALL)
        assert "audiogen" not in outside, "speech to be generated is to be learned"
        inside = "".join(re.findall(r"<trainable_start>(.*?)<trainable_end>", text, flags=re.DOTALL))
        assert "<audio_start" not in inside, "speech that is heard carries no loss"
        assert "<img_start" not in inside
        assert not re.search(r"[{}]|<(?!B_SYS|C_Q|C_A|trainable|audiotext_start)", MEDIA.sub("", text)), document["id"]


def test_spoken_answers_have_the_released_form(documents):
    """The mark before each answer, the voice named unless there is another system prompt; else neither."""
    aloud = 0
    for document in documents:
        text = document["text"]
        answers = re.findall(r"<C_A><trainable_start>(.*?)<trainable_end>", text, flags=re.DOTALL)
        if not any("<audiogen_start_baichuan>" in answer for answer in answers):
            assert "<audiotext_start_baichuan>" not in text
            assert "【邻家女声】" not in text
            continue
        aloud += 1
        assert text.count("<audiotext_start_baichuan><C_A>") == text.count("<C_A>") == len(answers)
        systems = ("请用【邻家女声】这个声音回答问题。", *documents_module.SYSTEM.values())
        assert any(text.startswith(f"<B_SYS>{system}<C_Q>") for system in systems)
        for answer in answers:
            # Pieces as the engine would end them, each before its speech.
            pieces = re.split(r"<audiogen_start_baichuan>.*?<audiogen_end_baichuan>", answer)
            assert pieces.pop() == ""
            assert pieces == split_text("".join(pieces))
    assert aloud >= 24


def test_the_order_of_interleaved_speech(documents):
    for document in documents:
        kinds = [kind for kind, _ in media_of(document)]
        if document["type"] == "itts":
            assert kinds == ["audiogen", "audiogen"]
            assert not document["text"].startswith("<")
        if document["type"] == "intlv":
            assert set(kinds) == {"audio"}
            assert document["text"].startswith("<audio_start")


def test_manifests_depend_on_the_seed_alone(sample_dir):
    (plan, same), (_, other) = plan_documents(0), plan_documents(1)
    assert plan_documents(0)[0] == plan
    for source, manifest in SAMPLE_SOURCES:
        lines = [json.loads(line) for line in (sample_dir / manifest).read_text("utf-8").splitlines()]
        assert lines == same[source]
        assert lines != other[source]


def test_what_is_said_of_a_crop_is_true():
    whole = Crop("china", (0, 0, 640, 427), (300, 200))
    assert visible_parts(whole)[0] == "tower"
    assert "flower" in absent_parts(whole)
    heart = Crop("flower", (250, 160, 360, 270), (112, 112))
    assert {"flower", "heart"} == set(visible_parts(heart))
    assert dominant_color(heart) in ("orange", "red")
    assert {"bud", "tower"} <= set(absent_parts(heart))
    corner = Crop("flower", (0, 0, 120, 120), (84, 84))
    assert visible_parts(corner) == ["leaves"]


def test_a_complete_folder_is_found_and_not_built_again(sample_dir, monkeypatch):
    monkeypatch.setattr(build, "plan_documents", lambda seed: pytest.fail("built again"))
    assert build_sample(sample_dir, progress=False) == sample_dir.resolve()


def test_a_folder_with_other_things_is_refused(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("years of work")
    assert main([str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "thesis.txt" in message
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_half_built_folder_is_built_anew(tmp_path, monkeypatch, capsys):
    recipes = {source: [] for source, _ in SAMPLE_SOURCES}
    monkeypatch.setattr("data_pipelines.sample.documents.RECIPES", recipes)
    monkeypatch.setattr("data_pipelines.sample.documents.HELD_OUT", {name: [] for name in documents_module.HELD_OUT})
    monkeypatch.setattr("data_pipelines.sample.documents.VIDEOS", 1)
    monkeypatch.setattr("data_pipelines.sample.documents.HELD_OUT_VIDEOS", 0)
    out = tmp_path / "data"
    (out / "images").mkdir(parents=True)
    (out / "images" / "left_over.jpg").write_bytes(b"")
    (tmp_path / "data.partial" / "speech").mkdir(parents=True)
    assert main([str(out)]) == 0
    assert "0 documents" in capsys.readouterr().out
    assert not (tmp_path / "data.partial").exists()
    assert sorted(path.name for path in out.glob("*/*.*") if path.suffix != ".jsonl") == ["right_000.mp4"]
