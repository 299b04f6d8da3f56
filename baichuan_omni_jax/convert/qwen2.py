"""The language model alone as a plain `Qwen2ForCausalLM` folder, which transformers and vLLM load without other code.

It is one: Qwen2.5's layers, with Q, K and V in one matrix in the released checkpoint. Written apart, they have Qwen2's
own names. Pictures and sound are left out; their marks stay in the vocabulary.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from baichuan_omni_jax.branches import abstract_branches
from baichuan_omni_jax.checkpoint.branches import CONFIG, PROCESSOR
from baichuan_omni_jax.config import OmniConfig, read_hf
from baichuan_omni_jax.config.hf import LLM_KEYS
from baichuan_omni_jax.convert.files import list_companions
from baichuan_omni_jax.convert.llm import llm_rules
from baichuan_omni_jax.convert.plan import plan_from_leaves
from baichuan_omni_jax.convert.safetensors_io import SINGLE
from baichuan_omni_jax.convert.to_torch import SHARD_BYTES, Advance, Export, Source, write_export
from baichuan_omni_jax.errors import ConfigError
from baichuan_omni_jax.storage import check_target, read_json_object, staged_folder

LLM = "llm"
CONTEXT = 65536  # items that the released model was trained to; its config.json says 8192, which servers would clip at
TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
_TOKENIZER_FILES = (TOKENIZER, "vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json")
# Classes of transformers that read these files without code of the folder.
_TOKENIZER_CLASSES = ("Qwen2Tokenizer", "Qwen2TokenizerFast", "PreTrainedTokenizerFast")
_CODE_KEYS = ("auto_map", "processor_class")
# What the model was trained on; the tokenizer_config.json that is released has the form of another model.
ROLES = {"system": "<B_SYS>", "user": "<C_Q>", "assistant": "<C_A>"}
CHAT_TEMPLATE = (
    "{% set marks = " + json.dumps(ROLES) + " %}"
    "{% for message in messages %}{{ marks[message['role']] + message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ marks['assistant'] }}{% endif %}"
)


def plan_qwen2(source: Source, dtype: str | None = None) -> Export:
    """What to write of the branch `llm`, as `dtype` or as it is stored.

    Raises ConfigError when `source` has no such branch, naming every parameter that does not fit.
    """
    if LLM not in source.readers:
        raise ConfigError(f"{source.home} has no branch {LLM}: there is no language model to export")
    cfg = read_hf(source.home / CONFIG)
    apart = replace(cfg, llm=replace(cfg.llm, qkv_pack=False))
    stored = {LLM: source.readers[LLM].infos}
    tables, abstract = {LLM: llm_rules(apart)}, abstract_branches(cfg, only=[LLM])
    export = Export(plan_from_leaves(stored, tables, abstract, str(source.home)), {})
    export.cast(dtype)
    return export


def convert_to_qwen2(
    source: Source,
    target: Path,
    *,
    export: Export | None = None,
    shard_bytes: int = SHARD_BYTES,
    advance: Advance = lambda done: None,
) -> None:
    """Writes the folder `target`: weights, `config.json`, `generation_config.json`, the tokenizer where it is known.

    `export` is what `plan_qwen2` made of the same source. Raises ConfigError, and leaves nothing behind then.
    """
    check_target(target)
    export = plan_qwen2(source) if export is None else export
    cfg, stated = read_hf(source.home / CONFIG), read_json_object(source.home / CONFIG)
    values = qwen2_config(cfg, stated, export.dtype)
    # A normalized head is a plain head of normalized rows.
    changes: dict[str, Callable] = {"lm_head.weight": _normalize_rows} if cfg.llm.use_norm_head else {}
    with staged_folder(target) as folder:
        write_export(folder, SINGLE, export, source.readers, shard_bytes, advance, changes)
        _write_json(folder / CONFIG, values)
        _write_json(folder / "generation_config.json", {"eos_token_id": values["eos_token_id"]})
        _write_tokenizer(source.home / PROCESSOR, folder, values["max_position_embeddings"])


def qwen2_config(cfg: OmniConfig, stated: dict[str, Any], dtype: str) -> dict[str, Any]:
    """The `config.json` of a Qwen2 model; `stated` is the one of the omni model, `dtype` that of the tensors.

    Its keys are those of transformers 4, which 5 and vLLM read too.
    """
    llm, longest = cfg.llm, stated.get("max_position_embeddings")
    values: dict[str, Any] = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "torch_dtype": dtype}
    values |= {theirs: getattr(llm, ours) for ours, theirs in LLM_KEYS.items()}
    if llm.head_dim * llm.num_heads != llm.hidden_size:
        values["head_dim"] = llm.head_dim
    values |= {"hidden_act": "silu", "tie_word_embeddings": False, "use_sliding_window": False, "use_cache": True}
    values["max_position_embeddings"] = max(longest, CONTEXT) if isinstance(longest, int) else CONTEXT
    return values | {"bos_token_id": None, "eos_token_id": cfg.tokens.end_of_text}


def _write_tokenizer(source: Path, folder: Path, context: int) -> None:
    """Copies the tokenizer's files, and says in its configuration how transformers reads them, and the chat's form."""
    there = list_companions(source)
    for name in set(_TOKENIZER_FILES) & set(there):
        (folder / name).write_bytes((source / name).read_bytes())
    if TOKENIZER not in there:
        return
    values = read_json_object(source / TOKENIZER_CONFIG) if TOKENIZER_CONFIG in there else {}
    values = {key: value for key, value in values.items() if key not in _CODE_KEYS}
    if values.get("tokenizer_class") not in _TOKENIZER_CLASSES:
        values["tokenizer_class"] = "PreTrainedTokenizerFast"
    values["model_max_length"] = context
    if all(f'"{mark}"' in (source / TOKENIZER).read_text(encoding="utf-8") for mark in ROLES.values()):
        values["chat_template"] = CHAT_TEMPLATE
    _write_json(folder / TOKENIZER_CONFIG, values)


def _normalize_rows(rows: np.ndarray) -> np.ndarray:
    """Each row at length 1, as `LanguageModel.head_weight` has it."""
    rows = rows.astype(np.float32)
    return rows / np.maximum(np.sqrt(np.sum(rows * rows, -1, keepdims=True)), np.float32(1e-12))


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
