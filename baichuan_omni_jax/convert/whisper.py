"""The encoder of a Whisper checkpoint, as Hugging Face has it, for an audio tokenizer that is yet to be trained."""

from dataclasses import replace
from pathlib import Path

import jax

from baichuan_omni_jax.audio.config import AudioConfig
from baichuan_omni_jax.audio.model import AudioTokenizer
from baichuan_omni_jax.checkpoint import with_shardings
from baichuan_omni_jax.checkpoint.branches import CONFIG
from baichuan_omni_jax.config import MeshConfig, OmniConfig
from baichuan_omni_jax.convert.audio_encoder import ENCODER, audio_encoder_rules
from baichuan_omni_jax.convert.rules import Rule
from baichuan_omni_jax.convert.safetensors_io import open_weights
from baichuan_omni_jax.convert.to_jax import load_branch_from_safetensors
from baichuan_omni_jax.errors import ConfigError
from baichuan_omni_jax.nn.param import ComputePolicy
from baichuan_omni_jax.sharding import make_mesh
from baichuan_omni_jax.storage import read_json_object

OURS = "encoder."
# Where the encoder lies in a checkpoint with a language model's head, and in one without.
HOMES = ("model.encoder", "encoder")
SIZES = ("num_mel_bins", "d_model", "encoder_layers", "encoder_attention_heads", "encoder_ffn_dim")


def tokenizer_from_whisper(folder: Path, cfg: OmniConfig, seed: int = 0) -> AudioTokenizer:
    """The branch `audio_encoder`, fp32: the encoder of the Whisper checkpoint `folder`, random bridge and codebooks.

    Whisper's decoder is not read. Raises ConfigError naming the file, and the size or the tensors that do not fit.
    """
    weights = open_weights(folder)
    home = next((home for home in HOMES if f"{home}.conv1.weight" in weights.infos), None)
    if home is None:
        raise ConfigError(f"{weights.where} holds no Whisper encoder: there is no tensor {HOMES[0]}.conv1.weight")
    check_sizes(folder / CONFIG, cfg.audio)
    mesh, compute = make_mesh(MeshConfig(), jax.devices()[:1]), ComputePolicy()
    with jax.set_mesh(mesh):
        tokenizer = jax.jit(lambda: AudioTokenizer(jax.random.key(seed), cfg.audio, compute))()
        abstract = with_shardings(jax.eval_shape(lambda: tokenizer.encoder), mesh, compute.rules)
        rules = whisper_rules(cfg, home)
        tokenizer.encoder = load_branch_from_safetensors(weights, rules, abstract, branch="audio_encoder")
    return tokenizer


def whisper_rules(cfg: OmniConfig, home: str = HOMES[0]) -> list[Rule]:
    """Whisper's encoder at `home` -> `AudioEncoder`: the released model has its names. Positions are computed."""
    rules = [rule for rule in audio_encoder_rules(cfg) if rule.theirs.startswith(f"{ENCODER}.") and not rule.restore]
    return [
        replace(rule, theirs=rule.theirs.replace(ENCODER, home), ours=rule.ours.removeprefix(OURS)) for rule in rules
    ]


def check_sizes(path: Path, audio: AudioConfig) -> None:
    """Raises ConfigError where Whisper's `config.json` names another size than the model has."""
    sizes = read_json_object(path)
    for name in SIZES:
        if sizes.get(name) != getattr(audio, name):
            raise ConfigError(f"{path}: {name} is {sizes.get(name)}, the model's audio.{name} {getattr(audio, name)}")
