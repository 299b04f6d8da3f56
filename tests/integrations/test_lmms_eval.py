"""The model of lmms-eval: messages of a task with media of all kinds become chat's prompts, in order."""

import base64
import importlib
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
from PIL import Image

from baichuan_omni_jax.errors import ConfigError, RequestError
from baichuan_omni_jax.integrations.media_messages import chat_messages
from tests.helpers.fake_harnesses import Request
from tests.helpers.small_media import write_image

RATE = 16_000
# Values that a file of 16 bits holds.
WAVE = (np.round(2**13 * np.sin(np.arange(RATE) / 20)) / 2**15).astype(np.float32)
OPTIONS = {"max_new_tokens": 4, "do_sample": False}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("media")
    write_image(folder / "a.png", 56, 84)
    soundfile.write(folder / "b.wav", WAVE, RATE)
    return folder


@pytest.fixture(scope="module")
def adapter(installed):
    return importlib.import_module("baichuan_omni_jax.integrations.lmms_eval")


def part(kind, url):
    return {"type": kind, "url": url}


def user(*parts):
    return [{"role": "user", "content": list(parts)}]


@pytest.fixture
def lmm(adapter, model):
    return adapter.BaichuanOmniLMM.from_model(model)


def ask(lmm, conversations, messages=lambda document: document) -> list:
    """Requests of a task whose documents are conversations."""
    lmm.task_dict = {"task": {"test": conversations}}
    return [Request(("", messages, dict(OPTIONS), number, "task", "test")) for number in range(len(conversations))]


def test_media_in_every_form_are_the_same_prompt(model, files):
    image, audio = files / "a.png", files / "b.wav"
    picture = Image.open(image)
    encoded = "data:image/png;base64," + base64.b64encode(image.read_bytes()).decode()
    decoder = SimpleNamespace(get_all_samples=lambda: SimpleNamespace(data=WAVE[None], sample_rate=RATE))
    images = [str(image), image, image.as_uri(), encoded, image.read_bytes(), picture]
    images += [{"bytes": image.read_bytes(), "path": None}, {"path": str(image)}, [picture]]
    sounds = [str(audio), {"array": WAVE, "sampling_rate": RATE}, {"array": WAVE[None], "sampling_rate": RATE}, decoder]
    encode = model.chat.processor.encode_messages
    for kind, forms in (("image", images), ("audio", sounds)):
        prompts = [encode(chat_messages(user(part(kind, url), {"type": "text", "text": "What?"}))) for url in forms]
        for prompt in prompts[1:]:
            np.testing.assert_array_equal(prompt.tokens, prompts[0].tokens)
            np.testing.assert_array_equal(prompt.patches, prompts[0].patches)
            for mel, first in zip(prompt.mels, prompts[0].mels, strict=True):
                np.testing.assert_allclose(mel, first, atol=1e-5)


def test_parts_keep_their_places_between_texts(files):
    text = {"type": "text", "text": "or"}
    image, audio = str(files / "a.png"), str(files / "b.wav")
    (message,) = chat_messages(user(part("image", image), text, part("audio", audio), text, part("video", "c.mp4")))
    assert [(each["type"], each.get("path")) for each in message["content"]] == [
        ("image", image),
        ("text", None),
        ("audio", audio),
        ("text", None),
        ("video", "c.mp4"),
    ]
    assert chat_messages([{"role": "system", "content": "Be brief."}]) == [{"role": "system", "content": "Be brief."}]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (part("image", 7), "given as int"),
        (part("depth", "a.png"), "type 'depth'"),
        (part("video", "a.mp4") | {"start_time": 2.0}, "start_time of a video"),
        (part("video", {"path": "a.mp4", "video_end": 3}), "video_end of a video"),
        (part("audio", {"frames": 3}), "given by frames"),
    ],
)
def test_media_that_cannot_be_taken_are_refused(content, words):
    with pytest.raises(RequestError, match=words):
        chat_messages(user(content))


def test_answers_are_chats_own_whatever_else_fails(lmm, model, files):
    """A file that is not there, and a link, cost their own requests alone."""
    text = {"type": "text", "text": "Which?"}
    image, audio = part("image", str(files / "a.png")), part("audio", str(files / "b.wav"))
    asked = [user(image, audio, text), user(part("image", "none.png"), text), user(part("audio", "https://x.y/z.wav"))]
    asked += [user(text), user(audio, image)] * 2
    answers = lmm.generate_until(ask(lmm, asked))
    settings = importlib.import_module("baichuan_omni_jax.integrations.harness_model").generation_settings(OPTIONS)
    for number, (messages, answer) in enumerate(zip(asked, answers, strict=True)):
        if number in (1, 2):
            assert (answer.text, answer.token_counts.output_tokens) == ("", None)
            continue
        expected = model.chat.reply(chat_messages(messages), stream=False, settings=settings)
        assert answer.text == expected.text
        assert answer.token_counts.output_tokens == expected.finished.tokens
        assert answer.token_counts.input_tokens == expected.finished.prompt
    assert answers[3].text == answers[5].text


def test_rounds_are_asked_with_the_answers_before_them(lmm):
    """A task of two rounds for one document, of three for the other."""
    seen = []

    def messages(document, *, round_idx, previous_output, previous_round_info):
        seen.append((document, round_idx, len(previous_output), previous_round_info))
        if round_idx == document:
            return None, True, previous_output, None
        text = " ".join(["Go on:", *previous_output])
        return user({"type": "text", "text": text}), False, previous_output, f"{document}.{round_idx}"

    answers = lmm.generate_until_multi_round(ask(lmm, [2, 3], messages))
    assert [len(each) for each in answers] == [2, 3]
    assert answers[0] == answers[1][:2]
    assert (3, 2, 2, "3.1") in seen


def test_log_likelihoods_are_lm_evals(lmm):
    with pytest.raises(ConfigError, match="lm-eval"):
        lmm.loglikelihood([])


def test_lmms_eval_finds_it(adapter):
    from importlib.metadata import entry_points

    found = [each for each in entry_points(group="lmms_eval.models") if each.name == "baichuan_omni_jax"]
    if not found:
        pytest.skip("the package is not installed, so it has no entry points")
    assert found[0].load().chat_class_path == f"{adapter.__name__}.BaichuanOmniLMM"
