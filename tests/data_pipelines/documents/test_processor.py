"""Documents measured and encoded: slots, targets and weights by hand, for each kind of document."""

import json
import pickle
from dataclasses import replace

import av
import numpy as np
import pytest
from PIL import Image

from baichuan_omni_jax.config import ImagesConfig, OmniConfig, released_images, tiny
from data_pipelines.documents.processor import Processor
from data_pipelines.errors import SampleError
from data_pipelines.media.audio import clip_key
from data_pipelines.tokenizers.tokenizer import encode, tokenizer_from_ranks, train_tokenizer
from tests.helpers.golden import golden_path, ranks_path
from tests.helpers.small_media import document, media, write_audio, write_image, write_video

CONFIG = tiny()
T = CONFIG.tokens
LEVELS = CONFIG.audio.levels
END_CLASS = CONFIG.audio.codebook_sizes[0]

IMAGE = '<img_start_baichuan>{"local": "a.png"}<img_end_baichuan>'
VIDEO = '<video_start_baichuan>{"local": "v.mp4"}<video_end_baichuan>'
HEARD = '<audio_start_baichuan>{"path": "s.wav"}<audio_end_baichuan>'
SPOKEN = '<audiogen_start_baichuan>{"path": "s.wav"}<audiogen_end_baichuan>'


def trainable(text):
    return f"<trainable_start>{text}<trainable_end>"


class Store(dict):
    """Codes by key, as the real store gives them."""

    def lookup(self, key):
        return self[key]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["the cat sat on the mat"] * 3, 330)


@pytest.fixture
def processor(tokenizer):
    return Processor(CONFIG, tokenizer, end_of_text=False)


@pytest.fixture
def root(tmp_path):
    """A 56 x 84 image (6 visual tokens), 0.25 s of audio (26 mel frames, 3 code frames), 3 s of video."""
    write_image(tmp_path / "a.png", 56, 84)
    write_audio(tmp_path / "s.wav", 0.25)
    write_video(tmp_path / "v.mp4", 3)
    return tmp_path


def codes_of(path, count=3, window=0):
    codes = np.random.default_rng(window).integers(0, 16, (count, LEVELS))
    return Store({clip_key(media(path), window): codes.astype(np.int16)})


def run(processor, text, root):
    """Encodes and checks what holds for every document: measured lengths, pads and slots, shifted targets."""
    found = document(text, root)
    encoded = processor.encode(found, codes_of(root / "s.wav"))
    lengths = encoded.lengths
    assert processor.measure(found) == replace(
        lengths,
        mel_windows=len(processor.audio_items(found)),
        items=text.count('{"') + 2 * text.count("v.mp4"),
    )
    tokens = encoded.tokens
    np.testing.assert_array_equal(np.flatnonzero(tokens == T.audio_pad), encoded.audio_slots)
    visual = np.isin(tokens, [T.image_pad, T.video_place])
    np.testing.assert_array_equal(np.flatnonzero(visual), encoded.visual_slots)
    assert len(encoded.patches) == len(encoded.patch_grid) == len(encoded.patch_frames) == 4 * visual.sum()
    weighted = np.flatnonzero(encoded.text_weights)
    np.testing.assert_array_equal(encoded.text_targets[weighted], tokens[weighted + 1])
    assert not encoded.text_targets[encoded.text_weights == 0].any()
    assert not np.isin(encoded.text_targets[weighted], [T.audio_pad, T.image_pad, T.video_place]).any()
    return encoded


def predicted(encoded):
    """Positions whose token carries loss."""
    return (np.flatnonzero(encoded.text_weights) + 1).tolist()


def ids(processor, text):
    return encode(processor.tokenizer, text)


def test_image_question(processor, root):
    question, answer = ids(processor, "what?<C_A>"), ids(processor, "cat<|endoftext|>")
    encoded = run(processor, f"{IMAGE}what?<C_A>{trainable('cat<|endoftext|>')}", root)
    expected = [T.image_start, *[T.image_pad] * 6, T.image_end, *question, *answer]
    assert encoded.tokens.tolist() == expected
    first = len(expected) - len(answer)
    assert predicted(encoded) == list(range(first, len(expected)))
    assert encoded.visual_slots.tolist() == [1, 2, 3, 4, 5, 6]
    assert encoded.patch_frames.tolist() == [1] * 24
    assert encoded.patch_grid[:5].tolist() == [[0, 0], [0, 1], [1, 0], [1, 1], [0, 2]]
    assert len(encoded.audio_codes) == len(encoded.audio_targets) == 0


def test_asr(processor, root):
    encoded = run(processor, f"{HEARD}{trainable('cat')}", root)
    answer = ids(processor, "cat")
    assert encoded.tokens.tolist() == [T.audio_start, *[T.audio_pad] * 3, T.audio_end, *answer]
    assert predicted(encoded) == list(range(5, 5 + len(answer)))
    np.testing.assert_array_equal(encoded.audio_codes, codes_of(root / "s.wav")[clip_key(media(root / "s.wav"), 0)])
    assert len(encoded.audio_targets) == 0


def test_tts(processor, root):
    text = ids(processor, "cat")
    n = len(text)
    encoded = run(processor, f"cat{trainable(SPOKEN)}", root)
    assert encoded.tokens.tolist() == [*text, T.audiogen_start, *[T.audio_pad] * 3, T.audiogen_end]
    assert predicted(encoded) == [n]
    assert encoded.audio_target_slots.tolist() == [n, n + 1, n + 2, n + 3]
    assert encoded.audio_slots.tolist() == [n + 1, n + 2, n + 3]
    np.testing.assert_array_equal(encoded.audio_targets[:3], encoded.audio_codes)
    assert encoded.audio_targets[3].tolist() == [END_CLASS] + [0] * (LEVELS - 1)
    assert encoded.audio_weights.tolist() == [[1.0] * LEVELS] * 3 + [[1.0] + [0.0] * (LEVELS - 1)]


def test_itts_trains_text_and_audio_but_the_first_text(processor, root):
    one, two = ids(processor, "the cat"), ids(processor, "sat")
    encoded = run(processor, f"the cat{trainable(SPOKEN + 'sat' + SPOKEN)}", root)
    start = len(one)
    second = start + 5 + len(two)
    assert encoded.tokens[[start, second]].tolist() == [T.audiogen_start] * 2
    # The mark that starts speech and the text between; not pads, not the end of speech.
    assert predicted(encoded) == [start, *range(start + 5, second), second]
    assert encoded.text_weights[start : start + 4].tolist() == [0] * 4
    assert encoded.text_weights[start + 4] == 1
    assert encoded.audio_target_slots.tolist() == [*range(start, start + 4), *range(second, second + 4)]
    np.testing.assert_array_equal(encoded.audio_targets[4:7], encoded.audio_codes[3:])


def test_intlv_has_no_loss_on_audio(processor, root):
    encoded = run(processor, trainable(f"{HEARD}cat{HEARD}sat"), root)
    first, second = ids(processor, "cat"), ids(processor, "sat")
    n = 5 + len(first)
    assert predicted(encoded) == [*range(5, n), *range(n + 5, n + 5 + len(second))]
    assert len(encoded.audio_targets) == 0


def test_spoken_audio_outside_the_marks_carries_no_loss(processor, root):
    encoded = run(processor, f"the{SPOKEN}{trainable('cat')}", root)
    assert len(encoded.audio_targets) == 0
    assert predicted(encoded)[0] == len(ids(processor, "the")) + 5


def test_video_file_and_listed_frames(processor, root):
    frame = [T.image_start, *[T.video_place] * 6, T.image_end]
    encoded = run(processor, f"{VIDEO}{trainable('cat')}", root)
    assert encoded.tokens[:24].tolist() == frame * 3
    assert encoded.patch_frames.tolist() == [1] * 24 + [2] * 24 + [3] * 24
    assert [round((encoded.patches[24 * i].mean() - 20) / 10) for i in range(3)] == [0, 1, 2]
    write_image(root / "b.png", 56, 84)
    listed = '<videoframe_start_omni>{"path": "b.png"}<videoframe_end_omni>' * 2
    encoded = run(processor, f"<video_start_baichuan>{listed}<video_end_baichuan>{IMAGE}{trainable('cat')}", root)
    assert encoded.tokens[:16].tolist() == frame * 2
    assert encoded.tokens[17] == T.image_pad


def test_listed_frames_beyond_the_model_s_are_left_out(processor, root):
    """Of 20 frames int(i * 20 / 8) stay: measured and encoded alike."""
    for number in range(20):
        Image.new("L", (56, 56), 10 * number).save(root / f"{number}.png")
    listed = "".join(f'<videoframe_start_omni>{{"path": "{n}.png"}}<videoframe_end_omni>' for n in range(20))
    found = document(f"<video_start_baichuan>{listed}<video_end_baichuan>{trainable('cat')}", root)
    encoded = processor.encode(found, None)
    assert (
        CONFIG.vision.max_frames
        == len(processor.measure(found).image_patches)
        == len(encoded.lengths.image_patches)
        == 8
    )
    seen = [int(encoded.patches[encoded.patch_frames == frame].mean()) // 10 for frame in range(1, 9)]
    assert seen == [0, 2, 5, 7, 10, 12, 15, 17]


def test_turned_images_are_measured_as_they_are_encoded(processor, tokenizer, root):
    exif = Image.Exif()
    exif[0x0112] = 6
    write_image(root / "turned.png", 56, 112, exif=exif)
    text = IMAGE.replace("a.png", "turned.png") + trainable("cat")
    assert "turned.png" in text
    as_stored = Processor(CONFIG, tokenizer, end_of_text=False, images=released_images())
    for each, grid in ((processor, [7, 3]), (as_stored, [3, 7])):
        encoded = run(each, text, root)
        assert encoded.patch_grid.max(0).tolist() == grid


def test_damaged_packets_of_a_video_are_counted(processor, root):
    path = write_video(root / "damaged.mp4", 3, codec="mpeg4", changing=True)
    with av.open(str(path)) as container:
        packet = [packet for packet in container.demux(video=0) if packet.size][7]
        place, size = packet.pos, packet.size
    data = path.read_bytes()
    path.write_bytes(data[:place] + bytes(size) + data[place + size :])
    text = VIDEO.replace("v.mp4", "damaged.mp4") + trainable("cat")
    encoded = processor.encode(document(text, root), None)
    assert encoded.damaged_packets == 1
    assert encoded.patch_frames.max() == 3


def test_the_audio_of_a_video(processor, root):
    write_video(root / "w.mp4", 2, audio=2)
    text = '<audio_start_baichuan>{"path": "w.mp4"}<audio_end_baichuan>' + trainable("cat")
    (item,) = processor.audio_items(document(text, root))
    store = codes_of(root / "w.mp4", item.window.code_frames)
    assert processor.encode(document(text, root), store).lengths.audio_frames == item.window.code_frames >= 24


@pytest.mark.parametrize("text", [IMAGE, VIDEO, HEARD, SPOKEN, "the mat"])
def test_every_pair_of_modalities(processor, root, text):
    for other in (IMAGE, VIDEO, HEARD, SPOKEN, "the mat"):
        run(processor, f"{text}{other}{trainable('cat' + SPOKEN)}", root)


def test_random_documents_have_a_slot_for_every_pad(processor, root):
    rng = np.random.default_rng(0)
    pieces = [IMAGE, VIDEO, HEARD, SPOKEN, "the mat", "猫", " "]
    for _ in range(40):
        chosen = [pieces[i] for i in rng.integers(0, len(pieces), rng.integers(0, 6))]
        marked = [trainable(piece) if rng.random() < 0.5 else piece for piece in chosen]
        run(processor, "".join(marked) + trainable("the cat"), root)


def test_long_clips_are_windows_between_one_pair_of_marks(processor, root):
    path = write_audio(root / "long.wav", 31)
    found = document('<audiogen_start_baichuan>{"path": "long.wav"}<audiogen_end_baichuan>', root)
    found = replace(found, text=trainable(found.text))
    items = processor.audio_items(found)
    assert [(item.window.start, item.window.samples, item.window.code_frames) for item in items] == [
        (0, 480000, 375),
        (480000, 16000, 12),
    ]
    store = Store(codes_of(path, 375) | codes_of(path, 12, window=1))
    encoded = processor.encode(found, store)
    assert encoded.tokens.tolist() == [T.audiogen_start, *[T.audio_pad] * 387, T.audiogen_end]
    assert processor.measure(found).mel_windows == 2
    assert encoded.lengths.audio_targets == 388
    np.testing.assert_array_equal(encoded.audio_codes, np.concatenate([store[item.key] for item in items]))


@pytest.mark.parametrize(
    ("text", "added", "learned"),
    [
        ("the cat", 1, False),
        (trainable("the cat"), 1, True),
        (trainable("the cat<|endoftext|>"), 0, True),
        (trainable("the" + SPOKEN), 1, True),
        (trainable("the") + IMAGE, 1, False),
    ],
)
def test_end_of_text(tokenizer, root, text, added, learned):
    plain, ending = (Processor(CONFIG, tokenizer, end_of_text=choice) for choice in (False, True))
    text = trainable("x") * 2 + text
    before, after = run(plain, text, root), run(ending, text, root)
    assert len(after.tokens) == len(before.tokens) + added
    if added:
        assert after.tokens[-1] == T.end_of_text
        assert after.text_weights[-2] == learned


def test_fingerprint_and_pickle(processor, tokenizer):
    copy = pickle.loads(pickle.dumps(processor))
    assert copy.fingerprint == processor.fingerprint
    assert Processor(CONFIG, tokenizer, end_of_text=True).fingerprint != processor.fingerprint
    smaller = replace(CONFIG, vision=replace(CONFIG.vision, max_frames=4))
    assert Processor(smaller, tokenizer, end_of_text=False).fingerprint != processor.fingerprint
    for name in ("orientation", "alpha", "depth", "profile"):
        images = ImagesConfig(**{name: "released"})
        assert Processor(CONFIG, tokenizer, end_of_text=False, images=images).fingerprint != processor.fingerprint
    deeper = replace(CONFIG, llm=replace(CONFIG.llm, num_layers=9))
    assert Processor(deeper, tokenizer, end_of_text=False).fingerprint == processor.fingerprint


def test_documents_without_marks_train_whole(tokenizer, root):
    """Text, speech to be spoken, and the end; what is heard or seen is never a target. Or they are refused."""
    text = f"<C_Q>the cat{IMAGE}{HEARD}<C_A>sat{SPOKEN}on{IMAGE}"
    codes = codes_of(root / "s.wav")
    training = Processor(CONFIG, tokenizer)
    unmarked, whole = (training.encode(document(each, root), codes) for each in (text, trainable(text)))
    for name in ("tokens", "text_targets", "audio_targets", "audio_weights", "audio_target_slots"):
        np.testing.assert_array_equal(getattr(unmarked, name), getattr(whole, name))
    pads = {T.audio_pad, T.image_pad, T.video_place, T.audio_start, T.image_start, T.audio_end, T.image_end}
    following = np.append(unmarked.tokens[1:], T.audio_pad)
    expected = ~np.isin(following, [*pads, T.audiogen_end])
    np.testing.assert_array_equal(unmarked.text_weights > 0, expected)
    assert unmarked.text_targets[-2] == T.end_of_text
    assert len(unmarked.audio_targets) == 4
    refusing = Processor(CONFIG, tokenizer, unmarked="refuse")
    assert refusing.fingerprint != training.fingerprint
    with pytest.raises(SampleError, match="the document has no <trainable_start>") as caught:
        refusing.measure(document(text, root))
    assert caught.value.cause == "unmarked"
    assert refusing.measure(document(trainable("a"), root)).text_targets == 1


@pytest.mark.parametrize(
    ("text", "cause", "message"),
    [
        ("nothing to learn<trainable_start><trainable_end>", "no_loss", "nothing in the document carries loss"),
        ("", "no_loss", "nothing in the document"),
        (trainable(HEARD), "no_loss", "nothing in the document"),
        (IMAGE.replace("a.png", "b.png"), "missing_file", "b.png does not exist"),
        (IMAGE.replace("a.png", "../b.png"), "outside_root", "lies outside"),
        (IMAGE.replace("a.png", "s.wav"), "unreadable_media", "s.wav is not a readable image"),
        (HEARD.replace("s.wav", "a.png"), "unreadable_media", "a.png is not a readable audio file"),
        (VIDEO.replace("v.mp4", "s.wav"), "unreadable_media", "s.wav is not a readable video"),
        (HEARD.replace("s.wav", "blip.wav"), "unreadable_media", "blip.wav is too short: 800 samples"),
        ("<trainable_start>x", "bad_prompt", "never closed"),
    ],
)
def test_bad_documents(processor, root, text, cause, message):
    write_audio(root / "blip.wav", 0.05)
    for call in (processor.measure, processor.audio_items, lambda found: processor.encode(found, Store())):
        with pytest.raises(SampleError, match=message) as caught:
            call(document(text, root))
        assert caught.value.cause == cause


def test_bad_codes(processor, root):
    found, path = document(f"{HEARD}{trainable('cat')}", root), root / "s.wav"
    too_large = Store({clip_key(media(path), 0): np.full((3, LEVELS), 16, np.int16)})
    for store, cause, message in (
        (Store(), "no_codes", "s.wav: window 0 has no codes"),
        (codes_of(path, 4), "changed", r"have shape \(4, 8\), not \(3, 8\)"),
        (too_large, "changed", "exceed the codebooks"),
    ):
        with pytest.raises(SampleError, match=message) as caught:
            processor.encode(found, store)
        assert caught.value.cause == cause


def test_a_file_that_changed_has_no_codes(processor, root):
    store = codes_of(root / "s.wav")
    write_audio(root / "s.wav", 0.5)
    with pytest.raises(SampleError, match="has no codes"):
        processor.encode(document(f"{HEARD}{trainable('cat')}", root), store)


def test_released_prompts_have_the_released_ids():
    tokenizer = tokenizer_from_ranks(ranks_path())
    processor = Processor(OmniConfig(), tokenizer, end_of_text=False, images=released_images())
    folder = golden_path("processor")
    for name, case in json.loads((folder / "processor.json").read_text(encoding="utf-8"))["prompts"].items():
        text = case["prompt"] if "trainable" in case["prompt"] else case["prompt"] + trainable("<C_A>")
        expected = case["input_ids"] if text == case["prompt"] else [*case["input_ids"], 151668]
        found = document(text, folder / "media")
        speech = codes_of(folder / "media/speech_zh.wav", 56)
        encoded = processor.encode(found, speech)
        assert encoded.tokens.tolist() == expected, name
        assert len(encoded.patches) == 4 * sum((case["patch_nums"] or []) + (case["videos_patch_nums"] or []))


def test_every_document_of_the_sample_encodes_as_measured(tokenizer, sample_dir):
    processor, store = Processor(CONFIG, tokenizer), Store()
    for manifest in sorted(sample_dir.glob("*.jsonl")):
        for line in manifest.read_text(encoding="utf-8").splitlines()[::5]:
            found = document(json.loads(line)["text"], sample_dir)
            for item in processor.audio_items(found):
                store[item.key] = np.zeros((item.window.code_frames, LEVELS), np.int16)
            lengths, expected = processor.encode(found, store).lengths, processor.measure(found)
            assert replace(lengths, mel_windows=expected.mel_windows, items=expected.items) == expected
    assert store
