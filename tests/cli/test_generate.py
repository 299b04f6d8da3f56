"""baichuan-omni generate: what each task sends, what flags are refused, and answers end to end."""

import gzip
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import soundfile
from safetensors.numpy import load_file

from baichuan_omni_jax.checkpoint import abstract_branches, save_branches
from baichuan_omni_jax.cli import generate
from baichuan_omni_jax.cli.generate import answer_config, request_fields, start_request
from baichuan_omni_jax.cli.main import main, make_parser
from baichuan_omni_jax.config import SamplingConfig, tiny
from baichuan_omni_jax.convert.to_jax import convert_to_jax
from baichuan_omni_jax.errors import ConfigError, RequestError
from baichuan_omni_jax.generation.chat_stream import ChatStream
from baichuan_omni_jax.generation.events import Finished, TextDelta
from tests.helpers.golden import golden_path
from tests.helpers.typecheck import unchecked

TRANSCRIBE = {"type": "text", "text": "将语音转录为文本:"}


class Chat:
    """Keeps what is started."""

    def __init__(self):
        self.model = SimpleNamespace(config=tiny())

    def __getattr__(self, method):
        return lambda content, key=None: (method, content)


def send(task, base=Path(), **values):
    with unchecked():  # `Chat` is a double
        return start_request(Chat(), task, values, None, base)


def parse(line):
    return make_parser().parse_args(["generate", *line.split()])


def file(kind, path):
    return {"type": kind, "path": path}


def test_what_each_task_sends():
    text = {"type": "text", "text": "Why?"}
    assert send("chat", prompt="Why?") == ("reply", [{"role": "user", "content": [text]}])
    media = [file("image", "a.png"), file("image", "b.png"), file("audio", "c.wav"), file("video", "d.mp4")]
    method, (system, user) = send(
        "chat", system="Be kind.", prompt="Why?", image=["a.png", "b.png"], audio="c.wav", video=["d.mp4"]
    )
    assert (method, system) == ("reply", {"role": "system", "content": "Be kind."})
    assert user["content"] == [*media, text]
    assert send("chat", audio="c.wav") == ("reply", [{"role": "user", "content": [media[2]]}])
    assert send("asr", audio="c.wav") == ("complete", [TRANSCRIBE, media[2]])
    assert send("tts", prompt="Good morning.") == ("speak", "Good morning.")
    _, (user,) = send("describe", video="d.mp4")
    assert user["content"] == [media[3], {"type": "text", "text": "Describe the video."}]


def test_media_keep_the_order_of_the_command_line():
    """One list for all kinds, whatever flags stand between; the text comes last."""
    line = (
        "chat --image a.png --audio b.wav --prompt Why? --image c.png d.png --checkpoint x --video e.mp4 --audio f.wav"
    )
    values = request_fields(parse(line))
    _, (user,) = send("chat", **values)
    kinds = ["image", "audio", "image", "image", "video", "audio"]
    files = ["a.png", "b.wav", "c.png", "d.png", "e.mp4", "f.wav"]
    assert user["content"] == [*map(file, kinds, files), {"type": "text", "text": "Why?"}]


def test_media_keep_the_order_of_a_manifest():
    """Of the line's fields, or of the list `media`."""
    _, (user,) = send("chat", audio="a.wav", prompt="Why?", image=["b.png", "c.png"])
    text = {"type": "text", "text": "Why?"}
    assert user["content"] == [file("audio", "a.wav"), file("image", "b.png"), file("image", "c.png"), text]
    media = [file("video", "a.mp4"), file("audio", "b.wav"), file("video", "c.mp4")]
    _, (user,) = send("chat", Path("/data"), media=media, prompt="Why?")
    assert [part.get("path") for part in user["content"]] == ["/data/a.mp4", "/data/b.wav", "/data/c.mp4", None]
    _, (user,) = send("describe", media=media[1:])
    assert user["content"][-1] == {"type": "text", "text": "Describe the video."}


def test_paths_of_a_manifest_start_at_its_folder():
    _, (user,) = send("chat", Path("/data"), prompt="Why?", image="a.png")
    assert user["content"][0]["path"] == "/data/a.png"
    messages = [{"role": "user", "content": [file("image", "/b.png"), file("audio", "c.wav")]}]
    _, (user,) = send("chat", Path("/data"), messages=messages)
    assert [part["path"] for part in user["content"]] == ["/b.png", "/data/c.wav"]


def test_token_ids_to_be_spoken_end_with_the_mark_of_speech():
    start = tiny().tokens.audiogen_start
    for ids in ([5, 6], [5, 6, start]):
        method, prompt = send("tts", tokens=ids)
        assert (method, prompt.tokens.tolist()) == ("speak_prompt", [5, 6, start])
    method, prompt = send("chat", tokens=[5, 6])
    assert (method, prompt.tokens.tolist()) == ("answer_prompt", [5, 6])


@pytest.mark.parametrize(
    ("task", "values", "sentence"),
    [
        ("chat", {"prompt": "a", "voice": "alto"}, "no field 'voice'"),
        ("chat", {}, "prompt is missing"),
        ("chat", {"prompt": 3}, "prompt is no text"),
        ("chat", {"messages": "a"}, "messages are a list"),
        ("chat", {"messages": [], "prompt": "a"}, "cannot use prompt"),
        ("chat", {"tokens": [1], "image": "a"}, "cannot use image"),
        ("chat", {"tokens": 5}, "no list of whole numbers"),
        ("tts", {"tokens": None}, "no list of whole numbers"),
        ("asr", {"prompt": "a"}, "one recording"),
        ("asr", {"audio": ["a", "b"]}, "one recording"),
        ("asr", {"audio": "a", "image": "b"}, "cannot use image"),
        ("asr", {"media": [{"type": "video", "path": "a"}]}, "cannot use video"),
        ("chat", {"media": {"type": "image", "path": "a"}}, "media is no list of"),
        ("chat", {"media": [{"type": "text", "path": "a"}]}, "media is no list of"),
        ("tts", {"prompt": "a", "audio": "b"}, "cannot use audio"),
        ("tts", {}, "prompt is missing"),
        ("describe", {"prompt": "a"}, "an image or a video"),
    ],
)
def test_fields_that_a_task_cannot_use(task, values, sentence):
    with pytest.raises(RequestError, match=sentence) as error:
        send(task, **values)
    assert error.value.cause == "bad_message"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("paint --checkpoint x", "invalid choice: 'paint'"),
        ("chat --prompt a", "--checkpoint"),
        ("chat --checkpoint x --manifest m", "--manifest and --output go together"),
        ("chat --checkpoint x --manifest m --output o --prompt a", "--prompt is not for it"),
        ("chat --checkpoint x --manifest m --output o --audio a --image b", "--audio is not for it"),
        ("chat --checkpoint x --manifest m --output o --interactive", "--interactive is not for it"),
        ("asr --checkpoint x --audio a --out o.wav", "does not speak"),
        ("asr --checkpoint x --interactive", "--interactive is for chat"),
        ("chat --checkpoint x --interactive --save s", "without --tokens and --save"),
        ("chat --checkpoint x --prompt a --speech", "needs --out"),
        ("chat --checkpoint x --prompt a --out none/o.wav", "there is no folder none"),
        ("chat --checkpoint x --prompt a --out o.mp4", "--out o.mp4 must end in .wav"),
        ("chat --checkpoint x --prompt a --max-tokens 0", "max_tokens 0 must be at least 1"),
        ("chat --checkpoint x --manifest none.jsonl --output o", "manifest none.jsonl cannot be read"),
        ("chat --checkpoint x --prompt a --voice a】 --out o.wav", "without 【 and 】"),
        ("chat --checkpoint x --prompt a --voice a --system b --out o.wav", "--system takes the place"),
        ("tts --checkpoint x --prompt a", "tts needs --out"),
        ("chat --checkpoint x --prompt a --slots 0", "no whole number above 0"),
        ("chat --checkpoint x --prompt a --tokens none.json", "token ids none.json cannot be read"),
        ("chat --checkpoint /none --prompt a", "/none is neither a checkpoint"),
        ("chat --checkpoint x --prompt a --set text.topk=3", "the nearest known one is text.top_k"),
        ("chat --checkpoint x --prompt a --data 64", "--data 64 --tensor 1 needs 64 devices"),
    ],
)
def test_flags_that_cannot_be_used_are_one_sentence(arguments, sentence, capsys):
    assert main(["generate", *arguments.split()]) == 2
    assert sentence in capsys.readouterr().err.splitlines()[-1]


def test_settings_of_the_flags():

    def settings(line):
        return answer_config(parse(f"{line} --checkpoint x"))

    assert settings("asr --audio a").text == SamplingConfig()
    assert settings("chat --prompt a --out o.wav").speech
    assert settings("describe --image a --out o.wav").speech
    assert not settings("chat --prompt a").speech
    assert not settings("tts --prompt a --out o.wav").speech
    changed = settings("chat --prompt a --set text.top_k=3 --set stop=('x',) --max-tokens 7")
    assert (changed.text.top_k, changed.stop, changed.max_tokens) == (3, ("x",), 7)
    assert settings("chat --prompt a --greedy").text == SamplingConfig()


def test_ctrl_c_keeps_what_is_answered(tmp_path, monkeypatch, capsys):
    """One sentence and code 130; the same command goes on after the last answer. The manifest may be compressed."""
    manifest, output = tmp_path / "in.jsonl.gz", tmp_path / "out.jsonl"
    manifest.write_bytes(gzip.compress(b'{"prompt": "one"}\n{"prompt": "two"}\n'))
    interrupted = [True]

    class Request(list):
        def __iter__(self):
            if self[0].text == "two" and interrupted.pop():
                raise KeyboardInterrupt
            return super().__iter__()

        def cancel(self): ...

    def reply(messages, key):
        text = messages[0]["content"][0]["text"]
        end = Finished("end", 1, 1, 0, 0.1, None, 0.2, np.zeros(2, np.int32))
        return ChatStream(Request([TextDelta(text, (1,), (0.0,)), end]), None)

    metrics = SimpleNamespace(tokens_per_s=1.0, compiles=0)
    chat = SimpleNamespace(key=jax.random.key(0), reply=reply)
    opened = SimpleNamespace(chat=chat, engine=SimpleNamespace(metrics=metrics), notice="")
    monkeypatch.setattr(generate, "open_chat", lambda *_, **__: opened)
    command = ["generate", "chat", "--checkpoint", "x", "--manifest", str(manifest), "--output", str(output)]
    with unchecked():
        assert main(command) == 130
        assert capsys.readouterr().err == f"stopped: {output} keeps what is answered, the same command goes on\n"
        assert [json.loads(line)["text"] for line in output.read_text().splitlines()] == ["one"]
        interrupted.append(False)
        assert main(command) == 0
    assert [json.loads(line)["text"] for line in output.read_text().splitlines()] == ["one", "two"]


def zeros(name, cfg):
    """The branch with all its parameters zero: nothing is sampled or compiled."""
    return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), abstract_branches(cfg, only=[name])[name])


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A language model trained for 3 steps, an audio head never, and a tokenizer of other codes, a checkpoint each."""
    folder, cfg = tmp_path_factory.mktemp("parts"), tiny()
    cfg = replace(cfg, audio_head=replace(cfg.audio_head, num_layers=1))
    head = zeros("audio_head", cfg)
    save_branches(folder / "llm", {"llm": zeros("llm", cfg)}, tiny(), '{"tokenizer": 1}', trained={"llm": 3})
    save_branches(folder / "head", {"audio_head": head}, replace(cfg, llm=replace(cfg.llm, num_layers=7)))
    strange = replace(cfg, audio=replace(cfg.audio, codebook_sizes=(7,) * 8))
    save_branches(folder / "strange", {"audio_encoder": head}, strange)
    return folder


def test_branches_of_several_checkpoints_are_one_model(parts):
    from baichuan_omni_jax.generation.loading import load_for_generation

    loaded = load_for_generation(f"llm={parts}/llm,audio_head={parts}/head")
    assert set(loaded.branches) == {"llm", "audio_head"}
    assert (loaded.config.llm.num_layers, loaded.config.audio_head.num_layers) == (3, 1)
    assert loaded.untrained == ("audio_head",)
    assert loaded.tokenizer.read_text() == '{"tokenizer": 1}'
    assert load_for_generation(str(parts / "llm"), dtype="bfloat16").untrained == ()


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ("{0}/head", "has no branch llm; it has audio_head"),
        ("llm={0}/head", "head has no branch llm"),
        ("llm={0}/llm,voice={0}/head", "names branch 'voice'"),
        ("llm={0}/llm,audio_head={0}/head,audio_encoder={0}/strange", "describe different audio tokenizers"),
    ],
)
def test_checkpoints_that_make_no_model(parts, spec, sentence):
    from baichuan_omni_jax.generation.loading import load_for_generation

    with pytest.raises(ConfigError, match=sentence):
        load_for_generation(spec.format(parts))


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    """The fixtures' weights as a checkpoint, without a text tokenizer."""
    source, folder = golden_path("omni_a"), tmp_path_factory.mktemp("golden") / "omni"
    convert_to_jax(source, folder, vocoder=source / "vocoder.safetensors")
    return folder


def golden_tensors(name):
    return load_file(golden_path("omni_a") / f"{name}.safetensors")


@pytest.mark.slow
def test_the_command_says_what_the_released_computation_says(golden, tmp_path, capsys):
    """Token for token and code for code, alone and in a batch; the end frame is a mark, not a frame. HiFT speaks."""
    text, audio = golden_tensors("generate_text"), golden_tensors("generate_audio")
    end = audio["codes"][-1, 0]
    expected, frames = text["sequence"][0, text["prompt"].shape[1] :].tolist(), audio["codes"][:-1].tolist()
    assert end == 64
    (tmp_path / "text.json").write_text(json.dumps(text["prompt"][0].tolist()))
    (tmp_path / "audio.json").write_text(json.dumps(audio["prompt"][0].tolist()))
    flags = ["--checkpoint", str(golden), "--greedy", "--length", "128", "--max-tokens", str(len(expected))]

    assert (
        main(["generate", "chat", *flags, "--tokens", str(tmp_path / "text.json"), "--save", str(tmp_path / "a.json")])
        == 0
    )
    assert capsys.readouterr().out.split() == [str(token) for token in expected]
    assert json.loads((tmp_path / "a.json").read_text())["tokens"] == expected

    speech, saved = tmp_path / "b.wav", tmp_path / "b.json"
    speak = ["--tokens", str(tmp_path / "audio.json"), "--out", str(speech), "--save", str(saved)]
    assert main(["generate", "tts", *flags, *speak]) == 0
    notes = capsys.readouterr().err
    assert "Griffin" not in notes
    assert "untrained" not in notes
    assert json.loads(saved.read_text())["codes"] == [frames]
    wave, rate = soundfile.read(speech)
    assert rate == 24000
    assert abs(len(wave) / rate - len(frames) / 12.5) < 0.1

    prompts = [text["prompt"][0].tolist(), [7, 8, 9], "no ids", text["prompt"][0].tolist(), audio["prompt"][0].tolist()]
    manifest, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    manifest.write_text("".join(json.dumps({"tokens": ids}) + "\n" for ids in prompts))
    assert main(["generate", "chat", *flags, "--manifest", str(manifest), "--output", str(output)]) == 0
    first, _, refused, again, spoken = map(json.loads, output.read_text().splitlines())
    assert first["tokens"] == again["tokens"] == expected
    assert refused["cause"] == "bad_message"
    assert spoken["codes"][0] == frames


@pytest.mark.slow
def test_parts_of_three_runs_hear_and_speak(tmp_path, capsys):
    """A branch of each kind of run, random: text to a wav file, a recording and an image to text, two turns."""
    from data_pipelines.tokenizers.tokenizer import train_tokenizer
    from tests.helpers.small_media import write_audio, write_image

    cfg = tiny()
    words = train_tokenizer(["the cat sat on the mat"] * 3, 330).to_str()
    runs = {"main": ("llm", "vision", "audio_head"), "ears": ("audio_encoder", "audio_decoder"), "flow": ("flow",)}
    for run, names in runs.items():
        save_branches(tmp_path / run, random_branches(names, cfg), cfg, words, trained={"llm": 5})
    spec = ",".join(f"{name}={tmp_path / run}" for run, names in runs.items() for name in names)
    flags = ["--checkpoint", spec, "--length", "256", "--max-tokens", "6"]
    sizes = ["--set", "segment_tokens=3", "--set", "segment_frames=5"]

    spoken = ["--prompt", "the cat", "--out", str(tmp_path / "a.wav")]
    assert main(["generate", "tts", *flags, *sizes, *spoken]) == 0
    notes = capsys.readouterr().err
    assert "untrained, so that answers mean nothing: vision, audio_encoder, audio_decoder, audio_head, flow" in notes
    assert "Griffin" in notes
    assert all(word in notes for word in ("first audio", "tokens/s", "real-time factor", "cache", "programs compiled"))
    info = soundfile.info(tmp_path / "a.wav")
    assert (info.samplerate, info.channels) == (24000, 1)
    assert info.frames > 0

    recording, image = write_audio(tmp_path / "s.wav", 1), write_image(tmp_path / "p.png", 56, 84)
    assert main(["generate", "asr", *flags, "--audio", str(recording), "--save", str(tmp_path / "s.json")]) == 0
    assert len(json.loads((tmp_path / "s.json").read_text())["tokens"]) > 0
    assert main(["generate", "describe", *flags, "--image", str(image)]) == 0

    lines = iter(["and?", "/image none.png", "see?", "/quit"])
    mp = pytest.MonkeyPatch()
    mp.setattr("builtins.input", lambda prompt: next(lines))
    with mp.context():
        talk = ["--interactive", "--prompt", "the mat", "--out", str(tmp_path / "t.wav")]
        assert main(["generate", "chat", *flags, *sizes, *talk]) == 0
    mp.undo()
    assert "error: 'none.png' does not exist" in capsys.readouterr().err
    assert (tmp_path / "t-1.wav").exists()
    assert (tmp_path / "t-2.wav").exists()


def random_branches(names, cfg):
    """Branches of small random numbers."""
    rng = np.random.default_rng(0)
    draw = lambda x: 0.05 * rng.standard_normal(x.shape).astype(x.dtype)  # noqa: E731
    return {name: jax.tree.map(draw, module) for name, module in abstract_branches(cfg, only=names).items()}
