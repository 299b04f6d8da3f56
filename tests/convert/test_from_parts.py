"""A checkpoint put together from public models: what it holds, what it computes, and each part back again."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from baichuan_omni_jax.branches import BRANCHES, MODEL_BRANCHES
from baichuan_omni_jax.checkpoint import abstract_branches, load_branches
from baichuan_omni_jax.cli.main import main
from baichuan_omni_jax.config import read_hf, tiny
from baichuan_omni_jax.convert import open_weights
from baichuan_omni_jax.generation.loading import load_for_generation
from baichuan_omni_jax.nn.param import ComputePolicy, initialize, named_values, named_variables
from data_pipelines.tokenizers.tokenizer import SPECIAL_TOKENS, check_tokenizer, load_tokenizer
from tests.helpers import public_models as public
from tests.helpers.micro import REPOSITORY, read_metrics

# 59 tokens of ours, of which the tokenizer has three: the others take the rows behind its 303.
NEW = public.new_rows()
FORMS = {"qwen2": "llm", "qwen2-vl": "vision", "whisper": "whisper"}
PREFIXES = {"qwen2": "", "qwen2-vl": "visual.", "whisper": "model.encoder."}


@pytest.fixture(scope="module")
def command():
    """`baichuan-omni convert` with these arguments -> exit code."""

    def run(*arguments: object) -> int:
        return main(["convert", *map(str, arguments)])

    return run


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def folders(request, tmp_path_factory) -> dict[str, Path]:
    """The three public folders."""
    root = tmp_path_factory.mktemp("public")
    return {
        "llm": public.write_qwen2(root / "llm", tied=request.param),
        "vision": public.write_qwen2_vl(root / "vision"),
        "whisper": public.write_whisper(root / "whisper"),
    }


@pytest.fixture(scope="module")
def checkpoint(command, folders, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("made") / "omni"
    flags = [value for part, folder in folders.items() for value in (f"--{part}", folder)]
    assert command("from-parts", *flags, "--model", "tiny", "--to", target) == 0
    return target


@pytest.mark.parametrize("form", FORMS)
def test_a_part_comes_back_to_the_byte(command, folders, checkpoint, tmp_path, form):
    """Every tensor; of the two tables all rows but those of the tokens that were added."""
    assert command(f"to-{form}", "--from", checkpoint, "--to", tmp_path / "back") == 0
    before, after = open_weights(folders[FORMS[form]]), open_weights(tmp_path / "back")
    names = {name for name in before.infos if name.startswith(PREFIXES[form])}
    assert names == set(after.infos)
    for name in names:
        there, back = before.read(name), after.read(name)
        assert there.dtype == back.dtype
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            back[list(NEW)] = there[list(NEW)]
        assert there.tobytes() == back.tobytes(), name


def test_new_rows_are_the_mean_of_those_in_use(folders, checkpoint):
    llm = load(checkpoint, "llm")
    weights = open_weights(folders["llm"])
    for ours, theirs in (("embedding", "model.embed_tokens.weight"), ("head", "lm_head.weight")):
        table = weights.read(theirs if theirs in weights.infos else "model.embed_tokens.weight")
        mean = table[:303].astype(np.float64).mean(0)
        np.testing.assert_allclose(llm[ours][list(NEW)], np.tile(mean, (len(NEW), 1)), atol=1e-6)
        # Rows that no token has stay as they were.
        np.testing.assert_array_equal(llm[ours][NEW.stop :], table[NEW.stop :])


def test_sizes_follow_the_parts(checkpoint):
    cfg = read_hf(checkpoint / "config.json")
    assert (cfg.llm.hidden_size, cfg.vision.out_dim, cfg.audio_head.head_dim) == (64, 64, 64)
    assert (cfg.vision.depth, cfg.vision.embed_dim) == (2, 32)
    assert (cfg.audio.d_model, cfg.audio.code_dim, cfg.flow.prenet_in_dim) == (32, 128, 32)
    assert (cfg.audio.max_audio_seconds, cfg.audio.decoder_ffn_dim, cfg.audio.decoder_attention_heads) == (2, 64, 2)
    shapes = {name: value.shape for name, value in load(checkpoint, "audio_encoder").items()}
    assert shapes["quantizer.levels.0.embed"] == (64, 128)
    assert shapes["bridge.down_proj.weight"] == (128, 128)


def test_the_record_says_what_came_from_where(folders, checkpoint):
    record = json.loads((checkpoint / "parent.json").read_text())
    names = {"llm": "llm", "vision": "vision", "audio_encoder": "whisper"}
    assert record["checkpoints"] == {branch: str(folders[part]) for branch, part in names.items()}
    drawn = ["audio_encoder.bridge", "audio_encoder.quantizer", "audio_decoder", "audio_head", "flow"]
    assert sorted(record["random"]) == sorted(drawn)


def test_the_checkpoint_opens_for_generation(checkpoint):
    loaded = load_for_generation(str(checkpoint))
    assert set(loaded.untrained) == {"audio_encoder", "audio_decoder", "audio_head", "flow"}
    tokenizer = load_tokenizer(loaded.tokenizer)
    check_tokenizer(tokenizer, loaded.config)
    # The tokenizer's own ids stay; ours follow in the released order.
    own = public.own_tokenizer()
    text = "The lake, 湖面 is 12 calm!"
    assert tokenizer.encode(text).ids == own.encode(text).ids
    new = [name for name in SPECIAL_TOKENS if name not in public.OWN_TOKENS]
    assert [tokenizer.token_to_id(name) for name in new] == list(NEW)
    assert [tokenizer.token_to_id(name) for name in public.OWN_TOKENS] == [300, 301, 302]


def test_what_no_part_gives_is_as_a_new_module_draws_it(checkpoint):
    values = load(checkpoint, "audio_encoder")
    for q in range(8):
        codes = values[f"quantizer.levels.{q}.embed"]
        np.testing.assert_array_equal(codes, values[f"quantizer.levels.{q}.embed_avg"])
        assert np.all(values[f"quantizer.levels.{q}.cluster_size"] == 1)
        assert codes.std() == pytest.approx(0.5 * 0.9**q, rel=0.1)
    head = load(checkpoint, "audio_head")
    # Layers differ from one another, levels too.
    assert not np.array_equal(head["head.layers.linear1.weight"][0], head["head.layers.linear1.weight"][1])
    assert not np.array_equal(head["embedding.tables.4"], head["embedding.tables.5"])
    assert head["embedding.tables.0"].std() == pytest.approx(0.02, rel=0.1)
    assert np.all(head["head.norm.scale"] == 1)


def test_the_whole_goes_to_the_released_form_and_back(command, checkpoint, tmp_path):
    """With every buffer that the released code computes."""
    assert command("to-torch", "--from", checkpoint, "--to", tmp_path / "hf") == 0
    assert command("to-jax", "--from", tmp_path / "hf", "--to", tmp_path / "again") == 0
    for branch in MODEL_BRANCHES:
        before, after = load(checkpoint, branch), load(tmp_path / "again", branch)
        assert before.keys() == after.keys()
        assert all(before[name].tobytes() == after[name].tobytes() for name in before)
    tensors = open_weights(tmp_path / "hf").infos
    assert sum(name.endswith("positional_embedding") for name in tensors) == 3


def test_a_plan_says_everything_and_writes_nothing(command, folders, tmp_path, capsys):
    """A merger of another width than the language model's is no projector for it."""
    narrow = public.write_qwen2_vl(tmp_path / "narrow", hidden_size=48, home="model.visual.", dtype="float16")
    flags = ("--llm", folders["llm"], "--vision", narrow, "--branches", "llm,vision")
    assert command("from-parts", *flags, "--model", "tiny", "--to", tmp_path / "omni", "--dry-run") == 0
    output = capsys.readouterr().out
    tied = "tied embeddings: the output head begins as a copy of the text embedding"
    assert (tied in output) == ("lm_head.weight" not in open_weights(folders["llm"]).infos)
    for line in (
        "llm: 27 tensors, ",
        "vision: 25 tensors, ",
        "model.visual.blocks.{layer}.attn.qkv.weight (x2) <-> vision.tower.layers.attention.q_proj.weight, ",
        "vision.projector: random, 24,832 values of float32",
        "vision.projector is random: Qwen2-VL's makes 48 values, the language model is 64 wide",
        "56 special tokens take the free rows 303 to 358 of text embedding and output head",
        "at the mean of the 303 rows of the tokenizer's own tokens",
    ):
        assert line in output
    assert not (tmp_path / "omni").exists()


@pytest.mark.parametrize("home", ["encoder.", ""])
def test_an_encoder_of_its_own_comes_back(command, home, tmp_path):
    """As `WhisperModel` and `WhisperEncoder` are saved, in fp16, with 80 mels and other positions."""
    sizes = {"num_mel_bins": 80, "d_model": 48, "encoder_attention_heads": 3, "max_source_positions": 50}
    folder = public.write_whisper(tmp_path / "whisper", home=home, dtype="float16", **sizes)
    made = ("--whisper", folder, "--model", "tiny", "--branches", "audio_encoder", "--to", tmp_path / "omni")
    assert command("from-parts", *made) == 0
    assert command("to-whisper", "--from", tmp_path / "omni", "--to", tmp_path / "back") == 0
    before, after = open_weights(folder), open_weights(tmp_path / "back")
    assert {name for name in before.infos if "decoder" not in name} == {
        home + name.removeprefix("model.encoder.") for name in after.infos
    }
    for name in after.infos:
        assert before.read(home + name.removeprefix("model.encoder.")).tobytes() == after.read(name).tobytes()


def load(checkpoint: Path, branch: str) -> dict[str, np.ndarray]:
    abstract = abstract_branches(read_hf(checkpoint / "config.json"), only=[branch])
    return {name: np.asarray(x) for name, x in named_values(load_branches(str(checkpoint), abstract)[branch]).items()}


def test_the_first_stage_starts_from_it(command, quick_pretrain, tmp_path):
    """`image_text_1` of the recipe, two steps: the projector learns, the tower goes back as it came."""
    vision = public.write_qwen2_vl(tmp_path / "vision")
    flags = ("--llm", public.write_qwen2(tmp_path / "llm", tied=True), "--vision", vision, "--model", "tiny")
    made, workdir = tmp_path / "omni", tmp_path / "run"
    assert command("from-parts", *flags, "--branches", "llm,vision,audio_head", "--to", made) == 0
    sizes = (f"model={made / 'config.json'}", f"checkpoint.init_from={made}", "data.budgets.tokens=1024")
    stage = REPOSITORY / "configs" / "image_text_1_tiny.py"
    done = quick_pretrain(workdir, *sizes, "train.steps=2", "checkpoint.every=2", config=stage)
    assert done.returncode == 0, done.stderr
    rows = read_metrics(workdir)
    assert len(rows) == 2
    assert all(np.isfinite(row["loss"]) and row["loss"] > 0 for row in rows)
    assert json.loads((workdir / "parent.json").read_text())["checkpoints"]["vision"] == str(made)
    assert command("to-qwen2-vl", "--from", workdir, "--to", tmp_path / "back") == 0
    before, after = open_weights(vision), open_weights(tmp_path / "back")
    same = {name: before.read(name).tobytes() == after.read(name).tobytes() for name in after.infos}
    assert {name for name, equal in same.items() if not equal} == {n for n in same if n.startswith("visual.merger.")}
    # The special tokens' rows have learned, so the tables are two now.
    assert command("to-qwen2", "--from", workdir, "--to", tmp_path / "text") == 0
    assert not json.loads((tmp_path / "text" / "config.json").read_text())["tie_word_embeddings"]


@pytest.mark.parametrize("branch", MODEL_BRANCHES)
def test_every_parameter_knows_its_first_values(branch):
    """`moments` are what the constructor draws by: a converter draws by them alone."""
    build = BRANCHES[branch].build
    module = initialize(lambda key: build(key, tiny(), ComputePolicy()), jax.random.key(0))
    for name, variable in named_variables(module).items():
        mean, std = variable.moments
        values = np.asarray(variable.get_value())
        if std:
            # Of n values the mean strays by std / sqrt(n), the spread by half of that.
            assert abs(values.mean() - mean) < 6 * std / values.size**0.5, name
            assert abs(values.std() - std) < 6 * std / values.size**0.5, name
        else:
            assert np.all(values == mean), name
