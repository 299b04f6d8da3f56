"""Do the generating engine's programs fit TPUs at the released sizes, and what travels between chips for one item?

    pip install -e '.[preflight]' && python benchmarks/decode_aot.py [--topologies v5e:2x4 v5p:2x2x1] [--json]

Compiled ahead of time, without a TPU, in bf16, from shapes alone: `decode_steps`, which makes text and speech of every
slot, and `prefill`, which reads a chunk of a prompt with media on every row of devices. Bytes are one chip's: arguments
(weights, cache, rows), temporaries, and what new arrays a program returns, beside what the chip lets a program use. An
item is a token or a code frame of every slot, all of them made in one turn of the program's loop.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rows import emit, row

from baichuan_omni_jax.checkpoint import with_shardings
from baichuan_omni_jax.config import MeshConfig, OmniConfig, baichuan_omni_7b
from baichuan_omni_jax.flops.terms import chip_of
from baichuan_omni_jax.generation import programs
from baichuan_omni_jax.generation.prefill import Chunk
from baichuan_omni_jax.generation.slots import idle_slots
from baichuan_omni_jax.llm.audio_head import AudioHeadBranch
from baichuan_omni_jax.llm.kv_cache import init_cache
from baichuan_omni_jax.llm.model import LanguageModel
from baichuan_omni_jax.nn.param import ComputePolicy
from baichuan_omni_jax.sharding import make_mesh
from baichuan_omni_jax.train.preflight import devices_of
from baichuan_omni_jax.train.preflight.hlo import collectives_of
from data_pipelines.text.speech_segments import piece_table

GIB, MIB = 2**30, 2**20
COMPUTE = ComputePolicy(dtype=jnp.dtype("bfloat16"), remat="none")
STEPS_PER_CALL = 8


class Sizes(NamedTuple):
    """Of an engine (see `Engine`)."""

    slots: int
    length: int
    chunk: int
    cache_dtype: str


def make_branches(cfg: OmniConfig) -> dict:
    key, head = jax.random.key(0), (cfg.audio_head, cfg.audio.codebook_sizes, cfg.llm.hidden_size)
    return {"llm": LanguageModel(key, cfg.llm, COMPUTE), "audio_head": AudioHeadBranch(key, *head, COMPUTE)}


def make_models(branches: dict) -> programs.DecodeModels:
    return programs.DecodeModels(branches["llm"].to_decode_layout(), branches["audio_head"].to_decode_layout())


def abstract_engine(cfg: OmniConfig, mesh: Mesh, sizes: Sizes) -> tuple[programs.DecodeModels, programs.EngineState]:
    """What an engine on `mesh` computes with and what its slots hold, as shapes with shardings. With the mesh set."""
    branches = {
        name: with_shardings(module, mesh, COMPUTE.rules, dtype=COMPUTE.dtype, name=name)
        for name, module in jax.eval_shape(partial(make_branches, cfg)).items()
    }
    models = jax.eval_shape(make_models, branches)
    cache = jax.eval_shape(partial(init_cache, cfg.llm, sizes.slots, sizes.length, sizes.cache_dtype, COMPUTE))
    widths = cfg.llm.vocab_size, (cfg.audio.levels, max(cfg.audio.codebook_sizes) + 1)
    hidden = np.zeros((sizes.slots, cfg.llm.hidden_size), COMPUTE.dtype)
    rows = idle_slots(sizes.slots, cfg.tokens, *widths)
    return _typed(models, mesh), programs.EngineState(_typed(cache, mesh), *_split((hidden, rows), mesh))


def lower_decode_steps(cfg: OmniConfig, mesh: Mesh, sizes: Sizes) -> jax.stages.Lowered:
    models, state = abstract_engine(cfg, mesh, sizes)
    alive, table = np.zeros(sizes.slots, bool), piece_table(None, cfg.llm.vocab_size)
    told = _split(alive, mesh), np.int32(STEPS_PER_CALL), np.bool_(False), table
    return programs.decode_steps.lower(models, state, *told, tokens=cfg.tokens, size=STEPS_PER_CALL)


def lower_prefill(cfg: OmniConfig, mesh: Mesh, sizes: Sizes) -> jax.stages.Lowered:
    models, state = abstract_engine(cfg, mesh, sizes)
    devices = mesh.shape["data"] * mesh.shape["fsdp"]
    shape = devices, sizes.chunk
    whole, chunk = (
        np.zeros(shape, np.int32),
        Chunk(*[np.zeros(shape, np.int32)] * 2, np.zeros(devices, np.int32)),
    )
    chunk = chunk._replace(
        codes=np.zeros((*shape, cfg.audio.levels), np.int32), is_audio=np.zeros(shape, bool), visual_slots=whole
    )
    buffer = np.zeros((devices, sizes.length, cfg.llm.hidden_size), COMPUTE.dtype)
    return programs.prefill.lower(models, state, np.int32(0), _split(chunk, mesh), _split(buffer, mesh))


def _typed(tree, mesh: Mesh):
    """Results of `jax.eval_shape` with their types' shardings on the mesh's devices."""
    return jax.tree.map(lambda x: _shape(x, mesh, x.sharding.spec), tree)


def _split(tree, mesh: Mesh):
    """Shapes of host arrays whose first dim is split as slots are."""
    spec = COMPUTE.rules.spec
    return jax.tree.map(lambda x: _shape(x, mesh, spec("batch", *[None] * (x.ndim - 1))), tree)


def _shape(x, mesh: Mesh, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))


def traffic(hlo: str, mesh: Mesh) -> tuple[int, int]:
    """Bytes that an item's collectives give a chip, and how many of them there are."""
    found = [one for one in collectives_of(hlo, dict(mesh.shape)) if one.loops]
    return sum(one.bytes * one.times for one in found), sum(one.times for one in found)


def measure(topology: str, tensor: int, sizes: Sizes, cfg: OmniConfig) -> list[dict]:
    devices = devices_of(topology)
    mesh = make_mesh(MeshConfig(data=len(devices) // tensor, tensor=tensor), devices)
    where = f"{topology}, data {len(devices) // tensor} x tensor {tensor}"
    chip = chip_of(devices[0].device_kind)

    def built(name: str, lower: Callable) -> tuple[dict, jax.stages.Compiled]:
        start = time.time()
        with jax.set_mesh(mesh):
            compiled = lower(cfg, mesh, sizes).compile()
        memory = compiled.memory_analysis()
        new = memory.output_size_in_bytes - memory.alias_size_in_bytes
        needed = memory.argument_size_in_bytes + memory.temp_size_in_bytes + new
        line = row(
            f"decode_aot_{name}_{chip.name}",
            needed / GIB,
            "GiB a chip",
            goal=f"<= {chip.hbm_bytes / GIB:.4g}",
            ok=needed <= chip.hbm_bytes,
            note=f"{where}: arguments {memory.argument_size_in_bytes / GIB:.2f}, temporaries "
            f"{memory.temp_size_in_bytes / GIB:.2f}, new {new / GIB:.2f} GiB; {time.time() - start:.0f} s to compile",
        )
        return line, compiled

    decoding, compiled = built("decode_steps", lower_decode_steps)
    moved, count = traffic(compiled.as_text(), mesh)
    travels = row(
        f"decode_aot_traffic_{chip.name}",
        moved / MIB,
        f"MiB of collectives an item of {sizes.slots} slots",
        note=f"{where}: {count} collectives, {moved / MIB / sizes.slots:.3f} MiB a token",
    )
    return [decoding, travels, built("prefill", lower_prefill)[0]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topologies", nargs="+", default=["v5e:2x4", "v5p:2x2x1"])
    parser.add_argument("--tensor", type=int, default=4, help="chips that share each slot; the others share the slots")
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--chunk", type=int, default=1024, help="items of a prompt that are read at once")
    parser.add_argument("--cache-dtype", default="bfloat16", help="bfloat16, int8")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    sizes, cfg = Sizes(args.slots, args.length, args.chunk, args.cache_dtype), baichuan_omni_7b()
    rows = [line for topology in args.topologies for line in measure(topology, args.tensor, sizes, cfg)]
    return emit(rows, args.json)


if __name__ == "__main__":
    sys.exit(main())
