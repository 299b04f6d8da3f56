"""The door to attention: picks an implementation and runs it shard by shard.

Arrays of an explicit mesh carry their sharding in their type, so the specs are read off the arguments: rows split over
the batch axes, heads over `tensor`, queries and keys along their length. With `gather_kv` a shard's queries see the
whole row (context parallelism: keys and values are gathered here, their gradients scattered back); without, segments
never straddle shards and nothing moves (frames, clips).
"""

from functools import partial

import jax
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from baichuan_omni_jax.kernels.flash_attention import reference, xla
from baichuan_omni_jax.kernels.flash_attention.plan import BlockPlan, Segments, plan_row

IMPLEMENTATIONS = ("xla", "reference")


def plan_blocks(
    segments: Segments, causal: bool, block_q: int = 512, block_kv: int = 512, *, gather_kv: bool = True
) -> BlockPlan:
    """The block pairs to visit for these segments: build it once per row, outside the layer scan.

    Blocks longer than a shard's part of the row are cut to it. Raises ValueError beyond 8192 blocks a row.
    """
    batch, length, mesh = _row_sharding(segments.q_ids)
    shards = _size(mesh, length)
    block_q = min(block_q, segments.q_ids.shape[1] // shards)
    block_kv = min(block_kv, segments.kv_ids.shape[1] // (1 if gather_kv else shards))

    def plan_shard(segments):
        if gather_kv:
            segments = segments._replace(
                kv_ids=_gather(segments.kv_ids, length), kv_pos=_gather(segments.kv_pos, length)
            )
        by_row = partial(plan_row, causal=causal, block_q=block_q, block_kv=block_kv)
        by_query, by_key, count = jax.vmap(by_row)(segments)
        return by_query[:, None], by_key[:, None], count[:, None]

    spec = P(batch, length)
    arrays = _sharded(plan_shard, mesh, (Segments(spec, spec, spec, spec),), (spec, spec, spec))(segments)
    return BlockPlan(*arrays, block_q=block_q, block_kv=block_kv, causal=causal)


def flash_attention(
    q: Float[Array, "b t n h"],
    k: Float[Array, "b s k h"],
    v: Float[Array, "b s k h"],
    *,
    segments: Segments,
    plan: BlockPlan | None = None,
    causal: bool,
    scale: float,
    implementation: str | None = None,
    gather_kv: bool = True,
) -> Float[Array, "b t n h"]:
    """Attention within segments: visible = same non-zero id and, if causal, kv_pos <= q_pos. Padding gives zeros.

    n is a multiple of k (grouped queries, by index). Softmax and sums in fp32; the result has q's dtype.
    `implementation`: None picks by platform; a name never falls back.
    Raises ValueError on an unknown implementation or shapes that do not fit.
    """
    _check(q, k, v, segments, implementation)
    chosen = implementation or "xla"
    if plan is None and chosen == "xla":
        plan = plan_blocks(segments, causal, gather_kv=gather_kv)
    batch, length, mesh = _row_sharding(segments.q_ids)
    heads, kv_heads = _axes(q, 2), _axes(k, 2)

    def attend_shard(q, k, v, segments, plan):
        if gather_kv:
            k, v = _gather(k, length), _gather(v, length)
            segments = segments._replace(
                kv_ids=_gather(segments.kv_ids, length), kv_pos=_gather(segments.kv_pos, length)
            )
        if chosen == "reference":
            return reference.attention(q, k, v, segments=segments, causal=causal, scale=scale)
        return xla.attention(q, k, v, segments=segments, plan=plan, scale=scale)[0]

    row = P(batch, length)
    in_specs = (
        P(batch, length, heads),
        P(batch, length, kv_heads),
        P(batch, length, kv_heads),
        Segments(row, row, row, row),
        row,
    )
    return _sharded(attend_shard, mesh, in_specs, P(batch, length, heads))(q, k, v, segments, plan)


def _check(q, k, v, segments: Segments, implementation: str | None) -> None:
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(f"attention implementation {implementation!r} is not one of {', '.join(IMPLEMENTATIONS)}")
    if k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q {q.shape}, k {k.shape}, v {v.shape}: rows and head dims must agree, and k with v")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"{q.shape[2]} query heads are not a multiple of {k.shape[2]} key heads")
    if segments.q_ids.shape != q.shape[:2] or segments.kv_ids.shape != k.shape[:2]:
        raise ValueError(
            f"segments {segments.q_ids.shape} x {segments.kv_ids.shape} do not fit q {q.shape[:2]} and k {k.shape[:2]}"
        )


def _axes(x: Array, dim: int):
    """Mesh axes that split dim `dim` of `x`, from its type."""
    spec = jax.typeof(x).sharding.spec
    return spec[dim] if dim < len(spec) else None


def _row_sharding(ids: Array):
    return _axes(ids, 0), _axes(ids, 1), jax.typeof(ids).sharding.mesh


def _size(mesh, axes) -> int:
    names = () if axes is None else (axes,) if isinstance(axes, str) else axes
    size = 1
    for name in names:
        size *= mesh.shape[name]
    return size


def _gather(x: Array, axes) -> Array:
    """The whole row of a shard's part (a no-op when the length is not split); its transpose is a reduce-scatter."""
    return x if axes is None else lax.all_gather(x, axes, axis=1, tiled=True)


def _sharded(function, mesh, in_specs, out_specs):
    if mesh.empty:
        return function
    # The loops over block pairs start from constants, which vma checking would call unvarying.
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
