"""How much memory does putting public models together take?

    python benchmarks/parts_memory.py [--directory DIR]

Writes random bf16 folders of the sizes of Qwen2.5-0.5B (tied), Qwen2-VL's tower and Whisper-medium, 2.9 GB together,
with a tokenizer of Qwen2.5's size, into a temporary folder; runs `baichuan-omni convert from-parts` as a process of its
own, and prints its peak resident memory as one line of JSON. Needs twice that room on disk for a while.
"""

import argparse
import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
from tokenizers import AddedToken, models, pre_tokenizers

from baichuan_omni_jax.checkpoint import abstract_branches
from baichuan_omni_jax.config import tiny
from baichuan_omni_jax.config.architecture import AudioConfig, LLMConfig, VisionConfig
from baichuan_omni_jax.config.parts import join_parts, qwen2_config, qwen2_vl_config, whisper_config
from baichuan_omni_jax.convert.parts import HEAD
from baichuan_omni_jax.convert.rules import Rule, expand
from baichuan_omni_jax.convert.safetensors_io import SINGLE, TensorInfo, blocks_of, write_shards
from baichuan_omni_jax.convert.tables import qwen2_rules, qwen2_vl_rules, whisper_rules
from baichuan_omni_jax.nn.param import named_values
from data_pipelines.tokenizers.tokenizer import byte_level

ROOT = Path(__file__).resolve().parents[1]
GOAL_GB = 1.5
BF16 = np.dtype(ml_dtypes.bfloat16)
SIZES = join_parts(
    tiny(),
    llm=LLMConfig(
        vocab_size=151936,
        hidden_size=896,
        num_layers=24,
        num_heads=14,
        num_kv_heads=2,
        head_dim=64,
        intermediate_size=4864,
    ),
    vision=VisionConfig(),
    audio=AudioConfig(
        num_mel_bins=80,
        d_model=1024,
        encoder_layers=24,
        encoder_attention_heads=16,
        encoder_ffn_dim=4096,
        decoder_attention_heads=16,
    ),
)
# Tokens of Qwen2.5 before its 22 special ones.
TOKENS = 151643


def write_part(folder: Path, branch: str, rules: list[Rule], config: dict) -> int:
    """Writes random values of a part's tensors, block by block; returns their bytes."""
    folder.mkdir(parents=True)
    module = abstract_branches(SIZES, only=[branch])[branch]
    entries, _ = expand(rules, {name: x.shape for name, x in named_values(module).items()}, branch)
    held = {rule.tensor: rule.restored().astype(BF16) for rule in rules if rule.restore}
    # Tied embeddings are one table in the file.
    shapes = {entry.name: entry.shape for entry in entries if entry.name != HEAD}
    infos = {name: TensorInfo(shape, BF16) for name, shape in shapes.items()}
    infos |= {name: TensorInfo(value.shape, BF16) for name, value in held.items()}
    rng = np.random.default_rng(0)

    def blocks(name: str) -> Iterator[np.ndarray]:
        if name in held:
            yield held[name]
            return
        for rows in blocks_of(shapes[name], 4):
            shape = (rows.stop - rows.start, *shapes[name][1:])
            yield (0.02 * rng.standard_normal(shape, np.float32)).astype(BF16)

    write_shards(folder, SINGLE, infos, 1 << 40, blocks)
    (folder / "config.json").write_text(json.dumps(config))
    return sum(info.nbytes for info in infos.values())


def write_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer with as many tokens and merges as Qwen2.5's: bytes, pairs of them, pairs and a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [(a, b) for a in alphabet for b in alphabet]
    triples = ((a + b, c) for (a, b), c in itertools.product(pairs, alphabet))
    merges = list(itertools.islice(itertools.chain(pairs, triples), TOKENS - len(alphabet)))
    names = [*alphabet, *("".join(pair) for pair in merges)]
    tokenizer = byte_level(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=merges))
    tokenizer.add_special_tokens(
        [AddedToken(name, special=True) for name in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")]
    )
    tokenizer.save(str(folder / "tokenizer.json"))


def write_parts(root: Path) -> int:
    """Writes the three folders; returns their bytes."""
    total = write_part(root / "llm", "llm", qwen2_rules(SIZES), qwen2_config(SIZES, {}, "bfloat16", tied=True))
    # The end of text is whichever token the tokenizer has.
    stated = json.loads((root / "llm" / "config.json").read_text()) | {"eos_token_id": TOKENS}
    (root / "llm" / "config.json").write_text(json.dumps(stated))
    write_tokenizer(root / "llm")
    total += write_part(root / "vision", "vision", qwen2_vl_rules(SIZES), qwen2_vl_config(SIZES, "bfloat16"))
    encoder = whisper_config(SIZES, "bfloat16")
    return total + write_part(root / "whisper", "audio_encoder", whisper_rules(SIZES), encoder)


def measure(root: Path) -> dict:
    """Converts the folders in a process of its own: what it took."""
    nbytes = write_parts(root)
    flags = [part for name in ("llm", "vision", "whisper") for part in (f"--{name}", str(root / name))]
    command = [sys.executable, "-m", "baichuan_omni_jax", "convert", "from-parts", *flags, "--to", str(root / "omni")]
    log, start = root / "log", time.perf_counter()
    # Spawned and waited for here, as only `wait4` tells the peak of one child.
    with log.open("wb") as file:
        actions = [(os.POSIX_SPAWN_DUP2, file.fileno(), descriptor) for descriptor in (1, 2)]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        process = os.posix_spawn(sys.executable, command, environment, file_actions=actions)
        _, status, usage = os.wait4(process, 0)
    seconds = time.perf_counter() - start
    if status:
        sys.exit(f"{' '.join(command)} failed: {log.read_text()}")
    written = sum(path.stat().st_size for path in (root / "omni").rglob("*") if path.is_file())
    peak = usage.ru_maxrss * 1024 / 1e9
    return {
        "peak_rss_gb": round(peak, 3),
        "goal_gb": GOAL_GB,
        "ok": peak <= GOAL_GB,
        "read_gb": round(nbytes / 1e9, 2),
        "written_gb": round(written / 1e9, 2),
        "seconds": round(seconds, 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", help="where the temporary folder is made")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.directory) as folder:
        result = measure(Path(folder))
    print(json.dumps(result))
    return 0 if result["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
