"""Folders that transformers wrote, put together: they compute what they did, and each comes back as transformers' own.

fp32, 1e-5 of the largest value.
"""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from baichuan_omni_jax.checkpoint import abstract_branches, load_branches
from baichuan_omni_jax.cli.main import main
from baichuan_omni_jax.config import read_hf
from baichuan_omni_jax.convert import open_weights
from tests.helpers import public_models as public
from tests.helpers.untrained import assert_close

torch = pytest.importorskip("torch", reason=public.WHY)
transformers = pytest.importorskip("transformers", reason=public.WHY)


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def tied(request) -> bool:
    return request.param


@pytest.fixture(scope="module")
def theirs(tied) -> dict[str, Any]:
    """Models of transformers with random values in every tensor."""
    made = public.transformers_models()
    return {"llm": made["qwen2"](tied), "vision": made["qwen2_vl"](), "whisper": made["whisper"]()}


@pytest.fixture(scope="module")
def folders(theirs, tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("public")
    for part, model in theirs.items():
        model.save_pretrained(root / part)
    public.own_tokenizer().save(str(root / "llm" / "tokenizer.json"))
    return {part: root / part for part in theirs}


@pytest.fixture(scope="module")
def checkpoint(folders, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("made") / "omni"
    flags = [value for part, folder in folders.items() for value in (f"--{part}", str(folder))]
    assert main(["convert", "from-parts", *flags, "--model", "tiny", "--to", str(target)]) == 0
    return target


def module(checkpoint: Path, branch: str) -> Any:
    return load_branches(str(checkpoint), abstract_branches(read_hf(checkpoint / "config.json"), only=[branch]))[branch]


def compute(model: Any, *arguments: Any, **named: Any) -> Any:
    with torch.no_grad():
        return model(*arguments, **named)


def tokens(new: range) -> np.ndarray:
    """Ids of a batch of texts: every row of the table but those that were added."""
    ids = np.setdiff1d(np.arange(public.ROWS), list(new))
    return np.random.default_rng(1).choice(ids, (2, 60)).astype(np.int32)


def test_logits_of_text_are_unchanged(theirs, checkpoint, exact):
    """Of every token but those that were added: neither their rows nor their logits touch any other."""
    from baichuan_omni_jax.verify.run import _our_logits

    new = public.new_rows()
    ids = tokens(new)
    reference = compute(theirs["llm"], torch.from_numpy(ids).long()).logits.numpy()
    ours = _our_logits(read_hf(checkpoint / "config.json"), checkpoint, ids, np.ones_like(ids))
    kept = np.setdiff1d(np.arange(public.ROWS), list(new))
    assert_close(ours[..., kept], reference[..., kept])


def test_image_features_are_equal(theirs, checkpoint, exact):
    """Two images side by side: 4 x 6 and 2 x 4 patches, in groups of 2 x 2, of two different temporal slices."""
    shapes = ((4, 6), (2, 4))
    patches = np.random.default_rng(2).standard_normal((sum(h * w for h, w in shapes), 1176)).astype(np.float32)
    grid = torch.tensor([[1, h, w] for h, w in shapes])
    reference = compute(theirs["vision"].model.visual, torch.from_numpy(patches), grid).pooler_output.numpy()
    places = [
        (2 * y + dy, 2 * x + dx)
        for h, w in shapes
        for y in range(h // 2)
        for x in range(w // 2)
        for dy in (0, 1)
        for dx in (0, 1)
    ]
    segments = np.repeat([1, 2], [h * w for h, w in shapes])
    ours = module(checkpoint, "vision")(
        jnp.asarray(patches)[None], jnp.asarray(places, jnp.int32)[None], jnp.asarray(segments, jnp.int32)[None]
    )
    assert_close(ours[0], reference)


def test_encoder_states_are_equal(theirs, checkpoint, exact):
    """Of whole windows: of shorter clips Whisper also encodes the silence behind them."""
    mel = np.random.default_rng(3).standard_normal((2, 200, public.WHISPER["num_mel_bins"])).astype(np.float32)
    reference = compute(theirs["whisper"].model.encoder, torch.from_numpy(mel).transpose(1, 2))
    ours = module(checkpoint, "audio_encoder").encoder(jnp.asarray(mel), jnp.array([200, 200], jnp.int32))
    assert_close(ours, reference.last_hidden_state.numpy())


@pytest.mark.parametrize("form", ["qwen2", "qwen2-vl", "whisper"])
def test_a_part_is_loaded_by_transformers_again(theirs, checkpoint, tied, tmp_path, form):
    """By `Auto` classes, without a word of sizes: the very values, of the two tables all rows but the new ones."""
    folder = tmp_path / "back"
    assert main(["convert", f"to-{form}", "--from", str(checkpoint), "--to", str(folder)]) == 0
    if form == "qwen2":
        before, after = theirs["llm"], transformers.AutoModelForCausalLM.from_pretrained(str(folder))
        assert after.config.tie_word_embeddings == tied
        assert ("lm_head.weight" in open_weights(folder).infos) == (not tied)
    elif form == "qwen2-vl":
        before, after = theirs["vision"].model.visual, transformers.AutoModel.from_pretrained(str(folder)).visual
        transformers.AutoImageProcessor.from_pretrained(str(folder))
    else:
        before, after = theirs["whisper"].model.encoder, transformers.AutoModel.from_pretrained(str(folder)).encoder
        transformers.AutoFeatureExtractor.from_pretrained(str(folder))
    states, found = before.state_dict(), after.state_dict()
    assert states.keys() == found.keys()
    for name, value in states.items():
        back = found[name].clone()
        if "embed_tokens" in name or "lm_head" in name:
            back[list(public.new_rows())] = value[list(public.new_rows())]
        assert torch.equal(back, value), name


def test_the_tokenizer_is_that_of_transformers(checkpoint, tmp_path):
    assert main(["convert", "to-qwen2", "--from", str(checkpoint), "--to", str(tmp_path / "back")]) == 0
    read = transformers.AutoTokenizer.from_pretrained(str(tmp_path / "back"))
    text = "<C_Q>The lake, 湖面 is 12 calm!<img_start_baichuan><C_A>"
    ids = read.encode(text, add_special_tokens=False)
    own = public.own_tokenizer().encode("The lake, 湖面 is 12 calm!").ids
    assert ids[1:-2] == own
    assert all(ids[i] in public.new_rows() for i in (0, -2, -1))
