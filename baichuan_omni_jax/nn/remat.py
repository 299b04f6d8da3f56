"""Trading computation for memory: what a layer keeps for its backward pass, and rows worked through in chunks.

Wide intermediates (an MLP's, the logits') then exist for one chunk at a time. Every context shard cuts its own part of
the row, so all shards work on each chunk together:
8 positions, 2 shards, chunk 2:  piece 0 = positions 0 1 | 4 5, piece 1 = positions 2 3 | 6 7.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Shaped

from baichuan_omni_jax.errors import ConfigError
from baichuan_omni_jax.kernels.flash_attention.plan import ATTENTION_OUT, KV_GATHERED
from baichuan_omni_jax.sharding import ShardingRules, axis_product, placement

# What a layer can keep for its backward pass besides its input, in the order in which keeping it pays (time for bytes):
#   attention_out   attention's output and log-sum-exp: the forward kernel, the dearest part at 64k, runs once
#   kv_gathered     the whole row's keys and values, gathered over `context` once instead of twice
#   qkv             queries, keys and values, rotated: three projections run once
#   mlp_in          the stream between attention and MLP: attention's output projection runs once
#   mlp_gate_up     what the MLP's activation reads, by far the widest: two of its three products run once
ValueName = Literal["attention_out", "kv_gathered", "qkv", "mlp_in", "mlp_gate_up"]
VALUE_NAMES: tuple[ValueName, ...] = get_args(ValueName)
assert {ATTENTION_OUT, KV_GATHERED} <= set(VALUE_NAMES)
# Behind a name: kept in the host's memory, where nothing of the chip's is left.
ON_HOST = "@host"


class KeptValues(NamedTuple):
    """Holds the names of what a layer keeps on its device, and in the host's memory."""

    device: tuple[str, ...]
    host: tuple[str, ...]


def parse_remat(policy: str) -> KeptValues | None:
    """Reads `compute.remat`: `full` keeps nothing, `none` everything (None), `attention_out+qkv@host` those.

    >>> parse_remat("attention_out+qkv@host")
    KeptValues(device=('attention_out',), host=('qkv',))

    Raises ConfigError on a name that is unknown or given twice.
    """
    if policy in ("full", "none"):
        return KeptValues((), ()) if policy == "full" else None
    items = policy.split("+")
    names = [item.removesuffix(ON_HOST) for item in items]
    for name in names:
        if name not in VALUE_NAMES or names.count(name) > 1:
            raise ConfigError(
                f"compute.remat {policy!r}: {name!r} is given twice or is none of {', '.join(VALUE_NAMES)}; names are "
                f"joined by +, `{ON_HOST}` behind one keeps it in the host's memory; or full, none, fit alone"
            )
    on_host = [item.endswith(ON_HOST) for item in items]
    return KeptValues(
        tuple(name for name, host in zip(names, on_host, strict=True) if not host),
        tuple(name for name, host in zip(names, on_host, strict=True) if host),
    )


def keepable(values: Any, name: ValueName) -> Any:
    """Returns `values`, an array or a tree of them, under a name that `compute.remat` may keep."""
    return checkpoint_name(values, name)


def remat(function: Callable, policy: str) -> Callable:
    """Returns `function` that recomputes in its backward pass all but what `policy` keeps (`none` keeps everything).

    Raises ConfigError on an unknown policy.
    """
    kept = parse_remat(policy)
    if kept is None:
        return function
    policies = jax.checkpoint_policies
    if not kept.host:
        return jax.checkpoint(function, policy=policies.save_only_these_names(*kept.device))
    return jax.checkpoint(
        function,
        policy=policies.save_and_offload_only_these_names(
            names_which_can_be_saved=kept.device,
            names_which_can_be_offloaded=kept.host,
            offload_src="device",
            offload_dst="pinned_host",
        ),
    )


def split_chunks(x: Shaped[Array, "b t ..."], chunk: int, rules: ShardingRules) -> Shaped[Array, "pieces b p ..."]:
    """Cuts (b, t, ...) into (pieces, b, shards * c, ...), c the largest divisor of a shard's part up to `chunk`."""
    # The row as (shard, piece, position in it): a cut inside each shard, so nothing moves between devices.
    mesh = jax.typeof(x).sharding.mesh
    shards = 1 if mesh.empty else axis_product(mesh, rules.axes("length"))
    local = x.shape[1] // shards
    size = max(size for size in range(1, min(local, chunk) + 1) if local % size == 0)
    rest = x.shape[2:]
    x = x.reshape(x.shape[0], shards, local // size, size, *rest, out_sharding=placement(_spec(rules)))
    x = jnp.moveaxis(x, 2, 0)
    batch, length = _spec(rules)
    return x.reshape(x.shape[0], x.shape[1], shards * size, *rest, out_sharding=placement(P(None, batch, length)))


def join_chunks(pieces: Float[Array, "pieces b p ..."], rules: ShardingRules) -> Float[Array, "b t ..."]:
    """Joins what `split_chunks` cut."""
    mesh = jax.typeof(pieces).sharding.mesh
    shards = 1 if mesh.empty else axis_product(mesh, rules.axes("length"))
    # The inverse of the cut: within a piece positions lie by shard, so again nothing moves.
    count, b, piece, *rest = pieces.shape
    batch, length = _spec(rules)
    x = pieces.reshape(count, b, shards, piece // shards, *rest, out_sharding=placement(P(None, batch, length)))
    return jnp.moveaxis(x, 0, 2).reshape(b, count * piece, *rest, out_sharding=placement(P(batch, length)))


def split_parts(x: Shaped[Array, "n ..."], count: int) -> Shaped[Array, "parts m ..."]:
    """Cuts (n, ...) into (count, n / count, ...): every device cuts what it has of the first dim, so nothing moves.

    8 rows on 2 devices, count 2: part 0 = rows 0 1 | 4 5, part 1 = rows 2 3 | 6 7. `count` divides a device's rows.
    """
    sharding = jax.typeof(x).sharding
    first, *rest = sharding.spec if x.ndim == len(sharding.spec) else (None,) * x.ndim
    axes = () if first is None else (first,) if isinstance(first, str) else first
    # The first dim may be split over several mesh axes: every device of their product cuts its own rows.
    shards = 1 if sharding.mesh.empty else axis_product(sharding.mesh, axes)
    # Said in numbers, as an array may be empty: a budget that is 0.
    own, rows = x.shape[0] // (shards * count), x.shape[0] // count
    x = x.reshape(shards, count, own, *x.shape[1:], out_sharding=placement(P(first, None, None, *rest)))
    return jnp.moveaxis(x, 1, 0).reshape(count, rows, *x.shape[3:], out_sharding=placement(P(None, first, *rest)))


def map_chunks(
    function: Callable[..., Array],
    x: Float[Array, "b t d"],
    chunk: int,
    rules: ShardingRules,
    *along: Shaped[Array, "b t ..."] | None,
    policy: str = "full",
) -> Float[Array, "b t e"]:
    """Applies `function` to each piece (b, p, d) of a row, recomputed in the backward pass but for what is kept.

    Args:
        function: (b, p, d), pieces of `along` -> (b, p, e), position by position.
        x: the rows.
        chunk: positions a piece at most, of one shard; 0 applies it to the whole row at once.
        rules: which mesh axes split the rows.
        along: what else there is of each position; None stays None.
        policy: as `remat` of the layer around it; `none` recomputes pieces nevertheless, which is what they are for.

    Returns:
        The rows (b, t, e), in their order.
    """
    if not chunk:
        return function(x, *along)
    # A scan, and a checkpoint in it: in both passes one piece's wide intermediates exist at a time. What the layer
    # keeps, the piece must keep too: nothing leaves the inner checkpoint that its own policy does not name.
    of_piece = remat(function, "full" if policy == "none" else policy)
    cut = jax.tree.map(lambda x: split_chunks(x, chunk, rules), (x, *along))
    _, pieces = jax.lax.scan(lambda _, piece: (None, of_piece(*piece)), None, cut)
    return join_chunks(pieces, rules)


def _spec(rules: ShardingRules) -> P:
    return rules.spec("batch", "length")
