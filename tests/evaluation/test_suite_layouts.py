"""Items of each public layout, and what cannot be read: one sentence that names the file and the column."""

import hashlib
import re
from collections import Counter

import pytest

from baichuan_omni_jax.errors import ConfigError, RequestError
from baichuan_omni_jax.evaluation.suites import layouts, speech_layouts
from baichuan_omni_jax.evaluation.suites.answers import select_items
from baichuan_omni_jax.evaluation.suites.table import SUITES, likelihood_prompt, message_of
from tests.helpers.suite_files import (
    RIGHT,
    mp3,
    omni_rows,
    png,
    write_agieval,
    write_exam,
    write_image_choice,
    write_jsonl,
    write_omni_bench,
    write_open_audio_bench,
    write_recordings,
    write_rows,
    write_video_mme,
)


def test_five_subsets_of_the_audio_benchmark(tmp_path):
    items = list(layouts.read_open_audio_bench(write_open_audio_bench(tmp_path)))
    assert Counter(item.group for item in items) == dict.fromkeys(layouts.AUDIO_SUBSETS, 4)
    references = {item.group: item.references for item in items}
    assert references["alpaca_eval"] == ()
    assert references["llama_questions"] == (RIGHT,)
    assert references["trivia_qa"] == references["web_questions"] == ("paris", "city of Paris")
    # Line breaks inside of quotes belong to the question.
    assert items[0].question == "alpaca_eval, question 0\nof 4?"
    content, shown = message_of(SUITES["openaudiobench"], items[-1])
    # One user message of one recording, without text.
    path = tmp_path / "eval_datas" / "web_questions" / "audios" / "web_questions_3.mp3"
    assert content == [{"type": "audio", "path": str(path)}]
    assert shown[0]["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()


def test_images_of_a_vlmevalkit_table(tmp_path):
    items = list(layouts.read_image_choice(write_image_choice(tmp_path)))
    assert len(items) == 12
    assert [len(item.options) for item in items[:4]] == [4, 4, 4, 3]
    assert [item.group for item in items[:2]] == ["X-ray", "microscope"]
    pictures = [[media.load()[0]["bytes"] for media in item.media] for item in items]
    assert pictures[0] == [png(0)]
    assert pictures[4] == [png(0)]  # a reference to row 100
    assert pictures[5] == [png(5), png(6)]
    assert pictures[11] == [png(11)]


def test_images_by_path_lie_beside_the_table(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(png(3))
    row = {"index": 1, "question": "?", "A": "x", "B": "y", "answer": "b", "image_path": "a.png"}
    write_rows(tmp_path / "t.tsv", [row, row | {"index": 2, "image_path": "['a.png', 'a.png']"}], "\t")
    one, two = layouts.read_image_choice(tmp_path)
    assert (one.references, one.group, len(one.media), len(two.media)) == (("B",), "all", 1, 2)
    assert one.media[0].load()[1] == hashlib.sha256(png(3)).hexdigest()


@pytest.mark.parametrize("parquet", [False, True])
def test_four_settings_of_omnibench(tmp_path, parquet):
    if parquet:
        pytest.importorskip("pyarrow", reason="the extra `evaluate` brings it")
    write_omni_bench(tmp_path, parquet=parquet)
    kinds = {}
    for name in ("omnibench", "omnibench-caption-audio", "omnibench-image-transcript", "omnibench-caption-transcript"):
        items = list(SUITES[name].read(tmp_path))
        assert [item.references[0] for item in items] == list("ABCDABCD")
        kinds[name] = [media.kind for media in items[0].media]
        content, _ = message_of(SUITES[name], items[6])
        data = [part["bytes"] for part in content if "bytes" in part]
        assert not parquet or data == [
            *([png(6)] if "image" in kinds[name] else []),
            *([mp3()] if "audio" in kinds[name] else []),
        ]
        text = content[-1]["text"]
        assert ("Picture: picture 6" in text) == ("image" not in kinds[name])
        assert ("Audio: sound 6" in text) == ("audio" not in kinds[name])
        assert "C. he is glad" in text
    assert list(kinds.values()) == [["image", "audio"], ["audio"], ["image"], []]


def test_videos_with_choices(tmp_path):
    items = list(layouts.read_video_choice(write_video_mme(tmp_path)))
    assert items[1].options == ("A car.", "A dog.", "Nothing.", "A leaf.")
    assert (items[1].references, items[1].group) == (("B",), "long")
    assert items[1].media[0].load()[0] == {"type": "video", "path": str(tmp_path / "data" / "v1.mp4")}


@pytest.mark.parametrize(("layout", "suite"), [("mmlu", "mmlu"), ("cmmlu", "cmmlu"), ("ceval", "ceval")])
def test_exams_with_and_without_headers(tmp_path, layout, suite):
    items = list(SUITES[suite].read(write_exam(tmp_path, {"law": 6, "world_history": 3}, layout)))
    assert Counter(item.group for item in items) == {"law": 6, "world_history": 3}
    assert [item.references[0] for item in items[:6]] == list("ABCDAB")
    assert items[0].options == ("law A0", "law B0", "law C0", "law D0")
    prompt = likelihood_prompt(items[1])
    # Five solved questions, and then this one up to its letter.
    assert len(re.findall(r"law, \d, is\?", prompt)) == 6
    assert prompt.endswith("law D1\nAnswer:" if layout == "mmlu" else "law D1\n答案：")
    assert prompt.count(" A\n") == 2


def test_agieval_tasks_of_one_right_letter(tmp_path):
    items = list(layouts.read_agieval(write_agieval(tmp_path)))
    assert Counter(item.group for item in items) == {"gaokao-history": 2, "sat-en": 3}
    assert items[-1].options == ("one", "two", "three", "four")
    assert (items[-1].context, items[-1].language, items[0].language) == ("A passage.", "en", "zh")


def test_recordings_in_four_layouts(tmp_path):
    spoken = {"84-121123-0000": "GO DO YOU HEAR", "84-121123-0001": "BUT IN LESS"}
    items = list(speech_layouts.read_recordings(write_recordings(tmp_path / "a", spoken)))
    assert {item.id: item.references[0] for item in items} == spoken
    assert all(item.media[0].path.is_file() for item in items)
    kaldi = tmp_path / "b"
    kaldi.mkdir()
    (kaldi / "text").write_text("u1 你好\n")
    (kaldi / "wav.scp").write_text("u1 clips/u1.wav\n")
    (item,) = speech_layouts.read_recordings(kaldi, "zh")
    assert (item.references, item.media[0].path) == (("你好",), kaldi / "clips" / "u1.wav")
    aishell = tmp_path / "c"
    (aishell / "wav" / "test" / "S1").mkdir(parents=True)
    (aishell / "wav" / "test" / "S1" / "x1.wav").write_bytes(b"")
    (aishell / "transcript").mkdir()
    (aishell / "transcript" / "aishell_transcript_v0.8.txt").write_text("x0 不 在\nx1 在 这里\n")
    (item,) = speech_layouts.read_recordings(aishell, "zh")
    assert (item.id, item.references) == ("x1", ("在 这里",))
    fleurs = tmp_path / "d"
    fleurs.mkdir()
    (fleurs / "test.tsv").write_text("7\tx.wav\tHello, you.\thello you\t-\t16000\tMALE\n")
    (item,) = speech_layouts.read_recordings(fleurs)
    assert (item.references, item.media[0].path) == (("Hello, you.",), fleurs / "audio" / "test" / "x.wav")


@pytest.mark.parametrize("name", sorted(SUITES))
def test_an_empty_or_missing_folder_is_one_sentence(tmp_path, name):
    with pytest.raises(ConfigError, match=f"--data {tmp_path} is empty"):
        list(SUITES[name].read(tmp_path))
    with pytest.raises(ConfigError, match="is no folder"):
        list(SUITES[name].read(tmp_path / "none"))
    (tmp_path / "readme").write_text("nothing else")
    with pytest.raises(ConfigError, match=f"--data {tmp_path} holds no"):
        list(SUITES[name].read(tmp_path))


def test_a_missing_column_is_named_with_those_there_are(tmp_path):
    write_rows(tmp_path / "t.tsv", [{"index": 1, "question": "?", "A": "x", "B": "y", "image": "z"}], "\t")
    with pytest.raises(ConfigError, match=r"t\.tsv has no column 'answer'; it has index, question, A, B, image"):
        list(layouts.read_image_choice(tmp_path))
    rows = [{name: value for name, value in row.items() if name != "audio content"} for row in omni_rows(2)]
    write_jsonl(tmp_path / "o" / "o.jsonl", rows)
    with pytest.raises(ConfigError, match="has no column 'audio content'"):
        list(layouts.read_omni_bench(tmp_path / "o"))
    write_jsonl(tmp_path / "p" / "o.jsonl", [omni_rows(1)[0] | {"answer": "something else"}])
    (item,) = layouts.read_omni_bench(tmp_path / "p")
    assert item.problem.endswith("o.jsonl:1: its answer 'something else' is none of its options")


def test_files_that_are_not_what_they_are_called(tmp_path):
    for name, data, sentence in (
        ("a.tsv", b"version https://git-lfs.github.com/spec/v1\nsize 12\n", "a pointer of Git LFS"),
        ("b.tsv", b"", "empty: it was never written"),
        ("c.tsv", b"index\tquestion\tA\tB\tanswer\timage\n1\t\xff\xfe\tx\ty\tA\tz\n", "cannot be read"),
    ):
        folder = tmp_path / name[0]
        folder.mkdir()
        (folder / name).write_bytes(data)
        with pytest.raises(ConfigError, match=sentence):
            list(layouts.read_image_choice(folder))


def test_media_that_are_gone_or_damaged_cost_their_item(tmp_path):
    root = write_open_audio_bench(tmp_path / "a")
    (root / "eval_datas" / "trivia_qa" / "audios" / "trivia_qa_1.mp3").unlink()
    item = next(item for item in layouts.read_open_audio_bench(root) if item.id == "trivia_qa/1")
    with pytest.raises(RequestError, match=r"trivia_qa/trivia_qa_1\.mp3 cannot be read: No such file"):
        message_of(SUITES["openaudiobench"], item)
    row = {"index": 1, "question": "?", "A": "x", "B": "y", "answer": "A", "image": "?" * 80}
    write_rows(tmp_path / "b" / "t.tsv", [row], "\t")
    (item,) = layouts.read_image_choice(tmp_path / "b")
    with pytest.raises(RequestError, match="row 1: image 1 cannot be read: its base64 is damaged"):
        message_of(SUITES["openmm-medical"], item)


def test_groups_and_limits_choose_items(tmp_path):
    folder = write_open_audio_bench(tmp_path)
    chosen = select_items(layouts.read_open_audio_bench(folder), ["trivia_qa", "web_questions"], 2)
    # Numbers are those among all items, so that a limit changes none.
    assert [number for number, _ in chosen] == [13, 14, 17, 18]
    with pytest.raises(ConfigError, match="no group 'trivia'; it has alpaca_eval"):
        select_items(layouts.read_open_audio_bench(folder), ["trivia"])
