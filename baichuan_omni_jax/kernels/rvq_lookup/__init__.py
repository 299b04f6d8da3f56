"""The door to the residual lookup: picks an implementation and runs it on each device's own rows.

The rows' split is read off the type of `x`; every device holds all codebooks.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jax.sharding import reshard
from jaxtyping import Array, Float, Int32

from baichuan_omni_jax.kernels.backends import (
    NEEDED_PLATFORM,
    Implementation,
    check_implementation,
    check_platform,
    choose,
    platform_of,
)
from baichuan_omni_jax.kernels.rvq_lookup import pallas_gpu, pallas_tpu, reference, xla
from baichuan_omni_jax.kernels.rvq_lookup.xla import Prepared

__all__ = ["Prepared", "prepare_codebooks", "rvq_lookup"]

# Each module has `lookup(x, codebooks)` and `unsupported(x, codebooks)`, which says why it cannot compute these
# arguments (None: it can).
BACK_ENDS = {"pallas_tpu": pallas_tpu, "pallas_gpu": pallas_gpu, "xla": xla, "reference": reference}

Codebook = Float[Array | np.ndarray, "_ d"]


def prepare_codebooks(
    codebooks: Sequence[Codebook], *, implementation: Implementation | None = None
) -> tuple[Codebook | Prepared, ...]:
    """Prepares codebooks that `rvq_lookup` is called with many times: what it needs of them is computed once.

    Where the implementation that is meant (None: picked by platform) prepares nothing, they come back as they are.
    Raises ValueError on an unknown implementation and on no codebooks.
    """
    _check_codebooks(codebooks, implementation)
    # What would be picked: only the XLA implementation has something to prepare.
    name = implementation or f"pallas_{platform_of(jnp.asarray(codebooks[0]))}"
    if name in NEEDED_PLATFORM or name == "reference":
        return tuple(codebooks)
    return tuple(xla.prepare(codebook) for codebook in codebooks)


def rvq_lookup(
    x: Float[Array | np.ndarray, "n d"],
    codebooks: Sequence[Codebook | Prepared],
    *,
    implementation: Implementation | None = None,
) -> tuple[Int32[Array, "n q"], Float[Array, "n d"], Float[Array, "n q"]]:
    """Quantizes vectors by residual vector quantization (arXiv:2502.17239, section 3.1).

    Level by level the code nearest to the residual by Euclidean distance (fp32, the first index on a tie) is
    subtracted from it; the residual keeps the dtype of `x`. Nothing is differentiated: gradients stop here. Needs no
    mesh; on one, the rows of `x` may be split.

    >>> codebooks = [jnp.array([[0.0], [4.0]]), jnp.array([[-1.0], [0.0]])]
    >>> codes, quantized, norms = rvq_lookup(jnp.array([[3.1]]), codebooks)
    >>> codes.tolist(), quantized.tolist(), [round(norm, 3) for norm in norms[0].tolist()]
    ([[1, 0]], [[3.0]], [0.9, 0.1])

    Args:
        x: vectors (n, d), floating point.
        codebooks: level q's codes, (size_q, d), or what `prepare_codebooks` made of them.
        implementation: None picks by platform and support; a name never falls back.

    Returns:
        Codes (n, q); the sum of the chosen codes, in the dtype of `x`; the L2 norm of the residual after each level,
        fp32 (n, q).

    Raises:
        ValueError: an unknown implementation, no or empty codebooks, other widths, or an `x` split along d.
        UnsupportedError: a ValueError; the named implementation cannot run here.
    """
    x = jnp.asarray(x)
    plain = [book.codebook if isinstance(book, Prepared) else jnp.asarray(book) for book in codebooks]
    _check(x, plain, implementation)
    platform = platform_of(x)
    check_platform("rvq", implementation, platform)
    name = choose(
        implementation,
        platform,
        f"rvq {{name}} cannot look up x {x.shape} {x.dtype}",
        lambda name: BACK_ENDS[name].unsupported(x, plain) if name in BACK_ENDS else "rvq has no such back end",
    )
    # Only the XLA implementation reads what was prepared.
    pairs = zip(codebooks, plain, strict=True)
    books = tuple(book if name == "xla" and isinstance(book, Prepared) else array for book, array in pairs)
    lookup = BACK_ENDS[name].lookup
    x, books = jax.lax.stop_gradient((x, books))
    # No rows: nothing to look up, and no back end has to care.
    if not x.shape[0]:
        q = len(books)
        return jnp.zeros((0, q), jnp.int32), x, jnp.zeros((0, q), jnp.float32)
    sharding = jax.typeof(x).sharding
    if sharding.mesh.empty:
        return lookup(x, books)
    # Each device looks up its own rows in whole codebooks.
    rows, whole = P(sharding.spec[0], None), jax.tree.map(lambda array: P(*[None] * array.ndim), books)
    books = jax.tree.map(reshard, books, whole)
    # The loop over row blocks starts from constants, which vma checking would call unvarying.
    by_shard = jax.shard_map(lookup, mesh=sharding.mesh, in_specs=(rows, whole), out_specs=(rows,) * 3, check_vma=False)
    return by_shard(x, books)


def _check_codebooks(codebooks: Sequence[object], implementation: str | None) -> None:
    check_implementation("rvq", implementation)
    if not codebooks:
        raise ValueError("rvq_lookup needs at least one codebook")


def _check(x: Array, codebooks: Sequence[Array], implementation: str | None) -> None:
    _check_codebooks(codebooks, implementation)
    if x.ndim != 2 or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x must be floating point vectors (n, d), not {x.dtype} {x.shape}")
    for level, codebook in enumerate(codebooks):
        if codebook.ndim != 2 or codebook.shape[1] != x.shape[1] or not codebook.shape[0]:
            raise ValueError(f"codebook {level} is {codebook.shape}; expected (codes, {x.shape[1]}), at least one code")
    spec = jax.typeof(x).sharding.spec
    if len(spec) > 1 and spec[1] is not None:
        raise ValueError(f"x is split along its width over {spec[1]}; only its rows may be split")
