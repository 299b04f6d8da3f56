"""Captions by a hook: both languages, failures by image, prompts that carry no loss."""

import json

import numpy as np
import pytest
from PIL import Image

from baichuan_omni_jax.errors import ConfigError
from data_pipelines.documents.prompts import ImageElement, TextElement, parse_prompt
from data_pipelines.synthesis import __main__ as command
from data_pipelines.synthesis.captions import CAPTIONS, DESCRIBE_IMAGE
from tests.helpers.synthesis_hooks import job_of

HOOKS = "tests.helpers.synthesis_hooks"


def tag(path):
    return f"<img_start_baichuan>{json.dumps({'local': path})}<img_end_baichuan>"


@pytest.fixture
def manifest(tmp_path):
    """Images of four brightnesses, one that is no image, and a document without any."""
    for name, level in (("dark", 20), ("gray", 70), ("light", 150), ("white", 250)):
        Image.fromarray(np.full((30, 40, 3), level, np.uint8)).save(tmp_path / f"{name}.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    documents = {
        "both": tag("light.png") + tag("white.png"),
        "some": tag("dark.png") + tag("white.png") + tag("gray.png"),
        "bad": tag("broken.png"),
        "none": "text alone",
        "frames": f"<videoframe_start_omni>{json.dumps({'local': 'light.png'})}<videoframe_end_omni>",
    }
    path = tmp_path / "m.jsonl"
    path.write_text("".join(json.dumps({"id": name, "text": text}) + "\n" for name, text in documents.items()))
    return path


def run(manifest, out, *options):
    code = command.main(["captions", str(manifest), "--out", str(out), "--workers", "0", *options])
    return code, *([json.loads(line) for line in (out / name).open()] for name in _FILES if (out / name).is_file())


_FILES = ("captions.jsonl", "skipped-captions.jsonl")


def test_every_image_is_captioned_in_both_languages_or_counted(manifest, tmp_path):
    code, made, skipped = run(manifest, tmp_path / "out", "--captioner", f"{HOOKS}:BrightnessCaptioner")
    assert code == 0
    words = {}
    for one in made:
        image, question, answer = parse_prompt(one["text"])[1:]
        assert one["type"] == "caption"
        assert isinstance(image, ImageElement)
        assert not question.trainable
        assert answer.trainable
        assert (tmp_path / "out" / image.reference.path).samefile(
            manifest.parent / ("light.png" if "150" in answer.text else "white.png")
        )
        language = "zh" if answer.text.startswith("亮度") else "en"
        assert question.text.removesuffix("<C_A>") in DESCRIBE_IMAGE[language]
        words.setdefault(one["id"].partition("-")[0], []).append(answer.text)
    assert words == {
        "both": ["Brightness 150", "亮度150", "Brightness 250", "亮度250"],
        "some": ["Brightness 250", "亮度250"],
    }
    assert sorted((one["id"], one["cause"]) for one in skipped) == [
        ("bad", "unreadable_media"),
        ("frames", "no_picture"),
        ("none", "no_picture"),
        ("some", "captioner_failed"),
        ("some", "captioner_failed"),
        ("some", "empty_caption"),
        ("some", "empty_caption"),
    ]


def test_one_language_and_another_seed(manifest, tmp_path):
    hook = ("--captioner", f"{HOOKS}:BrightnessCaptioner", "--languages", "zh")
    prompts = []
    for seed in range(6):
        _, made, _ = run(manifest, tmp_path / str(seed), *hook, "--seed", str(seed))
        prompts.append(
            [element.text for element in parse_prompt(made[0]["text"]) if isinstance(element, TextElement)][1]
        )
        assert all("亮度" in one["text"] for one in made)
    assert len(set(prompts)) > 1


@pytest.mark.parametrize(
    ("hook", "named"),
    [
        ("plain", "not of the form package.module:factory"),
        ("no.such.module:Hook", "cannot be loaded"),
        (f"{HOOKS}:Missing", "cannot be loaded"),
        (f"{HOOKS}:Nothing", "has no method caption"),
    ],
)
def test_hooks_that_cannot_be_used_are_refused(hook, named):
    with pytest.raises(ConfigError, match=named):
        job_of(CAPTIONS, "m.jsonl", "--out", "o", "--captioner", hook)


def test_the_command_tells_what_is_wrong(manifest, tmp_path, capsys):
    assert run(manifest, tmp_path / "out", "--captioner", "plain") == (2,)
    assert capsys.readouterr().err == "error: --captioner plain: not of the form package.module:factory\n"


def test_names_of_special_tokens_in_a_caption_are_text(manifest, tmp_path):
    _, made, _ = run(manifest, tmp_path / "out", "--captioner", f"{HOOKS}:MarkCaptioner")
    assert made
    for one in made:
        said = TextElement("A <C_A> and <img_pad_baichuan><trainable_end>.", trainable=True, plain=True)
        assert parse_prompt(one["text"])[-1] == said
