"""What is printed and drawn of documents and media, from manifests and from datasets."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from baichuan_omni_jax.cli.main import main as omni_main
from data_pipelines.datasets.builder.build import build_dataset
from data_pipelines.documents.measures import DocumentMeasure, MediaMeasure, collect, join
from data_pipelines.tokenizers.tokenizer import train_tokenizer
from data_pipelines.tools.commands import make_runner
from data_pipelines.tools.stats import load, main, quantities
from tests.helpers.small_media import write_audio, write_image, write_video

PICTURE = '<img_start_baichuan>{"local": "a.png"}<img_end_baichuan>'
SPOKEN = '<audiogen_start_baichuan>{"path": "s.wav"}<audiogen_end_baichuan>'
VIDEO = '<video_start_baichuan>{"local": "v.mp4"}<video_end_baichuan>'


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("corpus")
    write_image(root / "a.png", 90, 40)
    write_audio(root / "s.wav", 1.5)
    write_video(root / "v.mp4", 2)
    documents = [
        {"type": "text", "text": "four"},
        {"type": "caption", "text": PICTURE + PICTURE + "two"},
        {"type": "tts", "text": "say" + SPOKEN},
        {"type": "caption", "text": VIDEO},
        {"type": "caption", "text": '<img_start_baichuan>{"local": "gone.png"}<img_end_baichuan>'},
    ]
    (root / "m.jsonl").write_text("".join(json.dumps(one) + "\n" for one in documents))
    build_dataset([root / "m.jsonl"], root / "out", None, 2, 1 << 20, make_runner("local", 0))
    return root


def test_datasets_and_manifests_tell_the_same(corpus):
    (built, skipped, why), (read, again, too) = (load([corpus / name], None, 0) for name in ("out", "m.jsonl"))
    assert skipped == again == {"missing_file": 1}
    assert why == too == {"missing_file": "m.jsonl:5: gone.png does not exist"}
    for name, values in vars(read).items():
        np.testing.assert_array_equal(getattr(built, name), values)
    both, _, _ = load([corpus / "out", corpus / "m.jsonl"], None, 0)
    assert len(both) == 8


def test_values(corpus):
    measures, _, _ = load([corpus / "m.jsonl"], None, 0)
    values = {quantity.name: quantity.values.tolist() for quantity in quantities(measures)}
    assert values["characters of a document"] == [4, 3, 3, 0]
    assert values["media of a document"] == [0, 2, 1, 1]
    assert values["images: square root of the pixels"] == [60.0, 60.0]
    assert values["videos: square root of the pixels"] == pytest.approx([(64 * 96) ** 0.5])
    assert values["videos: seconds"] == pytest.approx([2.0], abs=0.2)
    assert values["audio: seconds"] == [1.5]
    kib = (corpus / "a.png").stat().st_size / 1024
    assert values["media: KiB"][:2] == [kib, kib]


def test_the_command(corpus, tmp_path, capsys):
    plot = tmp_path / "stats.png"
    assert main([str(corpus / "out"), "--workers", "0", "--plot", str(plot)]) == 0
    printed = capsys.readouterr().out
    rows = [line.split() for line in printed.splitlines()]
    assert ["caption", "2", "2", "0", "1", "0", "0"] in [row[:7] for row in rows]
    assert ["all", "4", "2.5", "3.0", "4.0"] in [row[:3] + row[4:5] + row[6:] for row in rows]
    assert "1 documents are skipped:\n  1 missing_file, the first: m.jsonl:5: gone.png does not exist\n" in printed
    with Image.open(plot) as picture:
        assert len(picture.convert("RGB").getcolors(1 << 16)) > 10
    assert main([str(corpus / "out"), "--workers", "0", "--plot", str(tmp_path / "none/x.png")]) == 2
    assert main([str(corpus / "out"), "--workers", "0", "--plot", str(tmp_path / "x.word")]) == 2
    assert main([str(tmp_path), "--workers", "0"]) == 2
    (tmp_path / "m.jsonl").write_text("")
    assert main([str(tmp_path / "m.jsonl"), "--workers", "0", "--plot", str(plot)]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert ["--plot" in line for line in errors] == [True, True, False, False]
    assert errors[-1].endswith("m.jsonl: no document")


def test_shares_of_the_loss_in_a_run(sample_root, tmp_path, capsys):
    """Text and speech of the sample data at equal weights of what is trainable: half the loss each."""
    sources = [{"name": name, "manifest": f"{name}.jsonl"} for name in ("text", "audio")]
    sets = [f"data.root={sample_root}", "data.sample=false", f"data.mixture={sources}", "train.audio_full_ratio=1"]
    config = str(Path(__file__).parents[3] / "configs" / "micro.py")
    sets = [part for each in (*sets, "data.weights_by=trainable") for part in ("--set", each)]
    assert omni_main(["data", "stats", "--config", config, *sets]) == 0
    rows = {row[0]: row[1:] for row in map(str.split, capsys.readouterr().out.splitlines()) if row}
    assert (rows["text"][4], rows["text"][6]) == ("0.0", "50.0")
    assert (rows["audio"][4], rows["audio"][6]) == ("100.0", "50.0")
    # Counted by the tokenizer of the weights that the run starts from: here one of letters, so text has more tokens.
    parent = tmp_path / "parent"
    (parent / "processor").mkdir(parents=True)
    (parent / "branches.json").write_text('{"llm": {"parameters": 1, "dtype": "float32", "trained": 1}}')
    train_tokenizer(["a"], 320).save(str(parent / "processor" / "tokenizer.json"))
    sets += ["--set", f"checkpoint.init_from=llm={parent}", "--set", "data.budgets.tokens=1024"]
    assert omni_main(["data", "stats", "--config", config, *sets]) == 0
    letters = {row[0]: row[1:] for row in map(str.split, capsys.readouterr().out.splitlines()) if row}
    assert float(letters["text"][0]) < 0.8 * float(rows["text"][0])
    assert omni_main(["data", "stats", "--config", config, str(sample_root / "text.jsonl")]) == 2
    assert omni_main(["data", "stats"]) == 2


def test_tables_of_no_or_many_types():
    picture = MediaMeasure("image", 10, 20, 0.0, 5)
    one, two = collect([DocumentMeasure("b", 1, (picture,))]), collect([DocumentMeasure("a", 2, (picture, picture))])
    both = join([one, collect([]), two])
    assert both.types == ("a", "b")
    assert both.type.tolist() == [1, 0]
    assert both.media_type().tolist() == [1, 0, 0]
    assert both.media_places.tolist() == [0, 1, 3]
    assert len(join([])) == 0
