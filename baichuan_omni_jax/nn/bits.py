"""Rows of 16-bit tables, moved as bits: XLA's CPU casts a whole bf16 table to fp32 to read or write one of its rows."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Shaped


def as_bits(x: Shaped[Array, "*dims"]) -> Shaped[Array, "*dims"]:
    """The same bits as uint16 where `x` is of a 16-bit type, else `x`."""
    return jax.lax.bitcast_convert_type(x, jnp.uint16) if x.dtype.itemsize == 2 else x


def from_bits(bits: Shaped[Array, "*dims"], dtype: DTypeLike) -> Shaped[Array, "*dims"]:
    """Undoes `as_bits` of an array of `dtype`."""
    return bits if bits.dtype == dtype else jax.lax.bitcast_convert_type(bits, dtype)
