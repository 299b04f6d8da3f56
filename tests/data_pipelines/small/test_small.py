"""The small recipe's data: the same for a seed, whole or untouched, true, and its held-out parts never trained on."""

import json
import random
import re
from itertools import permutations

import av
import numpy as np
import pytest
from PIL import Image

from baichuan_omni_jax.errors import ConfigError
from data_pipelines.documents.prompt_writing import plain_text
from data_pipelines.small import charts, digits, motion, pictures, text
from data_pipelines.small.__main__ import build_small, main
from data_pipelines.small.documents import HELD_OUT, SOURCES, Counts, plan_documents
from data_pipelines.small.spoken import SPOKEN_SOURCES, SpokenCounts
from data_pipelines.small.words import NUMBERS

SPOKEN = SpokenCounts(words=4, numbers=4, sentences=4, speech=6, questions=6, dialogue=4, held_out=4)
FEW = Counts(digits=1, pictures=60, charts=40, motion=12, text=60, spoken=SPOKEN, held_out=6)
MEDIA = re.compile(r'\{"(?:local|path)": "(.*?)"\}')


@pytest.fixture(scope="module")
def small_dir(tmp_path_factory):
    return build_small(tmp_path_factory.mktemp("data") / "small", counts=FEW, progress=False)


@pytest.fixture(scope="module")
def rng():
    return random.Random(0)


def test_the_same_seed_gives_the_same_documents_and_media():
    plan, manifests = plan_documents(3, FEW)
    again, same = plan_documents(3, FEW)
    assert same == manifests
    assert again == plan
    assert plan_documents(4, FEW)[1] != manifests


def test_every_manifest_names_media_below_the_root(small_dir):
    summary = json.loads((small_dir / "small.json").read_text())
    manifests = [small_dir / f"{name}.jsonl" for name in SOURCES] + sorted((small_dir / HELD_OUT).glob("*.jsonl"))
    assert {path.relative_to(small_dir).as_posix() for path in manifests} == {
        f"{name}.jsonl" for name in summary["documents"]
    }
    named = set()
    for manifest in manifests:
        documents = [json.loads(line) for line in manifest.read_text("utf-8").splitlines()]
        assert len(documents) == summary["documents"][manifest.relative_to(small_dir).as_posix()[: -len(".jsonl")]]
        named |= {small_dir / path for document in documents for path in MEDIA.findall(document["text"])}
    assert named == {path for path in small_dir.rglob("*") if path.suffix in (".png", ".mp4", ".flac")}
    assert len(named) == summary["images"] + summary["videos"] + summary["recordings"]


def test_images_and_videos_have_the_sizes_that_the_model_sees(small_dir):
    for path in small_dir.rglob("*.png"):
        with Image.open(path) as image:
            assert image.mode == "RGB"
            assert image.size in ((56, 56), (84, 84))
    video = next(small_dir.rglob("*.mp4"))
    with av.open(str(video)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(frames) == 16
    assert frames[0].shape == (84, 84, 3)
    assert np.abs(frames[0].astype(int) - frames[-1]).max() > 60, "nothing moves"


def test_questions_end_before_what_trains_and_answers_are_short(small_dir):
    # What is read aloud or written down is longer, and in the released form, without roles.
    asked = [
        path for path in (small_dir / HELD_OUT).glob("*.jsonl") if not path.stem.endswith(("numbers", "sentences"))
    ]
    for manifest in asked:
        for line in manifest.read_text("utf-8").splitlines():
            question, answer = json.loads(line)["text"].split("<trainable_start>")
            assert question.endswith("<C_A>")
            assert 1 <= len(answer.removesuffix("<trainable_end>").split()) <= (7 if manifest.stem == "count" else 3)


def test_a_complete_folder_is_left_alone_and_another_seed_rebuilds_it(tmp_path):
    few = Counts(digits=1, pictures=1, charts=1, motion=0, text=1, spoken=SPOKEN, held_out=1)
    out = build_small(tmp_path / "small", counts=few, progress=False)
    made = (out / "small.json").stat().st_mtime_ns
    assert build_small(out, counts=few, progress=False) == out
    assert (out / "small.json").stat().st_mtime_ns == made
    before = (out / "pictures.jsonl").read_text()
    build_small(out, seed=1, counts=few, progress=False)
    assert (out / "pictures.jsonl").read_text() != before
    assert not out.with_name("small.partial").exists()


def test_a_folder_of_other_things_is_refused_untouched(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match=r"holds 'thesis.txt', which is no data of the small recipe"):
        build_small(tmp_path)
    assert main([str(tmp_path)]) == 2
    assert "nothing was changed" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_held_out_digits_are_other_images(rng):
    training = {digit.number for digit in digits.training_digits(rng, 2)}
    held_out = {digit.number for digit in digits.held_out_digits()}
    assert len(training) == 1297
    assert len(held_out) == 500
    assert not training & held_out
    assert {digit.value for digit in digits.held_out_digits()} == set(range(10))


def test_held_out_pictures_are_combinations_that_no_training_picture_has(rng):
    def triples(held_out, count):
        drawn = [pictures.random_picture(rng, held_out=held_out) for _ in range(count)]
        return {(picture.shape.color, picture.shape.shape, picture.place) for picture in drawn}

    training, held_out = triples(False, 4000), triples(True, 800)
    assert not training & held_out
    assert len(training) + len(held_out) == 8 * 6 * 9
    assert len(held_out) == 41
    # Each pair of a held-out combination is trained on.
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert {(each[a], each[b]) for each in held_out} <= {(each[a], each[b]) for each in training}


def test_held_out_charts_and_motions_are_new_combinations(rng):
    def bars(held_out):
        drawn = [charts.random_chart(rng, held_out=held_out) for _ in range(3000)]
        return {(chart.colors, chart.heights) for chart in drawn}

    def paths(held_out):
        drawn = [motion.random_motion(rng, held_out=held_out) for _ in range(3000)]
        return {(each.shape.color, each.shape.shape, each.direction, each.path) for each in drawn}

    assert not bars(False) & bars(True)
    assert not paths(False) & paths(True)


@pytest.mark.parametrize("ability", [ability for ability in text.TEXT_ABILITIES if ability != "reading"])
def test_held_out_questions_of_text_are_never_asked(rng, ability):
    held_out = {text.question(rng, ability, held_out=True) for _ in range(500)}
    asked = {text.question(rng, ability) for _ in range(5000)}
    assert len(held_out) >= 8
    assert not held_out & asked


def test_held_out_stories_ask_about_owners_that_no_training_story_tells_of(rng):
    told = re.compile(r"(\w+) has an? (\w+) (\w+)\.")
    training = {owner for _ in range(4000) for owner in told.findall(text.question(rng, "reading").question)}
    training |= {owner for _ in range(4000) for owner in told.findall(text.passage(rng))}
    for _ in range(500):
        question, answer = text.question(rng, "reading", held_out=True)
        asked = set(re.findall(r"\w+", question.rsplit(".", 1)[1]))
        about = [owner for owner in told.findall(question) if {owner[0], owner[2]} & asked]
        assert about
        assert not set(about) & training
        assert any(word in answer for word in about[0])


def test_answers_about_pictures_are_what_is_drawn(rng):
    for _ in range(40):
        picture = pictures.random_picture(rng)
        questions = picture.questions(rng)
        pixels = np.asarray(picture.render()).astype(int)
        # Pixels of the named color lie around the named place, and nowhere else many.
        near = np.abs(pixels - np.array(pictures.COLORS[questions["color"].answer])).max(-1) <= 20
        rows, columns = np.nonzero(near)
        row, column = divmod(pictures.PLACES.index(questions["place"].answer), 3)
        assert len(rows) > 60
        assert (rows.mean() // 28, columns.mean() // 28) == (row, column)


def test_answers_about_charts_are_what_is_drawn(rng):
    for _ in range(40):
        chart = charts.random_chart(rng)
        pixels = np.asarray(chart.render()).astype(int)
        counts = {
            color: int((np.abs(pixels - np.array(pictures.COLORS[color])).max(-1) == 0).any(1).sum())
            for color in chart.colors
        }
        question, answer = chart.questions(rng)["tallest_bar"]
        least = any(word in question for word in ("shortest", "lowest"))
        assert answer == (min if least else max)(counts, key=counts.__getitem__)
        question, answer = chart.questions(rng)["bar_value"]
        color = next(color for color in counts if f"the {color} bar" in question)
        assert NUMBERS[round(counts[color] / 14)] == answer


def test_a_shape_moves_where_the_answer_says(rng):
    for _ in range(8):
        moving = motion.random_motion(rng)
        color = np.array(pictures.COLORS[moving.shape.color])
        centers = []
        for frame in (moving.frames()[0], moving.frames()[-1]):
            rows, columns = np.nonzero(np.abs(frame.astype(int) - color).max(-1) <= 20)
            centers.append((rows.mean(), columns.mean()))
        down, right = np.subtract(centers[1], centers[0])
        seen = ("right" if right > 0 else "left") if abs(right) > abs(down) else ("down" if down > 0 else "up")
        assert moving.questions(rng)["motion"].answer == seen


def test_answers_of_text_are_true(rng):
    for _ in range(300):
        question, answer = text.question(rng, "order")
        first, second = re.search(r"(\w+) or (\w+)\?", question).groups()
        assert answer == max(first, second, key=NUMBERS.index)
        question, answer = text.question(rng, "count")
        first, last = (NUMBERS.index(word) for word in re.search(r"from (\w+) to (\w+)\.", question).groups())
        assert [NUMBERS.index(word) for word in answer.rstrip(".").split(", ")] == list(range(first, last + 1))
        question, answer = text.question(rng, "reading")
        assert all(word in question for word in answer.split())
        question, answer = text.question(rng, "facts")
        if added := re.search(r"(\w+) plus (\w+)\?", question):
            assert sum(map(NUMBERS.index, added.groups())) == NUMBERS.index(answer)


def test_no_answer_about_a_picture_begins_another(rng):
    # Inside a conversation an answer has no end that is trained: a longer one would go on.
    scenes = [pictures.random_picture(rng) for _ in range(2000)] + [charts.random_chart(rng) for _ in range(200)]
    answers = {(ability, asked.answer) for scene in scenes for ability, asked in scene.questions(rng).items()}
    for (ability, one), (other, two) in permutations(answers, 2):
        assert ability != other or not two.startswith(one)


def test_every_fact_is_asked_in_training_in_at_least_one_wording():
    asked = {each.question for each in text._ALL["facts"][False]}
    assert all(any(wording in asked for wording in wordings) for _, wordings, _ in text.FACTS)


def test_what_a_reader_reads_is_plain_english(small_dir):
    # The released prompts of speech are Chinese.
    for name in set(SOURCES) - set(SPOKEN_SOURCES):
        for line in (small_dir / f"{name}.jsonl").read_text("utf-8").splitlines():
            assert re.fullmatch(r"[A-Za-z ,.?:\n]+", plain_text(json.loads(line)["text"]))
