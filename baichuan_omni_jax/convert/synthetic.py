"""A Hugging Face checkpoint of random weights: what tests and benchmarks convert."""

import json
from math import ceil
from pathlib import Path

import ml_dtypes
import numpy as np

from baichuan_omni_jax.branches import VOCODER_BRANCH
from baichuan_omni_jax.checkpoint import abstract_branches
from baichuan_omni_jax.checkpoint.branches import CONFIG, VOCODER_CONFIG
from baichuan_omni_jax.config import OmniConfig, to_hf
from baichuan_omni_jax.config.vocoder import VocoderConfig, vocoder_to_json
from baichuan_omni_jax.convert.files import VOCODER
from baichuan_omni_jax.convert.rules import expand
from baichuan_omni_jax.convert.safetensors_io import SINGLE, TensorInfo, blocks_of, plan_shards, write_shards
from baichuan_omni_jax.convert.tables import branch_rules
from baichuan_omni_jax.nn.param import named_values

BF16 = np.dtype(ml_dtypes.bfloat16)


def write_random_checkpoint(
    folder: Path, cfg: OmniConfig, *, shards: int = 1, vocoder: VocoderConfig | None = None, seed: int = 0
) -> int:
    """Writes bf16 weights of `cfg` (computed buffers included) in `shards` files; returns their bytes.

    With `vocoder`, also `vocoder.safetensors` and its sizes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    infos, buffers = _model_tensors(cfg, vocoder)
    generator = np.random.default_rng(seed)

    def blocks(name: str):
        if name in buffers:
            yield buffers[name]
            return
        for rows in blocks_of(infos[name].shape, BF16.itemsize):
            shape = (rows.stop - rows.start, *infos[name].shape[1:])
            # Random bits, but for two of the exponent: finite, below 2, and never so small that it is flushed to zero.
            bits = generator.integers(0, 1 << 16, shape, np.uint16) & 0xBFFF | 0x2000
            yield bits.view(BF16)

    model = {name: info for name, info in infos.items() if not name.startswith(f"{VOCODER_BRANCH}/")}
    total = sum(info.nbytes for info in model.values())
    # Tensors are not cut, so shards of the average size may be one too many: a little larger until they are not.
    shard_bytes = ceil(total / shards)
    while len(plan_shards(model, shard_bytes)) > shards:
        shard_bytes += ceil(shard_bytes / 50)
    write_shards(folder, SINGLE, model, shard_bytes, blocks)
    (folder / CONFIG).write_text(json.dumps(to_hf(cfg), indent=1))
    if vocoder is not None:
        own = {name: info for name, info in infos.items() if name not in model}
        named = {name.removeprefix(f"{VOCODER_BRANCH}/"): info for name, info in own.items()}
        write_shards(folder, VOCODER, named, total, lambda name: blocks(f"{VOCODER_BRANCH}/{name}"))
        (folder / VOCODER_CONFIG).write_text(json.dumps(vocoder_to_json(vocoder), indent=1))
    return total


def _model_tensors(
    cfg: OmniConfig, vocoder: VocoderConfig | None
) -> tuple[dict[str, TensorInfo], dict[str, np.ndarray]]:
    """Every tensor, the vocoder's as `vocoder/NAME`, and the values of the computed buffers."""
    infos, buffers = {}, {}
    abstract = abstract_branches(cfg, vocoder)
    for branch, rules in branch_rules(cfg, vocoder).items():
        prefix = f"{VOCODER_BRANCH}/" if branch == VOCODER_BRANCH else ""
        entries, problems = expand(rules, {n: x.shape for n, x in named_values(abstract[branch]).items()}, branch)
        assert not problems, problems
        infos |= {prefix + entry.name: TensorInfo(entry.shape, BF16) for entry in entries}
        buffers |= {rule.tensor: rule.restored().astype(BF16) for rule in rules if rule.restore}
    return infos | {name: TensorInfo(x.shape, BF16) for name, x in buffers.items()}, buffers
