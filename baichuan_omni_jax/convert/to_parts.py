"""One part of a checkpoint as the public model that it has the form of, for transformers and what else reads those.

    llm             Qwen2ForCausalLM: Q, K and V apart, under Qwen2's own names; vLLM loads it too
    vision          a Qwen2-VL with the tower and the projector as its merger, and no layer of a language model
    audio_encoder   a Whisper with the encoder, and no layer of a decoder: bridge and codebooks are not Whisper's

A part that was not trained comes back as it was, to the byte; of the language model's tables all rows but those of the
special tokens that were added.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from baichuan_omni_jax.branches import BranchName
from baichuan_omni_jax.checkpoint import abstract_branches
from baichuan_omni_jax.checkpoint.branches import CONFIG, PROCESSOR
from baichuan_omni_jax.config import OmniConfig, read_hf
from baichuan_omni_jax.config.parts import (
    image_processor_config,
    mel_extractor_config,
    qwen2_config,
    qwen2_vl_config,
    whisper_config,
)
from baichuan_omni_jax.convert.files import list_companions, load_buffers
from baichuan_omni_jax.convert.leaf_store import BranchReader
from baichuan_omni_jax.convert.parts import HEAD
from baichuan_omni_jax.convert.plan import Advance, plan_from_leaves
from baichuan_omni_jax.convert.rules import Rule
from baichuan_omni_jax.convert.safetensors_io import SINGLE, blocks_of
from baichuan_omni_jax.convert.tables import AUDIO_ENCODER, qwen2_rules, qwen2_vl_rules, whisper_rules
from baichuan_omni_jax.convert.to_torch import SHARD_BYTES, CheckpointSource, Export, usual_dtype, write_export
from baichuan_omni_jax.errors import ConfigError
from baichuan_omni_jax.storage import check_target, read_json_object, staged_folder

PublicForm = Literal["qwen2", "qwen2-vl", "whisper"]
FORMS: tuple[PublicForm, ...] = get_args(PublicForm)
# What a form is made of, and how that is called in a sentence.
PART_BRANCHES: dict[PublicForm, BranchName] = {"qwen2": "llm", "qwen2-vl": "vision", "whisper": "audio_encoder"}
_NAMES = {"qwen2": "language model", "qwen2-vl": "vision tower", "whisper": "audio encoder"}

TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
_TOKENIZER_FILES = (TOKENIZER, "vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json")
# Classes of transformers that read these files without code of the folder.
_TOKENIZER_CLASSES = ("Qwen2Tokenizer", "Qwen2TokenizerFast", "PreTrainedTokenizerFast")
_CODE_KEYS = ("auto_map", "processor_class")
# The roles' marks in training (the chat template of the released tokenizer_config.json is another model's).
ROLES = {"system": "<B_SYS>", "user": "<C_Q>", "assistant": "<C_A>"}
CHAT_TEMPLATE = (
    "{% set marks = " + json.dumps(ROLES) + " %}"
    "{% for message in messages %}{{ marks[message['role']] + message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ marks['assistant'] }}{% endif %}"
)


def plan_to_part(source: CheckpointSource, form: PublicForm, dtype: str | None = None) -> Export:
    """Plans the export of one part, as `dtype` or (None) as it is stored.

    Raises ConfigError when `source` has no such branch, naming every parameter that does not fit.
    """
    branch = PART_BRANCHES[form]
    if branch not in source.readers:
        raise ConfigError(f"{source.home} has no branch {branch}: there is no {_NAMES[form]} to export")
    cfg, reader = read_hf(source.home / CONFIG), source.readers[branch]
    module: Any = abstract_branches(cfg, only=[branch])[branch]
    stored = reader.infos
    if form == "whisper":
        # The encoder alone: the rest of the branch has no place in a Whisper.
        stored = {name: info for name, info in stored.items() if name.startswith("encoder.")}
        module = {"encoder": module.encoder}
    rules = {"qwen2": qwen2_rules, "qwen2-vl": qwen2_vl_rules, "whisper": whisper_rules}[form](cfg)
    plan = plan_from_leaves({branch: stored}, {branch: rules}, {branch: module}, str(source.home))
    if form == "qwen2" and is_tied(reader, cfg):
        plan.entries[branch] = [entry for entry in plan.entries[branch] if entry.name != HEAD]
        del plan.tensors[HEAD]
    export = Export(plan, _positions(source.home, plan.buffers, np.dtype(dtype or usual_dtype(plan))))
    export.cast(dtype)
    return export


def is_tied(reader: BranchReader, cfg: OmniConfig) -> bool:
    """Returns whether the output head is the text embedding, to the byte: one table then says it all."""
    embedding, head = (reader.infos.get(name) for name in ("embedding", "head"))
    if embedding is None or embedding != head or cfg.llm.use_norm_head:
        return False
    # Tables that were trained differ in their first block already.
    return all(
        reader.read("embedding", (rows,)).tobytes() == reader.read("head", (rows,)).tobytes()
        for rows in blocks_of(embedding.shape, embedding.dtype.itemsize)
    )


def _positions(home: Path, buffers: dict[str, Rule], dtype: np.dtype) -> dict[str, np.ndarray]:
    """Returns Whisper's position table under its own name: as the source held it, or else computed."""
    ours = f"{AUDIO_ENCODER}.positional_embedding"
    found = {}
    for name, rule in buffers.items():
        held = load_buffers(home, {ours: rule}, dtype)
        found[name] = held[ours] if ours in held else rule.restored().astype(dtype)
    return found


def convert_to_part(
    source: CheckpointSource,
    target: Path,
    form: PublicForm,
    *,
    export: Export | None = None,
    shard_bytes: int = SHARD_BYTES,
    advance: Advance = lambda done: None,
) -> None:
    """Writes one part as a folder that transformers loads: weights, configurations, the tokenizer where it is known.

    Args:
        source: the branches, that of `form` among them.
        target: the folder to write, which is not there, or empty.
        form: the public model.
        export: what `plan_to_part` made of the same arguments (default: made here).
        shard_bytes: how large a safetensors file may be.
        advance: called with the bytes that are done, for a progress bar.

    Raises:
        ConfigError: something given cannot be used; nothing is left behind.
    """
    check_target(target)
    export = plan_to_part(source, form) if export is None else export
    cfg, stated = read_hf(source.home / CONFIG), read_json_object(source.home / CONFIG)
    # A normalized head is a plain head of normalized rows.
    changes: dict[str, Callable] = {HEAD: _normalize_rows} if form == "qwen2" and cfg.llm.use_norm_head else {}
    with staged_folder(target) as folder:
        write_export(folder, SINGLE, export, source.readers, shard_bytes, advance, changes)
        if form == "qwen2":
            values = qwen2_config(cfg, stated, export.dtype, tied=HEAD not in export.tensors)
            _write_json(folder / CONFIG, values)
            _write_json(folder / "generation_config.json", {"eos_token_id": values["eos_token_id"]})
            _write_tokenizer(source.home / PROCESSOR, folder, values["max_position_embeddings"])
        elif form == "qwen2-vl":
            _write_json(folder / CONFIG, qwen2_vl_config(cfg, export.dtype))
            _write_json(folder / "preprocessor_config.json", image_processor_config(cfg.vision))
        else:
            _write_json(folder / CONFIG, whisper_config(cfg, export.dtype))
            _write_json(folder / "preprocessor_config.json", mel_extractor_config(cfg.audio))


def _write_tokenizer(source: Path, folder: Path, context: int) -> None:
    """Copies the tokenizer's files; its configuration gets the class that transformers reads, and the chat template."""
    there = list_companions(source)
    for name in set(_TOKENIZER_FILES) & set(there):
        (folder / name).write_bytes((source / name).read_bytes())
    if TOKENIZER not in there:
        return
    values = read_json_object(source / TOKENIZER_CONFIG) if TOKENIZER_CONFIG in there else {}
    # Code of the released folder is not copied, so nothing may point to it.
    values = {key: value for key, value in values.items() if key not in _CODE_KEYS}
    if values.get("tokenizer_class") not in _TOKENIZER_CLASSES:
        values["tokenizer_class"] = "PreTrainedTokenizerFast"
    values["model_max_length"] = context
    # A tokenizer without the roles' marks (Qwen2.5's own) keeps its own chat template.
    if all(f'"{mark}"' in (source / TOKENIZER).read_text(encoding="utf-8") for mark in ROLES.values()):
        values["chat_template"] = CHAT_TEMPLATE
    _write_json(folder / TOKENIZER_CONFIG, values)


def _normalize_rows(rows: np.ndarray) -> np.ndarray:
    """Scales each row to length 1, as `LanguageModel.head_weight` does."""
    rows = rows.astype(np.float32)
    return rows / np.maximum(np.sqrt(np.sum(rows * rows, -1, keepdims=True)), np.float32(1e-12))


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
