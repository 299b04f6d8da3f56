"""Rows of special tokens that train while the tables they belong to are frozen.

A language model that has read text alone knows nothing of `<audiogen_start>` and its like: their rows in the text
embedding and the output head are as they were drawn. Where all else of it stays frozen these few rows can still be
learned: they are arrays of their own, (n, d), with gradients and optimizer state of that size, and stand in for the
table's rows wherever those would be read. The table's rows of these ids are never read, so they are kept at 0.

    ids [57, 58]    tokens  [ 3  57   9 ]    embedding: table[3], rows[0], table[9]
                    logits of 0 .. 56: hidden @ table^T, of 57 and 58: hidden @ rows^T, of 59 ..: hidden @ table^T
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from baichuan_omni_jax.nn.linear import gather_rows, look_up
from baichuan_omni_jax.nn.param import ComputePolicy

# Logical axes of rows: few, so never split by vocabulary.
ROWS = ("codes", "embed")


@dataclass(frozen=True, eq=False)
class SpecialRows:
    """What stands in for the rows `ids` of the text embedding and of the head (None: the table's own rows count)."""

    ids: tuple[int, ...]
    embedding: Float[Array, "n d"] | None = None
    head: Float[Array, "n d"] | None = None

    def substitute(
        self, x: Float[Array, "b t d"], tokens: Int32[Array, "b t"], compute: ComputePolicy
    ) -> Float[Array, "b t d"]:
        """`x`, the tokens' embeddings, with those of special tokens replaced by their rows."""
        if self.embedding is None:
            return x
        # Both are read for every token and one is selected: no shape depends on how many are special.
        place, special = _find(tokens, self.ids)
        rows = look_up(gather_rows(self.embedding, ROWS, compute), place, out=jax.typeof(x).sharding.spec)
        return jnp.where(special[..., None], rows, x)


@partial(jax.jit, static_argnames="ids")
def take_rows(table: Float[Array, "v d"], ids: tuple[int, ...]) -> tuple[Float[Array, "n d"], Float[Array, "v d"]]:
    """The rows `ids` of a table, and the table with 0 in their place."""
    spec = jax.sharding.PartitionSpec(None, jax.typeof(table).sharding.spec[1])
    rows = table.at[jnp.asarray(ids)].get(out_sharding=spec)
    _, special = _find(_names(table), ids)
    return rows, jnp.where(special[:, None], 0, table)


@partial(jax.jit, static_argnames="ids")
def put_rows(table: Float[Array, "v d"], rows: Float[Array, "n d"], ids: tuple[int, ...]) -> Float[Array, "v d"]:
    """The table, in the rows' dtype, with its rows `ids` replaced: what a checkpoint holds."""
    place, special = _find(_names(table), ids)
    # Selected row by row where the table lies: no write at an index that another device may hold.
    spread = rows.at[place].get(out_sharding=jax.typeof(table).sharding.spec)
    return jnp.where(special[:, None], spread, table.astype(rows.dtype))


def _names(table: Array) -> Int32[Array, "v"]:
    """The id of each row, placed as the rows are."""
    spec = jax.sharding.PartitionSpec(jax.typeof(table).sharding.spec[0])
    return jax.sharding.reshard(jnp.arange(table.shape[0], dtype=jnp.int32), spec)


def _find(names: Int32[Array, "..."], ids: tuple[int, ...]) -> tuple[Int32[Array, "..."], Array]:
    """The place of each name among `ids` (0 where it is none of them), and whether it is one."""
    equal = names[..., None] == jnp.asarray(ids, jnp.int32)
    return jnp.argmax(equal, -1).astype(jnp.int32), equal.any(-1)
