"""The door to attention: checks shapes, picks an implementation and runs it shard by shard.

Arrays of an explicit mesh carry their sharding in their type, so the specs are read off the arguments: rows split over
the batch axes, heads over `tensor`, queries and keys along their length. With `gather_kv` a shard's queries see the
whole row (context parallelism: keys and values are gathered here, their gradients scattered back); without, segments
never straddle shards and nothing moves (frames, clips).
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, cast, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.core import Tracer
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from baichuan_omni_jax.kernels.backends import (
    Implementation,
    check_implementation,
    check_platform,
    choose,
    platform_of,
)
from baichuan_omni_jax.kernels.flash_attention import pallas_gpu, pallas_tpu, reference, xla
from baichuan_omni_jax.kernels.flash_attention.plan import KV_GATHERED, BlockPlan, Segments, blocks_of, plan_row

__all__ = ["BlockPlan", "Segments", "flash_attention", "plan_blocks", "whole_keys"]

# Each module has `attention(q, k, v, *, segments, plan, scale) -> (out, log-sum-exp)` and `unsupported(q, k, plan)`,
# which says why it cannot compute these arguments (None: it can). The reference needs no plan.
BACK_ENDS = {"pallas_tpu": pallas_tpu, "pallas_gpu": pallas_gpu, "xla": xla}

Axes = str | tuple[str, ...] | None
Row = Int[Array | np.ndarray, "b t"]


def whole_keys(segments: Segments) -> Segments:
    """Gathers ids and positions of the whole row's keys on every shard: once for all layers.

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
    """Plans which block pairs to visit for these segments: once per row, outside the layer scan.

    Args:
        segments: ids and positions of queries (b, t) and keys (b, s).
        causal: whether a query sees no key of a later position.
        block_q: tokens a block of queries; blocks longer than a shard's part of the row are cut to it.
        block_kv: tokens a block of keys, likewise.
        gather_kv: as `flash_attention` is called with.

    Returns:
        The plan, split over devices as the segments are.

    Raises:
        ValueError: segments that do not fit one another, blocks of no token, or more than 8192 blocks a row.
    """
    _check_segments(segments)
    if min(block_q, block_kv) < 1:
        raise ValueError(f"blocks of {block_q} x {block_kv} tokens: at least 1 x 1")
    # A shard plans for its own queries, against the keys that it will see.
    batch, length, mesh = _row_sharding(segments.q_ids)
    kv_length = _axes(segments.kv_ids, 1)
    shards = _size(mesh, length)
    block_q = min(block_q, segments.q_ids.shape[1] // shards)
    block_kv = min(block_kv, segments.kv_ids.shape[1] // (1 if gather_kv else shards))

    def plan_shard(segments: Segments) -> tuple[Array, Array, Array]:
        if gather_kv:
            segments = _gather_keys(segments, kv_length)
        by_row = partial(plan_row, causal=causal, block_q=block_q, block_kv=block_kv)
        by_query, by_key, count = jax.vmap(by_row)(segments)
        return by_query[:, None], by_key[:, None], count[:, None]

    spec, keys = P(batch, length), P(batch, kv_length)
    arrays = _sharded(plan_shard, mesh, (_segment_specs(spec, keys),), (spec, spec, spec))(segments)
    return BlockPlan(*arrays, block_q=block_q, block_kv=block_kv, causal=causal)


@overload
def flash_attention(
    q: Float[Array | np.ndarray, "b t n h"],
    k: Float[Array | np.ndarray, "b s k h"],
    v: Float[Array | np.ndarray, "b s k h"],
    *,
    causal: bool = False,
    segment_ids: Row | None = None,
    positions: Row | None = None,
    scale: float | None = None,
    segments: Segments | None = None,
    plan: BlockPlan | None = None,
    implementation: Implementation | None = None,
    gather_kv: bool = True,
    return_lse: Literal[False] = False,
) -> Float[Array, "b t n h"]: ...


@overload
def flash_attention(
    q: Float[Array | np.ndarray, "b t n h"],
    k: Float[Array | np.ndarray, "b s k h"],
    v: Float[Array | np.ndarray, "b s k h"],
    *,
    causal: bool = False,
    segment_ids: Row | None = None,
    positions: Row | None = None,
    scale: float | None = None,
    segments: Segments | None = None,
    plan: BlockPlan | None = None,
    implementation: Implementation | None = None,
    gather_kv: bool = True,
    return_lse: Literal[True],
) -> tuple[Float[Array, "b t n h"], Float[Array, "b t n"]]: ...


def flash_attention(
    q: Float[Array | np.ndarray, "b t n h"],
    k: Float[Array | np.ndarray, "b s k h"],
    v: Float[Array | np.ndarray, "b s k h"],
    *,
    causal: bool = False,
    segment_ids: Row | None = None,
    positions: Row | None = None,
    scale: float | None = None,
    segments: Segments | None = None,
    plan: BlockPlan | None = None,
    implementation: Implementation | None = None,
    gather_kv: bool = True,
    return_lse: bool = False,
) -> Float[Array, "b t n h"] | tuple[Float[Array, "b t n h"], Float[Array, "b t n"]]:
    """Computes attention as `jax.nn.dot_product_attention` does, but visits only blocks in which something is visible.

    A query sees a key of the same non-zero segment id and, if causal, of no later position. Softmax and sums are in
    fp32; padding (id 0) gives zeros. Needs no mesh; on one, rows, heads and lengths may be split (see the module).

    Two documents of 3 and 4 tokens and one place of padding, packed in a row:

    >>> q = k = v = jnp.ones((1, 8, 2, 16))
    >>> ids = jnp.array([[1, 1, 1, 2, 2, 2, 2, 0]])
    >>> out = flash_attention(q, k, v, causal=True, segment_ids=ids)
    >>> out.shape, float(out[0, 0, 0, 0]), float(out[0, 7, 0, 0])
    ((1, 8, 2, 16), 1.0, 0.0)

    Args:
        q: queries, (rows, tokens, heads, head dim), floating point.
        k: keys, (rows, tokens, key heads, head dim); heads are a multiple of key heads (grouped by index).
        v: values, like k.
        causal: whether a query sees no key of a later position.
        segment_ids: document of each token, 0 for padding; queries and keys are then the same tokens. None: one
            document a row.
        positions: place of each token in its document, for `causal`. None: the order in the row.
        scale: what scores are multiplied with. None: head dim ** -0.5.
        segments: ids and positions of queries and keys apart, int32, in place of `segment_ids` and `positions`.
        plan: `plan_blocks` of the same segments, `causal` and `gather_kv`, to share it among layers. None: built here.
        implementation: None picks by platform and support; a name never falls back.
        gather_kv: on a mesh, whether a device's queries see keys of other devices (see the module).
        return_lse: also return the log-sum-exp of each query's scaled scores.

    Returns:
        The result in q's dtype; with `return_lse` also (rows, tokens, heads) fp32, -1e30 where a query sees nothing.
        Both may be differentiated.

    Raises:
        ValueError: an unknown implementation, or shapes and dtypes that do not fit.
        UnsupportedError: a ValueError; the named implementation cannot run here.
    """
    # Everything that can be wrong is said before a kernel runs: a kernel would read what is not there.
    q, k, v = jnp.asarray(q), jnp.asarray(k), jnp.asarray(v)
    _check(q, k, v, implementation)
    if segments is None:
        segments = _segments_of(q, k, segment_ids, positions)
    elif segment_ids is not None or positions is not None:
        raise ValueError("give either segments or segment_ids and positions")
    _check_segments(segments)
    if segments.q_ids.shape != q.shape[:2] or segments.kv_ids.shape != k.shape[:2]:
        raise ValueError(
            f"segments {segments.q_ids.shape} x {segments.kv_ids.shape} do not fit q {q.shape[:2]} and k {k.shape[:2]}"
        )
    if plan is not None:
        _check_plan(plan, segments, causal, gather_kv)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    options = {"causal": causal, "scale": scale, "implementation": implementation, "gather_kv": gather_kv}
    # Called outside of any transformation, its loops would be compiled anew in every call.
    concrete = not any(isinstance(x, Tracer) for x in jax.tree.leaves((q, k, v, segments, plan)))
    out, lse = (_attend_compiled if concrete else _attend)(q, k, v, segments, plan, **options)
    return (out, lse) if return_lse else out


def _attend(
    q: Array,
    k: Array,
    v: Array,
    segments: Segments,
    plan: BlockPlan | None,
    *,
    causal: bool,
    scale: float,
    implementation: Implementation | None,
    gather_kv: bool,
) -> tuple[Array, Array]:
    """Output and log-sum-exp of arguments that were checked."""
    platform = platform_of(q)
    check_platform("attention", implementation, platform)
    if plan is None and implementation != "reference":
        plan = plan_blocks(segments, causal, gather_kv=gather_kv)
    # Arrays of an explicit mesh say in their type how they are split: nothing is configured here.
    batch, length, mesh = _row_sharding(segments.q_ids)
    heads, kv_heads, kv_length = _axes(q, 2), _axes(k, 2), _axes(segments.kv_ids, 1)

    def attend_shard(q: Array, k: Array, v: Array, segments: Segments, plan: BlockPlan | None) -> tuple[Array, Array]:
        if gather_kv:
            # The one communication of attention: keys and values of the whole row, for the queries of this shard.
            with jax.named_scope("gather_kv"):
                k, v = checkpoint_name((_gather(k, length), _gather(v, length)), KV_GATHERED)
            segments = _gather_keys(segments, kv_length)
        # Chosen by one shard's shapes: a kernel may support these and not the whole array's.
        reason = lambda name: None if name == "reference" else BACK_ENDS[name].unsupported(q, k, plan)  # noqa: E731
        name = choose(
            implementation, platform, f"attention {{name}} cannot compute q {q.shape}, k {k.shape} {q.dtype}", reason
        )
        if plan is None or name == "reference":
            return reference.attention(q, k, v, segments=segments, causal=causal, scale=scale)
        return BACK_ENDS[name].attention(q, k, v, segments=segments, plan=plan, scale=scale)

    row, keys = P(batch, length), P(batch, kv_length)
    by_head, by_kv_head = P(batch, length, heads), P(batch, length, kv_heads)
    in_specs = (by_head, by_kv_head, by_kv_head, _segment_specs(row, keys), row)
    return _sharded(attend_shard, mesh, in_specs, (by_head, by_head))(q, k, v, segments, plan)


_attend_compiled = jax.jit(_attend, static_argnames=("causal", "scale", "implementation", "gather_kv"))


def _segments_of(q: Array, k: Array, segment_ids: Any, positions: Any) -> Segments:
    """Segments of rows whose tokens are the queries and the keys, or of one document where there are no ids."""
    for name, given in (("segment_ids", segment_ids), ("positions", positions)):
        if given is not None and not q.shape[:2] == k.shape[:2] == np.shape(given):
            raise ValueError(
                f"{name} {np.shape(given)} must be (rows, tokens) of q {q.shape[:2]} and k {k.shape[:2]} alike; for "
                "queries and keys of their own give segments"
            )

    def side(x: Array) -> tuple[Array, Array]:
        # Split over devices as the tokens are.
        place = lambda y: y if _row_sharding(x)[2].empty else jax.sharding.reshard(y, P(*_row_sharding(x)[:2]))  # noqa: E731
        shape = x.shape[:2]
        ids = jnp.ones(shape, jnp.int32) if segment_ids is None else jnp.asarray(segment_ids, jnp.int32)
        order = jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32), shape)
        return place(ids), place(order if positions is None else jnp.asarray(positions, jnp.int32))

    return Segments(*side(q), *side(k))


def _check(q: Array, k: Array, v: Array, implementation: str | None) -> None:
    """Raises ValueError in one sentence where attention of these is not defined."""
    check_implementation("attention", implementation)
    if not q.ndim == k.ndim == v.ndim == 4 or 0 in (*q.shape[1:], *k.shape[1:]):
        raise ValueError(f"q {q.shape}, k {k.shape}, v {v.shape}: must be (rows, tokens, heads, head dim), none empty")
    if k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q {q.shape}, k {k.shape}, v {v.shape}: rows and head dims must agree, and k with v")
    if not q.dtype == k.dtype == v.dtype or not jnp.issubdtype(q.dtype, jnp.floating):
        raise ValueError(f"q {q.dtype}, k {k.dtype}, v {v.dtype}: dtypes must agree and be floating point")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"{q.shape[2]} query heads are not a multiple of {k.shape[2]} key heads")


def _check_segments(segments: Segments) -> None:
    """Raises ValueError where ids and positions do not fit one another."""
    for side, ids, positions in zip(("query", "key"), segments[::2], segments[1::2], strict=True):
        if ids.ndim != 2 or ids.shape != positions.shape or not ids.shape[1]:
            raise ValueError(f"{side} ids {ids.shape} and positions {positions.shape} must be the same (rows, tokens)")
        if not ids.dtype == positions.dtype == jnp.int32:
            raise ValueError(f"{side} ids {ids.dtype} and positions {positions.dtype} must be int32")
    if segments.q_ids.shape[0] != segments.kv_ids.shape[0]:
        raise ValueError(f"ids of {segments.q_ids.shape[0]} rows of queries, {segments.kv_ids.shape[0]} of keys")


def _check_plan(plan: BlockPlan, segments: Segments, causal: bool, gather_kv: bool) -> None:
    """Raises ValueError where the plan is another's: of other lengths it would make kernels read what is not there."""
    if plan.causal != causal:
        raise ValueError(f"the plan was built for causal={plan.causal}, the call asks for causal={causal}")
    (rows, queries), keys = segments.q_ids.shape, segments.kv_ids.shape[1]
    _, length, mesh = _row_sharding(segments.q_ids)
    shards = _size(mesh, length)
    # Plans have a static worst case, so their shape tells the lengths that they were built for.
    blocks = blocks_of(queries // shards, plan.block_q), blocks_of(keys // (1 if gather_kv else shards), plan.block_kv)
    expected = rows, shards, blocks[0] * blocks[1]
    if plan.by_query.shape != expected:
        raise ValueError(
            f"the plan has {plan.by_query.shape} (rows, shards, pairs of blocks of {plan.block_q} x {plan.block_kv}), "
            f"these segments {expected}: build it from them, with the same gather_kv"
        )


def _axes(x: Array, dim: int) -> Axes:
    """Returns the mesh axes that split dim `dim` of `x`, from its type."""
    spec = jax.typeof(x).sharding.spec
    return spec[dim] if dim < len(spec) else None


def _row_sharding(ids: Array) -> tuple[Axes, Axes, AbstractMesh]:
    """Mesh axes of the rows and of the length, and the mesh; an empty one where none is set."""
    return _axes(ids, 0), _axes(ids, 1), jax.typeof(ids).sharding.mesh


def _segment_specs(queries: P, keys: P) -> Segments:
    """How the arrays of segments are split, in their places."""
    return Segments(*(cast(Array, spec) for spec in (queries, queries, keys, keys)))


def _size(mesh: Mesh | AbstractMesh, axes: Axes) -> int:
    names = () if axes is None else (axes,) if isinstance(axes, str) else axes
    size = 1
    for name in names:
        size *= mesh.shape[name]
    return size


def _gather(x: Array, axes: Axes) -> Array:
    """Gathers the whole row of a shard's part; where the length is split, the transpose reduce-scatters."""
    return x if axes is None else lax.all_gather(x, axes, axis=1, tiled=True)


def _gather_keys(segments: Segments, axes: Axes) -> Segments:
    return segments._replace(kv_ids=_gather(segments.kv_ids, axes), kv_pos=_gather(segments.kv_pos, axes))


def _sharded(function: Callable[..., Any], mesh: AbstractMesh, in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """`function` of each device's part; on one device without a mesh the function itself."""
    if mesh.empty:
        return function
    # The loops over block pairs start from constants, which vma checking would call unvarying.
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
