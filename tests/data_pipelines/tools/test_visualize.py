"""The picture of packed rows: what it is made of, that it is written, and refusals."""

import json
import sys

import numpy as np
import pytest
from PIL import Image

from baichuan_omni_jax.config import tiny
from baichuan_omni_jax.errors import ConfigError
from data_pipelines.datasets.builder import build
from data_pipelines.media.features import patchify, resize_image
from data_pipelines.media.images import decode_image
from data_pipelines.synthesis import __main__ as synthesis
from data_pipelines.text import fonts as lettering
from data_pipelines.text.fonts import Lettering
from data_pipelines.tools import visualize
from data_pipelines.tools.row_views import (
    SlotContent,
    SlotLoss,
    find_document,
    reassemble,
    richest_document,
    view_document,
    view_rows,
)
from tests.helpers.small_media import media, noise_image

OMNI = tiny()


def run(*arguments):
    return visualize.main([str(argument) for argument in arguments])


def test_a_figure_is_drawn(sample_root, tmp_path, capsys):
    out = tmp_path / "row.png"
    assert run(sample_root / "omni.jsonl", "--out", out, "--rows", 2, "--length", 512) == 0
    with Image.open(out) as image:
        assert image.width == 1500
        assert image.height > 800
        colors = image.convert("RGB").getcolors(1 << 24)
    assert len(colors) > 1000, "photographs and mels have many"
    printed = capsys.readouterr().out
    assert "row 1: " in printed
    assert "tokens" in printed
    assert "row.png: 2 rows and document " in printed


def test_documents_of_a_built_dataset_are_drawn(tmp_path, capsys):
    """Made by synthesis, built into shards, drawn from them."""
    tables = tmp_path / "tables.jsonl"
    table = {"id": "rain", "type": "table", "text": "city,May,June\nOslo,53,68\nRome,34,27"}
    tables.write_text(json.dumps(table) + "\n" + json.dumps({"id": "words", "text": "Set on a page. Twice."}) + "\n")
    made = ["pages", str(tables), "--out", str(tmp_path / "pages"), "--widths", "448", "--workers", "0"]
    assert synthesis.main(made) == 0
    built = [str(tmp_path / "pages" / "pages.jsonl"), "--out", str(tmp_path / "built"), "--workers", "0"]
    assert build.main(built) == 0
    for name in ("rain-pages", "words-pages-3"):
        assert run(tmp_path / "built", "--document", name, "--rows", 1, "--out", tmp_path / f"{name}.png") == 0
        assert f"document {name} (" in capsys.readouterr().out
        with Image.open(tmp_path / f"{name}.png") as image:
            assert image.height > 500


def test_contents_and_losses_are_those_of_the_batch(sample_pipeline, sample_codes):
    rows, failed = view_rows(sample_pipeline, 4)
    assert not failed
    steps = sample_pipeline.steps(sample_codes)
    batches = [next(steps).batch, next(steps).batch]
    for number, row in enumerate(rows):
        batch = {name: values[number % 2] for name, values in batches[number // 2].items()}
        length = len(row.contents)
        assert (row.contents == SlotContent.PADDING).sum() == (batch["segment_ids"] == 0).sum()
        assert (
            np.isin(row.contents, [SlotContent.IMAGE, SlotContent.FRAME]).sum()
            == (batch["visual_index"] < length).sum()
        )
        assert (
            np.isin(row.contents, [SlotContent.AUDIO, SlotContent.SPEECH]).sum()
            == (batch["audio_index"] < length).sum()
        )
        assert (row.losses == SlotLoss.AUDIO).sum() == (batch["audio_target_index"] < length).sum()
        np.testing.assert_array_equal(row.losses == SlotLoss.TEXT, batch["text_weights"] > 0)
        assert row.fill["tokens"] == ((batch["segment_ids"] > 0).sum(), length)
        assert row.fill["text_targets"] == ((batch["text_weights"] > 0).sum(), length)
        assert row.segments[-1].stop == (batch["segment_ids"] > 0).sum()


def test_one_document_of_all_modalities(sample_pipeline):
    document = find_document(sample_pipeline, "mixed-0048")
    view = view_document(document, sample_pipeline.processor)
    assert set(view.row.contents.tolist()) == {
        SlotContent.TEXT,
        SlotContent.MARK,
        SlotContent.IMAGE,
        SlotContent.FRAME,
        SlotContent.AUDIO,
        SlotContent.SPEECH,
    }
    assert [p.kind for p in view.images] == [SlotContent.IMAGE] + [SlotContent.FRAME] * (len(view.images) - 1)
    assert [m.kind for m in view.mels] == [SlotContent.AUDIO, SlotContent.SPEECH]
    spoken = view.mels[1]
    assert spoken.mel.shape == (OMNI.audio.num_mel_bins, int(spoken.seconds * 100) + 1)
    assert (view.row.contents == SlotContent.SPEECH).sum() == spoken.code_frames
    assert view.row.fill["audio_targets"] == (spoken.code_frames + 1, spoken.code_frames + 1)
    first = view.images[0]
    name = view.elements[1].reference.path
    original = decode_image(media(document.media.folder / name))
    np.testing.assert_array_equal(first.pixels, resize_image(original, *first.pixels.shape[:2]))


def test_the_richest_document_of_a_row(sample_pipeline):
    row = view_rows(sample_pipeline, 1)[0][0]
    chosen = richest_document(row)
    kinds = {s.document.id: len(set(row.contents[s.start : s.stop].tolist())) for s in row.segments}
    assert kinds[chosen.id] == max(kinds.values())


def test_a_wrong_patch_order_is_seen():
    pixels = noise_image(56, 84)
    patches, grid = patchify(pixels)
    np.testing.assert_array_equal(reassemble(patches, grid, 14), pixels)
    assert (reassemble(patches, np.roll(grid, 1, axis=0), 14) != pixels).any()


def test_characters_without_a_font_are_counted(monkeypatch):
    monkeypatch.setattr(lettering, "CHINESE_FAMILIES", ())
    letters = Lettering()
    assert letters.drawable("the cat $x$\n") == "the cat $x$\n"
    assert not letters.replaced
    assert letters.drawable("a 猫和狗。 b") == "a [4 characters] b"
    assert letters.replaced
    assert letters.shorten("one\ntwo " * 50, 40) == ("one two " * 50)[:36] + " ..."


@pytest.mark.parametrize(
    ("inches", "label"),
    [(5.0, "video_qa-0007"), (0.55, "video_\nqa-0007"), (0.2, "qa"), (0.05, "")],
)
def test_labels_fit_their_boxes(inches, label):
    assert Lettering().fit("video_qa-0007", "qa", inches, size=7.5) == label


def test_bad_documents_are_counted_in_the_figure(tmp_path, capsys):
    lines = [
        "{",
        json.dumps({"text": "no loss<trainable_start><trainable_end>"}),
        json.dumps({"text": "<trainable_start>猫 $x_1<trainable_end>"}),
    ]
    (tmp_path / "m.jsonl").write_text("\n".join(lines), encoding="utf-8")
    assert run(tmp_path / "m.jsonl", "--out", tmp_path / "row.svg", "--rows", 1, "--length", 32) == 0
    drawn = (tmp_path / "row.svg").read_text(encoding="utf-8")
    assert "2 of 3 documents are skipped: 1 bad_json, 1 no_loss" in drawn
    assert "$x_1" in drawn


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.jsonl"], "none.jsonl cannot be read: No such file"),
        (["text.jsonl", "--document", "zz"], "no document has the id 'zz' in text.jsonl"),
        (["text.jsonl", "--rows", "0"], "--rows 0 and --length 1024 must be at least 1"),
        (["image.jsonl", "--length", "4"], "has no usable document: skipped "),
        (["text.jsonl", "--model", "zz"], "model 'zz' is neither a variant"),
        (["text.jsonl", "--tokenizer", "zz.json"], "tokenizer zz.json cannot be read"),
        (["text.jsonl", "--out", "row.zz"], "Format 'zz' is not supported"),
        (["text.jsonl", "--out", "nowhere/row.png"], "the folder nowhere does not exist"),
        (["text.jsonl", "../other/text.jsonl"], "manifests must lie in one folder"),
    ],
)
def test_refusals(sample_root, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    manifests = [sample_root / name if name.endswith(".jsonl") else name for name in arguments]
    assert run("--out", "row.png", *manifests) == 2
    printed = capsys.readouterr().err.strip().splitlines()[-1]
    assert printed.startswith("error: ")
    assert message in printed
    assert not list(tmp_path.iterdir())


def test_without_matplotlib(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert run(tmp_path / "m.jsonl", "--out", tmp_path / "row.png") == 2
    assert capsys.readouterr().err == "error: drawing needs matplotlib: pip install baichuan_omni_jax[show]\n"


def test_an_unusable_document_is_named(sample_pipeline, tmp_path):
    document = find_document(sample_pipeline, "asr-0035")
    with pytest.raises(ConfigError, match=r"document asr-0035 \(audio\.jsonl:\d+\) cannot be used: .*does not exist"):
        view_document(type(document)(**{**vars(document), "media": tmp_path}), sample_pipeline.processor)
