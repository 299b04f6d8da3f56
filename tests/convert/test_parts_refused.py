"""Parts that cannot be put together: one sentence that names the file and what is wrong, and nothing half-written."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, models

from baichuan_omni_jax.checkpoint import find_checkpoint
from baichuan_omni_jax.cli.main import main
from baichuan_omni_jax.config import read_hf, tiny
from baichuan_omni_jax.config.vocoder import tiny_vocoder
from baichuan_omni_jax.convert.synthetic import write_random_checkpoint
from baichuan_omni_jax.errors import ConfigError
from tests.helpers import public_models as public
from tests.helpers.micro import REPOSITORY, wait_until


@pytest.fixture(scope="module")
def command():
    """`baichuan-omni convert` with these arguments -> exit code."""

    def run(*arguments: object) -> int:
        return main(["convert", *map(str, arguments)])

    return run


@pytest.fixture(scope="module")
def originals(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("public")
    public.write_qwen2(root / "llm")
    public.write_qwen2_vl(root / "vision")
    public.write_whisper(root / "whisper")
    return root


def stated(**values: object) -> Callable[[Path], None]:
    """Changes `config.json`."""

    def act(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return act


def tower(**values: object) -> Callable[[Path], None]:
    """Changes `vision_config` of `config.json`."""

    def act(folder: Path) -> None:
        path = folder / "config.json"
        config = json.loads(path.read_text())
        path.write_text(json.dumps(config | {"vision_config": config["vision_config"] | values}))

    return act


def changed(act: Callable[[dict[str, np.ndarray]], object]) -> Callable[[Path], None]:
    """Changes the tensors."""

    def run(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        act(tensors)
        save_file(tensors, folder / "model.safetensors")

    return run


def index(folder: Path) -> None:
    """An index with a shard that was never fetched."""
    names = load_file(folder / "model.safetensors")
    files = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(sorted(names))}
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))


def bare_index(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text('{"metadata": {}}')


def dangling(folder: Path) -> None:
    """As a copy of Hugging Face's cache without the files that it links to."""
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("../../blobs/0")


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])


def replace_file(name: str, text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(text)


def as_merges(folder: Path) -> None:
    """`vocab.json` and a broken `merges.txt` in the place of `tokenizer.json`."""
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps({"a": 0, "b": 1}))
    (folder / "merges.txt").write_text("a b\n")


def with_no_ids(folder: Path) -> None:
    as_merges(folder)
    (folder / "vocab.json").write_text(json.dumps({"a": 0, "b": "x"}))


LLM = {
    "no such folder": (shutil.rmtree, ["llm/config.json cannot be read"]),
    "no config": (lambda f: (f / "config.json").unlink(), ["llm/config.json cannot be read"]),
    "a Qwen2-VL": (
        stated(model_type="qwen2_vl"),
        ["llm/config.json: model_type is 'qwen2_vl', not 'qwen2'", "give a Qwen2.5 folder for the language model"],
    ),
    "another architecture": (stated(model_type="gemma"), ["model_type is 'gemma', not 'qwen2'"]),
    "sliding windows": (
        stated(use_sliding_window=True, sliding_window=128, max_window_layers=1),
        ["use_sliding_window: layers from 1 on see 128 tokens alone"],
    ),
    "sliding layers": (stated(layer_types=["full_attention", "sliding_attention"]), ["'sliding_attention'"]),
    "scaled rope": (stated(rope_scaling={"rope_type": "yarn", "factor": 4.0}), ["rope_scaling.rope_type = 'yarn'"]),
    "scaled rope of transformers 5": (
        stated(rope_parameters={"rope_type": "yarn", "rope_theta": 1e6}),
        ["rope_parameters.rope_type = 'yarn'"],
    ),
    "windows of Qwen2's own size": (
        stated(use_sliding_window=True, max_window_layers=0),
        ["use_sliding_window: layers from 0 on see 4096 tokens alone"],
    ),
    "layers of no kind": (stated(layer_types=2), ["llm/config.json: layer_types must be a list, not 2"]),
    "tied in words": (stated(tie_word_embeddings="false"), ["tie_word_embeddings must be bool, not 'false'"]),
    "heads that share unequally": (
        stated(num_key_value_heads=3),
        ["llm/config.json: llm.num_heads 4 is not a multiple of llm.num_kv_heads 3"],
    ),
    "heads of no width": (stated(head_dim=-1), ["llm/config.json: head_dim = -1 must be at least 1"]),
    "heads of odd width": (stated(head_dim=15), ["llm.head_dim 15 is not a multiple of 2"]),
    "more layers than can be counted": (stated(num_hidden_layers=10**30), ["num_hidden_layers = 1", "at most 1024"]),
    "more layers than any model": (
        stated(num_hidden_layers=10**9),
        ["llm/config.json: num_hidden_layers = 1000000000 must be at most 1024"],
    ),
    "an end that is an object": (stated(eos_token_id={"id": 300}), ["eos_token_id {'id': 300} is the id of no token"]),
    "another activation": (stated(hidden_act="gelu"), ["hidden_act = 'gelu' is not supported"]),
    "quantized": (stated(quantization_config={"quant_method": "awq"}), ["quantization_config (awq)"]),
    "a size is missing": (stated(hidden_size=None), ["hidden_size"]),
    "more layers": (
        stated(num_hidden_layers=3),
        ["tensor model.layers.2.input_layernorm.weight [64] is missing", "12 problems", "; and 7 more"],
    ),
    "wider": (stated(intermediate_size=128), ["model.layers.0.mlp.up_proj.weight has shape [96, 64], the config"]),
    "untied without a head": (
        changed(lambda t: t.pop("lm_head.weight")),
        ["tensor lm_head.weight [400, 64] is missing"],
    ),
    "unknown tensor": (
        changed(lambda t: t.update({"model.layers.0.self_attn.q_norm.weight": np.ones(16, np.float32)})),
        ["tensor model.layers.0.self_attn.q_norm.weight has no rule"],
    ),
    "an index of nothing": (bare_index, ["cannot be used as an index: weight_map must map tensors to file names"]),
    "a link to what is gone": (dangling, ["llm/model.safetensors cannot be read: No such file or directory"]),
    "missing shard": (index, ["names shards that are not there", "model-00002-of-00002.safetensors (with "]),
    "truncated": (cut, ["model.safetensors", "is truncated"]),
    "pickled": (
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
        ["holds neither model.safetensors", "but pytorch_model.bin: convert it to safetensors first"],
    ),
    "no tokenizer": (
        lambda f: (f / "tokenizer.json").unlink(),
        ["llm holds no tokenizer: neither tokenizer.json nor vocab.json and merges.txt"],
    ),
    "no tokenizer but its name": (replace_file("tokenizer.json", "{}"), ["tokenizer.json cannot be read"]),
    "merges of unknown tokens": (as_merges, ["merges.txt: 'a b' joins no two tokens of vocab.json to a third"]),
    "ids in words": (with_no_ids, ["llm/vocab.json: token 'b' has no id but 'x'"]),
    "ids outside the table": (
        stated(vocab_size=302),
        ["token '<|im_end|>' has id 302, the model's table has 302 rows"],
    ),
    "no free rows": (
        stated(vocab_size=320),
        ["56 special tokens need free rows, but of the table's 320 only 17 come after the last token"],
    ),
    "ids that disagree": (
        replace_file("tokenizer_config.json", '{"added_tokens_decoder": {"301": {"content": "<|endoftext|>"}}}'),
        ["tokenizer_config.json: token '<|endoftext|>' has id 301, but tokenizer.json gives it id 300"],
    ),
    "added tokens in a list": (
        replace_file("tokenizer_config.json", '{"added_tokens_decoder": ["<|endoftext|>"]}'),
        ["tokenizer_config.json: added_tokens_decoder must map ids to tokens, it is of type list"],
    ),
    "an added token without a name": (
        replace_file("tokenizer_config.json", '{"added_tokens_decoder": {"300": {"content": 3}}}'),
        ["tokenizer_config.json: added_tokens_decoder must map ids to tokens, not '300' to {'content': 3}"],
    ),
    "a tokenizer of words": (
        lambda f: Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")).save(str(f / "tokenizer.json")),
        ["llm/tokenizer.json: text is not what comes back from its tokens: a Qwen2 has byte-level BPE"],
    ),
    "an end that is no token": (stated(eos_token_id=[300, 390]), ["eos_token_id 390 is the id of no token"]),
}
VISION = {
    "a Qwen2.5-VL": (stated(model_type="qwen2_5_vl"), ["model_type is 'qwen2_5_vl'", "Qwen2.5-VL has another tower"]),
    "a language model": (stated(model_type="qwen2"), ["model_type is 'qwen2', not 'qwen2_vl'"]),
    "no tower": (stated(vision_config=None), ["vision_config is missing"]),
    "no tensor of the tower": (
        changed(lambda t: [t.pop(name) for name in list(t) if name.startswith("visual.")]),
        ["holds no Qwen2-VL tower: there is no tensor visual.patch_embed.proj.weight"],
    ),
    "another activation": (tower(hidden_act="silu"), ["vision_config.hidden_act = 'silu' is not supported"]),
    "mixed sizes": (tower(depth=3), ["tensor visual.blocks.2.norm1.weight [32] is missing"]),
    "a list of sizes": (tower(patch_size=[14, 14]), ["vision_config.patch_size"]),
    "another width": (tower(embed_dim=64), ["the config wants [64, ", " problems", " more\n"]),
    "no width": (tower(embed_dim=0), ["vision/config.json: vision_config.embed_dim = 0 must be at least 1"]),
    "unequal heads": (tower(num_heads=3), ["vision/config.json: vision.embed_dim 32 is not a multiple of"]),
    "no spread of pixels": (
        replace_file("preprocessor_config.json", '{"image_std": [0.5, 0.5, 0]}'),
        ["vision/preprocessor_config.json: vision.image_std [0.5, 0.5, 0.0] must be above 0"],
    ),
    "a folder for the processor": (
        lambda f: (f / "preprocessor_config.json").mkdir(),
        ["vision/preprocessor_config.json cannot be read: Is a directory"],
    ),
    "the mean of one color": (
        replace_file("preprocessor_config.json", '{"image_mean": [0.5]}'),
        ["vision/preprocessor_config.json: vision.image_mean has 1 values, the images 3 channels"],
    ),
}
ENCODER = {
    "another architecture": (stated(model_type="wav2vec2"), ["model_type is 'wav2vec2', not 'whisper'"]),
    "half a second": (stated(max_source_positions=77), ["max_source_positions = 77 are no whole seconds of audio"]),
    "windows of a day": (stated(max_source_positions=50 * 86400), ["are no whole seconds of audio (at most 3600)"]),
    "positions in words": (stated(max_source_positions="1500"), ["max_source_positions must be int, not '1500'"]),
    "no heads": (stated(encoder_attention_heads=0), ["encoder_attention_heads = 0 must be at least 1"]),
    "scaled embeddings": (stated(scale_embedding=True), ["scale_embedding = True is not supported"]),
    "no encoder": (
        changed(lambda t: [t.pop(name) for name in list(t) if "encoder" in name]),
        ["holds no Whisper encoder: there is no tensor model.encoder.conv1.weight"],
    ),
    "learned positions": (
        changed(lambda t: t["model.encoder.embed_positions.weight"].__iadd__(1)),
        ["buffer model.encoder.embed_positions.weight is not the table it is computed as"],
    ),
    "mixed sizes": (stated(d_model=64), ["the config wants [64, 20, 3]"]),
}
CASES = [(part, name) for part, cases in (("llm", LLM), ("vision", VISION), ("whisper", ENCODER)) for name in cases]


@pytest.mark.parametrize(("part", "damage"), CASES, ids=[f"{part}: {name}" for part, name in CASES])
def test_a_part_that_cannot_be_used(command, originals, tmp_path, capsys, part, damage):
    act, sentences = {"llm": LLM, "vision": VISION, "whisper": ENCODER}[part][damage]
    folder = Path(shutil.copytree(originals / part, tmp_path / part))
    act(folder)
    assert command("from-parts", f"--{part}", folder, "--model", "tiny", "--to", tmp_path / "deep" / "omni") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert len(error) < 1000
    for sentence in sentences:
        assert sentence in error
    assert {path.name for path in tmp_path.iterdir()} <= {part}


def test_targets_and_arguments(command, originals, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    (tmp_path / "file").write_text("")
    write_random_checkpoint(tmp_path / "hf", tiny(), vocoder=tiny_vocoder())
    llm, vocoder = ("--llm", originals / "llm"), tmp_path / "hf" / "vocoder.safetensors"
    made = ("--model", "tiny", "--to", tmp_path / "new")
    for arguments, sentence in (
        ((*llm, "--model", "tiny", "--to", tmp_path / "full"), "full already exists and is not empty"),
        ((*llm, "--model", "tiny", "--to", tmp_path / "file"), "file already exists"),
        ((*llm, "--model", "tiny", "--to", tmp_path / "file" / "x"), "file is not a folder"),
        ((*llm, "--model", "tiny", "--to", "/proc/omni"), "/proc/omni cannot be written"),
        (made, "no part is given: name --llm, --vision, --whisper or --vocoder"),
        ((*llm, "--model", "big", "--to", tmp_path / "new"), "model 'big' is neither a variant"),
        ((*llm, *made, "--branches", "brain"), "--branches names 'brain'"),
        ((*llm, *made, "--branches", "vision"), "branch llm comes from a part, but --branches leaves it out"),
        ((*llm, "--vocoder", vocoder, "--to", tmp_path / "new"), "reads 20 mels (in_channels), the model makes 80"),
        ((*llm, "--vocoder", tmp_path / "none.pt", *made), "none.pt is not there"),
        ((*llm, "--vocoder", "/", *made), "vocoder / is neither .safetensors nor .pt"),
    ):
        assert command("from-parts", *arguments) == 2, arguments
        error = capsys.readouterr().err
        # The bar of the one that begins to write stands before it.
        assert sentence in error.splitlines()[-1]
        assert error.count("error: ") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "full", "hf"]
    assert command("to-whisper", "--from", tmp_path / "hf", "--to", tmp_path / "new") == 2
    assert "is neither a checkpoint (branches.json) nor a workdir" in capsys.readouterr().err


def test_a_checkpoint_without_the_part_is_refused(command, originals, tmp_path, capsys):
    made = ("--llm", originals / "llm", "--model", "tiny", "--branches", "llm", "--to", tmp_path / "omni")
    assert command("from-parts", *made) == 0
    for form, sentence in (
        ("qwen2-vl", "has no branch vision: there is no vision tower to export"),
        ("whisper", "has no branch audio_encoder: there is no audio encoder to export"),
    ):
        assert command(f"to-{form}", "--from", tmp_path / "omni", "--to", tmp_path / "back") == 2
        assert sentence in capsys.readouterr().err
        assert not (tmp_path / "back").exists()


def test_a_full_disk_is_one_sentence_and_nothing_stays(originals, tmp_path):
    """A limit of file sizes stands for it: the operating system refuses the same call."""
    words = [sys.executable, "-m", "baichuan_omni_jax", "convert", "from-parts", "--llm", str(originals / "llm")]
    limit = (
        "import os, resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (60000, 60000)); "
        "os.execv(sys.argv[1], sys.argv[1:])"
    )
    words = [sys.executable, "-c", limit, *words, "--model", "tiny", "--to", str(tmp_path / "deep" / "omni")]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": ""}
    done = subprocess.run(words, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "deep/omni cannot be written: " in done.stderr.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_a_kill_leaves_nothing_that_is_taken_for_a_checkpoint(originals, tmp_path):
    """SIGKILL while the second branch is written; the same command then does its work, and removes what was left."""
    flags = [value for part in ("llm", "vision", "whisper") for value in (f"--{part}", str(originals / part))]
    target = tmp_path / "omni"
    words = [sys.executable, "-m", "baichuan_omni_jax", "convert", "from-parts", *flags, "--model", "tiny"]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "JAX_PLATFORMS": "cpu"}
    start = dict(cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    with subprocess.Popen([*words, "--to", str(target)], **start) as process:
        begun = wait_until(process, lambda: any(tmp_path.glob(".omni.part-*/params/audio_encoder")))
        process.send_signal(signal.SIGKILL)
        assert begun, process.communicate()[0]
    assert process.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".omni.part-")
    for folder in (target, left):
        with pytest.raises(ConfigError, match="is neither a checkpoint"):
            find_checkpoint(folder)
    assert main(["convert", "from-parts", *flags, "--model", "tiny", "--to", str(target)]) == 0
    assert find_checkpoint(target) == target
    assert read_hf(target / "config.json").llm.hidden_size == 64
    # Of the killed process nothing is left either.
    assert list(tmp_path.iterdir()) == [target]
