"""Rows of 16-bit tables, moved as bits on a CPU: XLA's CPU casts a whole bf16 table to fp32 to read or write a row.

Elsewhere nothing is changed: a TPU would copy the whole table, cast or not.
"""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Shaped

from baichuan_omni_jax.kernels.platform import platform_of


def as_bits(x: Shaped[Array, "*dims"]) -> Shaped[Array, "*dims"]:
    """The same bits as uint16 where `x` is of a 16-bit type and on a CPU, else `x`."""
    tricked = x.dtype.itemsize == 2 and platform_of(x) == "cpu"
    return jax.lax.bitcast_convert_type(x, jnp.uint16) if tricked else x


def from_bits(bits: Shaped[Array, "*dims"], dtype: DTypeLike) -> Shaped[Array, "*dims"]:
    """Undoes `as_bits` of an array of `dtype`."""
    return bits if bits.dtype == dtype else jax.lax.bitcast_convert_type(bits, dtype)
