"""Filters: languages, near-duplicates, speech errors; every document is in one of the outputs."""

import json
import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baichuan_omni_jax.errors import ConfigError
from data_pipelines.documents.manifest import read_manifest
from data_pipelines.documents.prompts import AudioElement, parse_prompt
from data_pipelines.media.location import find_media
from data_pipelines.synthesis import __main__ as command
from data_pipelines.synthesis.filters.job import FILTERS
from data_pipelines.synthesis.filters.rules import (
    count_edits,
    find_duplicates,
    likeness,
    sign,
    speech_units,
    spoken_texts,
)
from data_pipelines.text.spoken_text import detect_language
from tests.helpers.small_media import write_audio
from tests.helpers.synthesis_hooks import job_of

HOOKS = "tests.helpers.synthesis_hooks"
ENGLISH = "The market opens early, and the baker sells bread to everyone who comes in the morning before the rain."
GERMAN = "Der Markt öffnet früh und der Bäcker verkauft Brot an alle die morgens vor dem Regen kommen und etwas kaufen"
ALPHABET = "abcdefghijklmnopqrstuvwxyz    "


@pytest.mark.parametrize(
    ("text", "language"),
    [
        (ENGLISH, "en"),
        ("早市开得很早，面包师傅向大家卖面包。", "zh"),
        ("我今天学了一个新词：serendipity，意思是意外的发现。", "zh"),
        ("他说 the market opens early today 然后就走了", "mixed"),
        (GERMAN, "other"),
        ("朝の市場は早く開きます。", "other"),
        ("Рынок открывается рано.", "other"),
        ("3.14 × 2 = 6.28", "none"),
        ("Bonjour.", "en"),  # too short to tell
    ],
)
def test_languages(text, language):
    assert detect_language(text) == language


@settings(max_examples=40, deadline=None)
@given(st.text("abc", max_size=8), st.text("abc", max_size=8))
def test_edits_are_a_distance(first, second):
    edits = count_edits(first, second)
    assert edits == count_edits(second, first)
    assert (edits == 0) == (first == second)
    assert abs(len(first) - len(second)) <= edits <= max(len(first), len(second))
    assert count_edits(first, second + "x") <= edits + 1


def test_speech_units_are_words_or_characters():
    assert count_edits("kitten", "sitting") == 3
    assert speech_units("Don’t go – NOW!", "en") == ["don't", "go", "now"]
    assert speech_units("你好，Ｂ！", "zh") == ["你", "好", "b"]


def test_text_before_speech_is_what_it_should_say():
    spoken = '<audiogen_start_baichuan>{"path": "a.wav"}<audiogen_end_baichuan>'
    pairs = spoken_texts(parse_prompt(f"Read this aloud: One.<trainable_start>{spoken}Two. {spoken}<trainable_end>"))
    assert [text for text, _ in pairs] == ["One.", "Two."]


def words(rng, count):
    return " ".join("".join(rng.choices(ALPHABET[:26], k=rng.randint(2, 9))) for _ in range(count))


def test_likeness_estimates_the_overlap():
    """128 places: a standard deviation of at most 0.044, so within 0.15 in every case here."""
    rng = random.Random(0)
    for share in (0.0, 0.5, 0.8, 0.95):
        common = words(rng, 400)
        cut = round(len(common) * share)
        first, second = common, common[:cut] + words(rng, 400)[cut:]
        runs = [
            {plain[i : i + 5] for i in range(len(plain) - 4)}
            for plain in (first.replace(" ", ""), second.replace(" ", ""))
        ]
        exact = len(runs[0] & runs[1]) / len(runs[0] | runs[1])
        signatures = np.stack([sign(first), sign(second)])
        assert likeness(signatures, np.array([0]), np.array([1]))[0] == pytest.approx(exact, abs=0.15)


def test_case_space_and_width_do_not_count_but_media_do():
    plain = sign("Hello, World 123")
    np.testing.assert_array_equal(plain, sign("hello,world １２３"))
    assert (plain == sign("Hello, World 123", ["ab" * 32])).mean() < 0.1
    np.testing.assert_array_equal(sign("", ["ab" * 32]), sign(" ", ["ab" * 32]))


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1000), st.lists(st.integers(0, 9), min_size=1, max_size=40))
def test_the_first_of_equal_documents_stays(seed, kinds):
    base = np.random.default_rng(seed).integers(0, 2**32, (10, 128), dtype=np.uint32)
    first = find_duplicates(base[kinds], 0.8)
    assert first.tolist() == [kinds.index(kind) for kind in kinds]


def test_near_duplicates_are_found_and_others_kept():
    rng = random.Random(1)
    texts = [words(rng, 150) for _ in range(60)]
    changed = [text[:300] + "one other word" + text[300:] for text in texts[:30]]
    first = find_duplicates(np.stack([sign(text) for text in texts + changed]), 0.8)
    assert first.tolist() == [*range(60), *range(30)]


def run(out, *arguments):
    assert command.main(["filters", *map(str, arguments), "--out", str(out), "--workers", "0", "--unit", "5"]) == 0
    names = ("kept", "asr", "rejected", "skipped-filters")
    return {name: [json.loads(line) for line in (out / f"{name}.jsonl").open()] for name in names}


def write(path, documents):
    path.write_text("".join(json.dumps(one) + "\n" for one in documents))
    return path


def test_every_document_is_in_one_output_with_its_cause(tmp_path):
    rng = random.Random(2)
    first = [{"id": f"a{i}", "text": f"{ENGLISH} {words(rng, 30)}"} for i in range(7)]
    second = [{**first[3], "id": "again"}, {"id": "short", "text": "x"}, {"id": "german", "text": GERMAN}]
    second += [
        {"id": "new", "text": "早市开得很早，面包师傅向大家卖面包。"},
        {"id": "broken", "text": "<trainable_start>"},
    ]
    sorted_ = run(tmp_path / "out", write(tmp_path / "1.jsonl", first), write(tmp_path / "2.jsonl", second))
    ids = Counter(one["id"] for lines in sorted_.values() for one in lines)
    assert ids == Counter(one["id"] for one in first + second)
    assert [one["id"] for one in sorted_["kept"]] == [*(f"a{i}" for i in range(7)), "new"]
    rejected = {one["id"]: (one["cause"], one["score"]) for one in sorted_["rejected"]}
    assert rejected == {"again": ("near_duplicate", 1.0), "short": ("length", 1), "german": ("language", "other")}
    assert [one["repeats"] for one in sorted_["rejected"] if one["id"] == "again"] == ["a3"]
    assert [(one["id"], one["cause"]) for one in sorted_["skipped-filters"]] == [("broken", "bad_prompt")]
    kept = run(tmp_path / "all", tmp_path / "1.jsonl", tmp_path / "2.jsonl", "--duplicates", "0")["kept"]
    assert [one["id"] for one in kept].count("again") == 1


def speech(text, path):
    return f'{text}<trainable_start><audiogen_start_baichuan>{{"path": "{path}"}}<audiogen_end_baichuan><trainable_end>'


def test_speech_is_sorted_by_its_errors(tmp_path):
    """The stand-in hears 4, 3, 2 and 0 of the 4 words: error rates 0, 0.25, 0.5 and 1."""
    documents = []
    for tenths in (4, 3, 2, 0.4):
        write_audio(tmp_path / f"{tenths}.wav", tenths / 10)
        documents.append({"id": f"t{tenths}", "type": "tts", "text": speech("One, two, three, four.", f"{tenths}.wav")})
    documents.append({"id": "gone", "type": "tts", "text": speech("One.", "missing.wav")})
    documents.append({"id": "other", "type": "aqa", "text": speech("Something else.", "4.wav")})
    manifest = write(tmp_path / "m.jsonl", documents)
    sorted_ = run(tmp_path / "out", manifest, "--transcriber", f"{HOOKS}:LengthTranscriber", "--asr-above", "0.2")
    scores = {one["id"]: one.get("score") for name in ("kept", "asr", "rejected") for one in sorted_[name]}
    assert scores == {"t4": 0.0, "other": None, "t3": 0.25, "t2": 0.5, "t0.4": 1.0}
    assert {name: [one["id"] for one in lines] for name, lines in sorted_.items()} == {
        "kept": ["t4", "other"],
        "asr": ["t3", "t2"],
        "rejected": ["t0.4"],
        "skipped-filters": ["gone"],
    }
    asr = sorted_["asr"][0]
    prompt, heard, answer = parse_prompt(asr["text"])
    assert asr["type"] == "asr"
    assert isinstance(heard, AudioElement)
    assert not heard.spoken
    assert (answer.text, answer.trainable, prompt.trainable) == ("One, two, three, four.", True, False)
    for name in ("kept", "asr"):
        for line in read_manifest(f"{name}.jsonl", tmp_path / "out"):
            for element in parse_prompt(line.document.text):
                if isinstance(element, AudioElement):
                    assert find_media(element.reference, line.document.media).path.stat().st_size > 44


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--shortest", "5", "--longest", "2"], "--shortest 5"),
        (["--duplicates", "1.5"], "--duplicates"),
        (["--asr-above", "0.9"], "--asr-above"),
        (["--transcriber", f"{HOOKS}:Nothing"], "has no method transcribe"),
    ],
)
def test_rules_that_keep_nothing_are_refused(options, named):
    with pytest.raises(ConfigError, match=named):
        job_of(FILTERS, "m.jsonl", "--out", "o", *options)
