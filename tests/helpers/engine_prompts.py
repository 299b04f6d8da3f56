"""A small model, its tokenizer, and prompts of all kinds for the tests of the generating engine."""

from dataclasses import dataclass, field, replace
from functools import cache

import jax
import numpy as np
from jax.sharding import Mesh

from baichuan_omni_jax.audio.encoder import AudioEncoderBranch
from baichuan_omni_jax.config import MeshConfig, OmniConfig, tiny
from baichuan_omni_jax.llm.audio_head import AudioHeadBranch
from baichuan_omni_jax.llm.model import LanguageModel
from baichuan_omni_jax.nn.param import ComputePolicy, named_variables, with_values
from baichuan_omni_jax.sharding import make_mesh, parameter_sharding
from baichuan_omni_jax.vision.model import VisionModel
from data_pipelines.tokenizers.tokenizer import train_tokenizer

COMPUTE = ComputePolicy(remat="none", attention_block=64)
LEVELS = 8
TEXTS = ("To be, or not to be. That is it!", "What? Say no more, please.", "你好，世界。再见！好吗？" * 9)


def numbers(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.int32)


@dataclass(frozen=True)
class TestPrompt:
    """The fields of an encoded prompt; text alone unless more is given."""

    __test__ = False

    tokens: np.ndarray
    audio_codes: np.ndarray = field(default_factory=lambda: numbers(0, LEVELS))
    audio_slots: np.ndarray = field(default_factory=lambda: numbers(0))
    patches: np.ndarray = field(default_factory=lambda: np.zeros((0, 588), np.uint8))
    patch_grid: np.ndarray = field(default_factory=lambda: numbers(0, 2))
    patch_frames: np.ndarray = field(default_factory=lambda: numbers(0))
    visual_slots: np.ndarray = field(default_factory=lambda: numbers(0))
    mels: tuple[np.ndarray, ...] = ()
    mel_places: tuple[int, ...] = ()


def text_prompt(tokens) -> TestPrompt:
    return TestPrompt(np.asarray(tokens, np.int32))


def random_text(rng: np.random.Generator, cfg: OmniConfig, n: int) -> TestPrompt:
    return text_prompt(rng.integers(60, cfg.llm.vocab_size, n))


def media_prompt(rng: np.random.Generator, cfg: OmniConfig, pictures=(4, 8), codes: int = 6, mels: int = 0):
    """Text, pictures of these many patches, text, spoken codes, text and, with `mels`, a window of so many frames."""
    text = lambda n: rng.integers(60, cfg.llm.vocab_size, n).tolist()  # noqa: E731
    tokens, visual, audio = text(3), [], []
    for size in pictures:
        visual += range(len(tokens), len(tokens) + size // 4)
        tokens += [cfg.tokens.image_pad] * (size // 4)
    tokens += text(2)
    heard = cfg.audio.bridge_length(mels)
    for count in (codes, heard):
        audio += range(len(tokens), len(tokens) + count)
        tokens += [cfg.tokens.audio_pad] * count + text(2)
    frames = np.repeat(np.arange(1, len(pictures) + 1), pictures).astype(np.int32)
    grid = np.concatenate([np.stack([np.arange(n) // 2, np.arange(n) % 2], -1) for n in pictures])
    spoken = rng.integers(0, cfg.audio.codebook_sizes, (codes, LEVELS))
    return TestPrompt(
        tokens=np.array(tokens, np.int32),
        audio_codes=np.concatenate([spoken, numbers(heard, LEVELS)]).astype(np.int32),
        audio_slots=np.array(audio, np.int32),
        patches=rng.integers(0, 256, (len(frames), 588)).astype(np.uint8),
        patch_grid=grid.astype(np.int32),
        patch_frames=frames,
        visual_slots=np.array(visual, np.int32),
        mels=(rng.standard_normal((mels, cfg.audio.num_mel_bins)).astype(np.float32),) if mels else (),
        mel_places=(codes,) if mels else (),
    )


def small_config() -> OmniConfig:
    """`tiny()` with fewer layers and a vocabulary that the tokenizer of the tests fills better."""
    cfg = tiny()
    return replace(
        cfg,
        llm=replace(cfg.llm, num_layers=2, vocab_size=512),
        audio=replace(cfg.audio, encoder_layers=1),
        vision=replace(cfg.vision, depth=1),
        audio_head=replace(cfg.audio_head, num_layers=1),
    )


def small_branches(mesh: Mesh, cfg: OmniConfig) -> dict:
    """Random weights, made on the host: drawing them by JAX takes longer to compile than all the rest."""
    head = (cfg.audio_head, cfg.audio.codebook_sizes, cfg.llm.hidden_size, COMPUTE)
    make = {
        "llm": lambda: LanguageModel(jax.random.key(0), cfg.llm, COMPUTE),
        "audio_head": lambda: AudioHeadBranch(jax.random.key(0), *head),
        "vision": lambda: VisionModel(jax.random.key(0), cfg.vision, COMPUTE),
        "audio_encoder": lambda: AudioEncoderBranch(jax.random.key(0), cfg.audio, COMPUTE),
    }
    branches, rng = {name: jax.eval_shape(function) for name, function in make.items()}, np.random.default_rng(1)
    for branch, module in branches.items():
        values = {}
        for name, variable in named_variables(module).items():
            value = np.ones(variable.shape) if "scale" in name else 0.1 * rng.standard_normal(variable.shape)
            sharding = parameter_sharding(mesh, COMPUTE.rules, variable, name)
            values[name] = jax.device_put(value.astype(np.float32), sharding)
        branches[branch] = with_values(module, values)
    return branches


@cache
def tokenizer():
    return train_tokenizer(TEXTS, 400)


def one_device() -> Mesh:
    return make_mesh(MeshConfig(), jax.devices()[:1])
