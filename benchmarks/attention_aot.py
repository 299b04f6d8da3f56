"""The attention kernels at 64k tokens compiled for TPUs, without one: what they need, and what they make XLA copy.

    pip install -e '.[preflight]' && python benchmarks/attention_aot.py [--length 65536] [--block 512] [--json]

Temporaries: forward and backward of the language model's heads, one row a chip, beside JAX's own splash attention with
its fused backward. Copies: projection -> attention -> output projection and its gradients for the two encoders' heads;
every copy and transpose of the program counts.
"""

import argparse
import os
import re
import sys
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import jax
import jax.numpy as jnp
import numpy as np
from hlo_moves import moved_bytes
from jax.experimental import topologies
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from rows import emit, row

from baichuan_omni_jax.kernels.flash_attention import Segments, flash_attention, plan_blocks
from baichuan_omni_jax.kernels.flash_attention.cases import LLM, VIT, WHISPER, Heads

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
# The block of keys for which splash's backward keeps a partial dq: the larger, the less memory.
SPLASH_BLOCKS = splash.BlockSizes(
    block_q=1024,
    block_kv=2048,
    block_kv_compute=512,
    block_q_dkv=1024,
    block_kv_dkv=2048,
    block_kv_dkv_compute=512,
    use_fused_bwd_kernel=True,
)
TEMPORARIES_GB, COPIED_GB = 2.4, 0.2


def chips(topology: str, axis: str) -> Mesh:
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    return Mesh(np.array(devices), (axis,), axis_types=(AxisType.Explicit,))


def abstract(mesh: Mesh, spec: P):
    return lambda shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))


def attend(q, k, v, ids, positions, *, heads: Heads, block: int, block_kv: int = 0, gather_kv: bool = True):
    segments = Segments.from_row(ids, positions)
    plan = plan_blocks(segments, heads.causal, block, block_kv or block, gather_kv=gather_kv)
    return flash_attention(
        q,
        k,
        v,
        segments=segments,
        plan=plan,
        causal=heads.causal,
        scale=heads.head_dim**-0.5,
        implementation="pallas_tpu",
        gather_kv=gather_kv,
    )


def compile_attention(
    topology: str, heads: Heads, length: int, block: int, *, spec: P, block_kv: int = 0, dtype=jnp.bfloat16
):
    """Forward and backward; rows or their length split over all chips (`spec` names the axis "chips")."""
    mesh = chips(topology, "chips")
    place = abstract(mesh, spec)
    rows = mesh.size if spec[0] else 1
    q, k = ((rows, length, n, heads.head_dim) for n in (heads.heads, heads.kv_heads))

    def forward_and_backward(q, k, v, d_out, ids, positions):
        out, vjp = jax.vjp(
            lambda *qkv: attend(*qkv, ids, positions, heads=heads, block=block, block_kv=block_kv), q, k, v
        )
        return out, vjp(d_out)

    arrays = [place(shape, dtype) for shape in (q, k, k, q)] + [place((rows, length), jnp.int32)] * 2
    with jax.set_mesh(mesh):
        return jax.jit(forward_and_backward).lower(*arrays).compile()


def compile_layer(topology: str, heads: Heads, length: int, block: int):
    """Projections of a stream of the heads' width, attention, output projection, and all gradients; a row a chip."""
    mesh = chips(topology, "chips")
    split, whole = abstract(mesh, P("chips")), abstract(mesh, P())
    width, head_dim = heads.heads * heads.head_dim, heads.head_dim

    def layer(x, w_q, w_k, w_v, w_out, ids, positions):
        q, k, v = (jnp.einsum("btd,dnh->btnh", x, w, out_sharding=P("chips")) for w in (w_q, w_k, w_v))
        out = attend(q, k, v, ids, positions, heads=heads, block=block, gather_kv=False)
        return jnp.einsum("btnh,nhd->btd", out, w_out, out_sharding=P("chips"))

    def forward_and_backward(x, w_q, w_k, w_v, w_out, d_out, ids, positions):
        out, vjp = jax.vjp(lambda *inputs: layer(*inputs, ids, positions), x, w_q, w_k, w_v, w_out)
        return out, vjp(d_out)

    stream, tokens = split((mesh.size, length, width)), split((mesh.size, length), jnp.int32)
    into = [whole((width, n, head_dim)) for n in (heads.heads, heads.kv_heads, heads.kv_heads)]
    arrays = (stream, *into, whole((heads.heads, head_dim, width)), stream, tokens, tokens)
    with jax.set_mesh(mesh):
        return jax.jit(forward_and_backward).lower(*arrays).compile()


def splash_kernel(heads: Heads, length: int):
    """Splash's kernel for causal rows, its block lists as numpy arrays so that any mesh can take them."""
    mask = splash_attention_mask.MultiHeadMask([splash_attention_mask.CausalMask((length, length))] * heads.heads)
    kernel = splash.make_splash_mha(mask, head_shards=1, q_seq_shards=1, block_sizes=SPLASH_BLOCKS)
    return jax.tree.map(np.asarray, kernel)


def splash_gigabytes(kernel, topology: str, heads: Heads, length: int) -> tuple[float, str]:
    """Temporaries of splash's forward and backward, and a remark where they exceed the chip."""
    mesh = chips(topology, "chips")
    place = abstract(mesh, P("chips"))

    def shard(q, k, v, d_out, ids):
        row = lambda *qkv: kernel(*qkv, segment_ids=splash.SegmentIds(ids[0], ids[0]))  # noqa: E731
        out, vjp = jax.vjp(row, q[0], k[0], v[0])
        return jax.tree.map(lambda x: x[None], (out, *vjp(d_out[0])))

    q, k = (place((mesh.size, n, length, heads.head_dim)) for n in (heads.heads, heads.kv_heads))
    mapped = jax.shard_map(shard, mesh=mesh, in_specs=P("chips"), out_specs=P("chips"), check_vma=False)
    with jax.set_mesh(mesh):
        lowered = jax.jit(mapped).lower(q, k, k, q, place((mesh.size, length), jnp.int32))
        try:
            return gigabytes(lowered.compile()), ""
        except jax.errors.JaxRuntimeError as error:
            needed = re.search(r"temporaries \(([\d.]+)G\) exceeds available HBM \(([\d.]+)G\)", str(error))
            if not needed:
                raise
            return float(needed[1]) * 2**30 / 1e9, f"; splash does not fit: {needed[1]} GiB, the chip has {needed[2]}"


def gigabytes(compiled) -> float:
    return compiled.memory_analysis().temp_size_in_bytes / 1e9


def temporaries_rows(length: int, block: int) -> list[dict]:
    kernel = splash_kernel(LLM, length)
    rows = []
    for chip, topology in TOPOLOGIES.items():
        start = time.time()
        ours = gigabytes(compile_attention(topology, LLM, length, block, spec=P("chips")))
        seconds = time.time() - start
        peer, why = splash_gigabytes(kernel, topology, LLM, length)
        rows.append(
            row(
                f"attention_aot_{chip}",
                ours,
                "GB of temporaries",
                peer="splash, fused backward",
                peer_value=peer,
                ratio=peer / ours,
                goal=f"<= {TEMPORARIES_GB}",
                ok=ours <= TEMPORARIES_GB,
                note=f"{topology}, {length} x 28/4 x 128 bf16, blocks of {block}, {seconds:.0f} s to compile{why}",
            )
        )
    return rows


def context_row(length: int, block: int) -> dict:
    topology = TOPOLOGIES["v5p"]
    compiled = compile_attention(topology, LLM, length, block, spec=P(None, "chips"))
    note = f"{topology}, one row over 4 chips, keys and values gathered"
    return row("attention_aot_context", gigabytes(compiled), "GB of temporaries", note=note)


def copies_row(heads: Heads, length: int, block: int) -> dict:
    topology = TOPOLOGIES["v5e"]
    copied = moved_bytes(compile_layer(topology, heads, length, block).as_text()) / 1e9
    return row(
        f"attention_aot_copies_{heads.head_dim}",
        copied,
        "GB copied",
        goal=f"<= {COPIED_GB}",
        ok=copied <= COPIED_GB,
        note=f"{topology}, {length} x {heads.heads} x {heads.head_dim} bf16, projections and attention, with gradients",
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=65536)
    parser.add_argument("--block", type=int, default=512)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    rows = temporaries_rows(args.length, args.block)
    rows.append(context_row(args.length, args.block))
    rows += [copies_row(heads, args.length, args.block) for heads in (WHISPER, VIT)]
    return emit(rows, args.json)


if __name__ == "__main__":
    sys.exit(main())
