"""The door to attention: picks an implementation and runs it shard by shard.

Arrays of an explicit mesh carry their sharding in their type, so the specs are read off the arguments: rows split over
the batch axes, heads over `tensor`, queries and keys along their length. With `gather_kv` a shard's queries see the
whole row (context parallelism: keys and values are gathered here, their gradients scattered back); without, segments
never straddle shards and nothing moves (frames, clips).
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from baichuan_omni_jax.kernels.flash_attention import pallas_gpu, pallas_tpu, reference, xla
from baichuan_omni_jax.kernels.flash_attention.plan import BlockPlan, Segments, blocks_of, plan_row
from baichuan_omni_jax.kernels.platform import UnsupportedError, platform_of

# Each module has `attention(q, k, v, *, segments, plan, scale) -> (out, log-sum-exp)` and `unsupported(...)`, which
# says why it cannot compute these arguments (None: it can).
BACK_ENDS = {"pallas_tpu": pallas_tpu, "pallas_gpu": pallas_gpu, "xla": xla, "reference": reference}
# What `implementation=None` tries, first to last.
PREFERRED = {"tpu": ("pallas_tpu", "xla"), "gpu": ("pallas_gpu", "xla"), "cpu": ("xla",)}
NEEDS = {"pallas_tpu": "tpu", "pallas_gpu": "gpu"}


def whole_keys(segments: Segments) -> Segments:
    """The segments with ids and positions of the whole row's keys on every shard: gather them once for all layers.

    With them `plan_blocks` and `flash_attention` gather keys and values only.
    """
    batch, _, mesh = _row_sharding(segments.q_ids)
    if mesh.empty:
        return segments
    with jax.named_scope("whole_keys"):
        kv_ids, kv_pos = (jax.sharding.reshard(x, P(batch, None)) for x in (segments.kv_ids, segments.kv_pos))
    return segments._replace(kv_ids=kv_ids, kv_pos=kv_pos)


def plan_blocks(
    segments: Segments, causal: bool, block_q: int = 512, block_kv: int = 512, *, gather_kv: bool = True
) -> BlockPlan:
    """The block pairs to visit for these segments: build it once per row, outside the layer scan.

    Blocks longer than a shard's part of the row are cut to it. Raises ValueError on segments that do not fit one
    another, and beyond 8192 blocks a row.
    """
    _check_segments(segments)
    if min(block_q, block_kv) < 1:
        raise ValueError(f"blocks of {block_q} x {block_kv} tokens: at least 1 x 1")
    batch, length, mesh = _row_sharding(segments.q_ids)
    kv_length = _axes(segments.kv_ids, 1)
    shards = _size(mesh, length)
    block_q = min(block_q, segments.q_ids.shape[1] // shards)
    block_kv = min(block_kv, segments.kv_ids.shape[1] // (1 if gather_kv else shards))

    def plan_shard(segments):
        if gather_kv:
            segments = _gather_keys(segments, kv_length)
        by_row = partial(plan_row, causal=causal, block_q=block_q, block_kv=block_kv)
        by_query, by_key, count = jax.vmap(by_row)(segments)
        return by_query[:, None], by_key[:, None], count[:, None]

    spec, keys = P(batch, length), P(batch, kv_length)
    arrays = _sharded(plan_shard, mesh, (Segments(spec, spec, keys, keys),), (spec, spec, spec))(segments)
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
    return_lse: bool = False,
) -> Float[Array, "b t n h"] | tuple[Float[Array, "b t n h"], Float[Array, "b t n"]]:
    """Attention within segments: visible = same non-zero id and, if causal, kv_pos <= q_pos. Padding gives zeros.

    n is a multiple of k (grouped queries, by index). Softmax and sums in fp32; the result has q's dtype. With
    `return_lse` also the log-sum-exp of each query's scaled scores, fp32, -1e30 where it sees nothing; both may be
    differentiated. `plan` comes from `plan_blocks` with the same segments, `causal` and `gather_kv`.
    `implementation`: None picks by platform and support; a name never falls back.
    Raises ValueError on an unknown implementation or shapes that do not fit, UnsupportedError (a ValueError) when the
    named implementation cannot run here.
    """
    _check(q, k, v, segments, implementation)
    if plan is not None:
        _check_plan(plan, segments, causal, gather_kv)
    platform = platform_of(q)
    if implementation in NEEDS and NEEDS[implementation] != platform:
        raise UnsupportedError(f"attention {implementation} needs a {NEEDS[implementation]}; this runs on {platform}")
    if plan is None and implementation != "reference":
        plan = plan_blocks(segments, causal, gather_kv=gather_kv)
    batch, length, mesh = _row_sharding(segments.q_ids)
    heads, kv_heads, kv_length = _axes(q, 2), _axes(k, 2), _axes(segments.kv_ids, 1)

    def attend_shard(q, k, v, segments, plan):
        if gather_kv:
            with jax.named_scope("gather_kv"):
                k, v = _gather(k, length), _gather(v, length)
            segments = _gather_keys(segments, kv_length)
        name = _choose(implementation, platform, q, k, plan)
        if name == "reference":
            return reference.attention(q, k, v, segments=segments, causal=causal, scale=scale)
        return BACK_ENDS[name].attention(q, k, v, segments=segments, plan=plan, scale=scale)

    row, keys = P(batch, length), P(batch, kv_length)
    by_head, by_kv_head = P(batch, length, heads), P(batch, length, kv_heads)
    in_specs = (by_head, by_kv_head, by_kv_head, Segments(row, row, keys, keys), row)
    out, lse = _sharded(attend_shard, mesh, in_specs, (by_head, by_head))(q, k, v, segments, plan)
    return (out, lse) if return_lse else out


def _choose(name: str | None, platform: str, q: Array, k: Array, plan: BlockPlan | None) -> str:
    """The back end for one shard's arrays. Raises UnsupportedError when it was named and cannot compute them."""
    if name is None:
        return next(n for n in PREFERRED[platform] if BACK_ENDS[n].unsupported(q, k, plan) is None)
    reason = None if name == "reference" else BACK_ENDS[name].unsupported(q, k, plan)
    if reason is not None:
        raise UnsupportedError(f"attention {name} cannot compute q {q.shape}, k {k.shape} {q.dtype}: {reason}")
    return name


def _check(q, k, v, segments: Segments, implementation: str | None) -> None:
    if implementation is not None and implementation not in BACK_ENDS:
        raise ValueError(f"attention implementation {implementation!r} is not one of {', '.join(BACK_ENDS)}")
    if not q.ndim == k.ndim == v.ndim == 4 or 0 in (*q.shape[1:], *k.shape[1:]):
        raise ValueError(f"q {q.shape}, k {k.shape}, v {v.shape}: must be (rows, tokens, heads, head dim), none empty")
    if k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q {q.shape}, k {k.shape}, v {v.shape}: rows and head dims must agree, and k with v")
    if not q.dtype == k.dtype == v.dtype or not jnp.issubdtype(q.dtype, jnp.floating):
        raise ValueError(f"q {q.dtype}, k {k.dtype}, v {v.dtype}: dtypes must agree and be floating point")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"{q.shape[2]} query heads are not a multiple of {k.shape[2]} key heads")
    _check_segments(segments)
    if segments.q_ids.shape != q.shape[:2] or segments.kv_ids.shape != k.shape[:2]:
        raise ValueError(
            f"segments {segments.q_ids.shape} x {segments.kv_ids.shape} do not fit q {q.shape[:2]} and k {k.shape[:2]}"
        )


def _check_segments(segments: Segments) -> None:
    for side, ids, positions in zip(("query", "key"), segments[::2], segments[1::2], strict=True):
        if ids.ndim != 2 or ids.shape != positions.shape or not ids.shape[1]:
            raise ValueError(f"{side} ids {ids.shape} and positions {positions.shape} must be the same (rows, tokens)")
        if not ids.dtype == positions.dtype == jnp.int32:
            raise ValueError(f"{side} ids {ids.dtype} and positions {positions.dtype} must be int32")
    if segments.q_ids.shape[0] != segments.kv_ids.shape[0]:
        raise ValueError(f"ids of {segments.q_ids.shape[0]} rows of queries, {segments.kv_ids.shape[0]} of keys")


def _check_plan(plan: BlockPlan, segments: Segments, causal: bool, gather_kv: bool) -> None:
    """A plan of other lengths would make kernels read what is not there."""
    if plan.causal != causal:
        raise ValueError(f"the plan was built for causal={plan.causal}, the call asks for causal={causal}")
    (rows, queries), keys = segments.q_ids.shape, segments.kv_ids.shape[1]
    _, length, mesh = _row_sharding(segments.q_ids)
    shards = _size(mesh, length)
    blocks = blocks_of(queries // shards, plan.block_q), blocks_of(keys // (1 if gather_kv else shards), plan.block_kv)
    expected = rows, shards, blocks[0] * blocks[1]
    if plan.by_query.shape != expected:
        raise ValueError(
            f"the plan has {plan.by_query.shape} (rows, shards, pairs of blocks of {plan.block_q} x {plan.block_kv}), "
            f"these segments {expected}: build it from them, with the same gather_kv"
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


def _gather_keys(segments: Segments, axes) -> Segments:
    return segments._replace(kv_ids=_gather(segments.kv_ids, axes), kv_pos=_gather(segments.kv_pos, axes))


def _sharded(function, mesh, in_specs, out_specs):
    if mesh.empty:
        return function
    # The loops over block pairs start from constants, which vma checking would call unvarying.
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
