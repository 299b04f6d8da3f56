"""The folders of public models that ours is put together from, as sources of tensors, each with its plan.

A plan reads configurations, headers and the tokenizer, and refuses whatever does not fit before a tensor is moved.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from baichuan_omni_jax.checkpoint import abstract_branches
from baichuan_omni_jax.checkpoint.branches import CONFIG
from baichuan_omni_jax.config import OmniConfig
from baichuan_omni_jax.config.parts import (
    TextVocabulary,
    audio_from_whisper,
    check_tokens,
    join_parts,
    llm_from_qwen2,
    pixel_statistics,
    vision_from_qwen2_vl,
)
from baichuan_omni_jax.convert.files import check_buffer
from baichuan_omni_jax.convert.plan import plan_from_tensors, raise_problems, rotary_buffers
from baichuan_omni_jax.convert.rules import Rule
from baichuan_omni_jax.convert.safetensors_io import TensorInfo, TensorSource, blocks_of, open_weights
from baichuan_omni_jax.convert.tables import AUDIO_ENCODER, qwen2_rules, qwen2_vl_rules, whisper_rules
from baichuan_omni_jax.convert.to_jax import ConversionJob
from baichuan_omni_jax.errors import ConfigError
from baichuan_omni_jax.storage import read_json_object

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# Where tower and encoder lie in a whole model's file (of transformers 4, then 5), and in one of their own.
_TOWER_HOMES = ("visual.", "model.visual.", "")
_ENCODER_HOMES = ("model.encoder.", "encoder.", "")


@dataclass(frozen=True, kw_only=True)
class PublicParts:
    """The folders that a checkpoint is put together from, as Hugging Face has them; `vocoder` is a file."""

    llm: Path | None = None
    vision: Path | None = None
    whisper: Path | None = None
    vocoder: Path | None = None


@dataclass(frozen=True)
class PartTensors:
    """Some tensors of a folder, some under a further name, and rows of some replaced by the mean of others.

    Attributes:
        source: the folder's tensors.
        names: name here -> name there.
        rows: name here -> (rows whose mean is taken, rows that become it).
    """

    source: TensorSource
    names: Mapping[str, str]
    rows: Mapping[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    _means: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def location(self) -> str:
        return self.source.location

    @property
    def infos(self) -> dict[str, TensorInfo]:
        return {name: self.source.infos[theirs] for name, theirs in self.names.items()}

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        """Reads a tensor, or some rows of it, with the mean in the rows that are replaced."""
        value = self.source.read(self.names[name], rows)
        if name in self.rows:
            start = 0 if rows is None else rows.start
            known, new = self.rows[name]
            here = new[(new >= start) & (new < start + len(value))]
            if here.size:
                value[here - start] = self._mean(self.names[name], known)
        return value

    def _mean(self, theirs: str, known: np.ndarray) -> np.ndarray:
        """Computes the mean of the rows `known` of a table, by blocks, each summed in fp32 and all of them in fp64."""
        if theirs not in self._means:
            info = self.source.infos[theirs]
            weights = np.zeros(info.shape[0], np.float32)
            weights[known] = 1
            # fp32 copies of a bf16 block take twice its room.
            total = np.zeros(info.shape[1], np.float64)
            for rows in blocks_of(info.shape, 4):
                total += weights[rows] @ self.source.read(theirs, rows).astype(np.float32)
            self._means[theirs] = (total / len(known)).astype(info.dtype)
        return self._means[theirs]


def read_sizes(
    parts: PublicParts, base: OmniConfig, read_vocabulary: Callable[[Path, int], TextVocabulary] | None
) -> tuple[OmniConfig, TextVocabulary | None, bool]:
    """Reads the parts' configurations and the tokenizer; returns the model's sizes, and whether the head is tied."""
    cfg, vocabulary, tied = base, None, False
    # Each joins those before it, so that a width that no model can have is said of the file that gives it.
    if parts.llm is not None:
        assert read_vocabulary is not None
        stated = read_json_object(parts.llm / CONFIG)
        with _naming(parts.llm / CONFIG):
            llm, tied = llm_from_qwen2(stated)
        vocabulary = read_vocabulary(parts.llm, llm.vocab_size)
        check_tokens(vocabulary, stated, parts.llm / CONFIG)
        with _naming(parts.llm / CONFIG):
            cfg = join_parts(cfg, llm=llm, tokens=vocabulary.tokens)
    if parts.vision is not None:
        path = parts.vision / "preprocessor_config.json"
        processor = read_json_object(path) if path.exists() else {}
        stated = read_json_object(parts.vision / CONFIG)
        with _naming(parts.vision / CONFIG):
            cfg = join_parts(cfg, vision=vision_from_qwen2_vl(stated, base.vision))
        with _naming(path):
            cfg = join_parts(cfg, vision=replace(cfg.vision, **pixel_statistics(processor)))
    if parts.whisper is not None:
        stated = read_json_object(parts.whisper / CONFIG)
        with _naming(parts.whisper / CONFIG):
            cfg = join_parts(cfg, audio=audio_from_whisper(stated, base.audio))
    return cfg, vocabulary, tied


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Puts the file in front of what a ConfigError says of it."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def plan_llm(
    folder: Path, cfg: OmniConfig, vocabulary: TextVocabulary | None, tied: bool, notes: list[str]
) -> ConversionJob:
    """Plans the language model: every tensor of the folder, and the rows of our special tokens."""
    weights = open_weights(folder)
    dropped = rotary_buffers(weights, cfg)
    names = {name: name for name in weights.infos if name not in dropped}
    if tied and EMBEDDING in names:
        # Whatever the file holds as a head, transformers takes the embedding for it.
        names[HEAD] = EMBEDDING
        notes.append("tied embeddings: the output head begins as a copy of the text embedding")
    rows: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    if vocabulary is not None and vocabulary.added:
        new = np.array(sorted(vocabulary.added.values()))
        rows = {EMBEDDING: (vocabulary.known, new), HEAD: (vocabulary.known, new)}
        notes.append(
            f"{len(new)} special tokens take the free rows {new[0]} to {new[-1]} of text embedding and output head, "
            f"at the mean of the {len(vocabulary.known):,} rows of the tokenizer's own tokens"
        )
    job = _plan_part(PartTensors(weights, names, rows), "llm", qwen2_rules(cfg), cfg)
    job.plan.dropped = dropped
    return job


def plan_vision(folder: Path, cfg: OmniConfig, notes: list[str]) -> ConversionJob:
    """Plans Qwen2-VL's tower, and its merger as the projector where it writes into this language model's width."""
    weights = open_weights(folder)
    home = _find_home(weights, _TOWER_HOMES, "patch_embed.proj.weight", "Qwen2-VL tower")
    last = weights.infos.get(f"{home}merger.mlp.2.weight")
    width = last.shape[0] if last and last.shape else 0
    projector = width == cfg.llm.hidden_size
    if not projector:
        has = f"makes {width} values" if width else "is not there"
        notes.append(f"vision.projector is random: Qwen2-VL's {has}, the language model is {cfg.llm.hidden_size} wide")
    names = {name: name for name in weights.infos if name.startswith(home)}
    if not projector:
        names = {name: name for name in names if not name.startswith(f"{home}merger.")}
    rules = qwen2_vl_rules(cfg, home, projector=projector)
    return _plan_part(PartTensors(weights, names), "vision", rules, cfg)


def plan_whisper(folder: Path, cfg: OmniConfig, buffers: dict[str, np.ndarray]) -> ConversionJob:
    """Plans Whisper's encoder; its position table, which is computed here, goes into `buffers` to be given back."""
    weights = open_weights(folder)
    home = _find_home(weights, _ENCODER_HOMES, "conv1.weight", "Whisper encoder")
    names = {name: name for name in weights.infos if name.startswith(home)}
    job = _plan_part(PartTensors(weights, names), "audio_encoder", whisper_rules(cfg, home), cfg)
    for name, rule in job.plan.buffers.items():
        buffers[f"{AUDIO_ENCODER}.positional_embedding"] = found = weights.read(name)
        raise_problems(check_buffer(name, found, rule.restored()), weights.location)
    return job


def _find_home(weights: TensorSource, homes: Iterable[str], tensor: str, what: str) -> str:
    """Finds what stands before the names of a part. Raises ConfigError where the folder does not hold it."""
    homes = tuple(homes)
    home = next((home for home in homes if f"{home}{tensor}" in weights.infos), None)
    if home is None:
        raise ConfigError(f"{weights.location} holds no {what}: there is no tensor {homes[0]}{tensor}")
    return home


def _plan_part(source: PartTensors, branch: str, rules: list[Rule], cfg: OmniConfig) -> ConversionJob:
    """Plans the parameters that `rules` name. Raises ConfigError naming the first tensors that do not fit."""
    module = abstract_branches(cfg, only=[branch])[branch]
    # What the rules fill, by the module's own parts (`tower`, `encoder`): the rest of the branch is not this folder's.
    tops = {name.partition(".")[0] for rule in rules for name in rule.parameters}
    own = {name: getattr(module, name) for name in sorted(tops)}
    return ConversionJob(
        source, plan_from_tensors(source.infos, {branch: rules}, {branch: own}, source.location, only=[branch])
    )
