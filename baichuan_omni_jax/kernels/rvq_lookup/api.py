"""The door to the residual lookup: picks an implementation and runs it on each device's own rows.

The rows' split is read off the type of `x`; every device holds all codebooks.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jax.sharding import reshard
from jaxtyping import Array, Float, Int32

from baichuan_omni_jax.kernels.platform import UnsupportedError, platform_of
from baichuan_omni_jax.kernels.rvq_lookup import pallas_gpu, pallas_tpu, reference, xla
from baichuan_omni_jax.kernels.rvq_lookup.xla import Prepared

# Each module has `lookup(x, codebooks)`; those for one kind of device also `unsupported(x, codebooks)`, which says why
# they cannot compute these arguments (None: they can).
BACK_ENDS = {"pallas_tpu": pallas_tpu, "pallas_gpu": pallas_gpu, "xla": xla, "reference": reference}
NEEDS = {"pallas_tpu": "tpu", "pallas_gpu": "gpu"}


def prepare_codebooks(
    codebooks: Sequence[Float[Array, "_ d"]], *, implementation: str | None = None
) -> tuple[Float[Array, "_ d"] | Prepared, ...]:
    """Codebooks to call `rvq_lookup` with many times: what it needs of them is computed once.

    Where the implementation that is meant (None: picked by platform) prepares nothing, they come back as they are.
    Raises ValueError on an unknown implementation and on no codebooks.
    """
    _check_codebooks(codebooks, implementation)
    name = implementation or f"pallas_{platform_of(codebooks[0])}"
    if name in NEEDS or name == "reference":
        return tuple(codebooks)
    return tuple(xla.prepare(codebook) for codebook in codebooks)


def rvq_lookup(
    x: Float[Array, "n d"], codebooks: Sequence[Float[Array, "_ d"] | Prepared], *, implementation: str | None = None
) -> tuple[Int32[Array, "n q"], Float[Array, "n d"], Float[Array, "n q"]]:
    """Residual vector quantization: codes, the sum of the chosen codes, and what is left after each level.

    Level by level the code nearest to the residual by Euclidean distance (fp32, the first index on a tie) is
    subtracted from it; the residual keeps the dtype of `x`. `codebooks[q]` is (size_q, d), or that prepared by
    `prepare_codebooks`. The third result is the L2
    norm of the residual after each level, fp32. Nothing is differentiated: gradients stop here.

    x = [3.1], codebooks [[0], [4]] and [[-1], [0]]: codes [1, 0], quantized [3], residual norms [0.9, 0.1].

    `implementation`: None picks by platform and support; a name never falls back.
    Raises ValueError on an unknown implementation, no or empty codebooks, other widths, or an `x` split along d, and
    UnsupportedError (a ValueError) when the named implementation cannot run here.
    """
    plain = [book.codebook if isinstance(book, Prepared) else book for book in codebooks]
    _check(x, plain, implementation)
    name = _choose(implementation, x, plain)
    codebooks = tuple(codebooks if name == "xla" else plain)
    lookup = BACK_ENDS[name].lookup
    x, codebooks = jax.lax.stop_gradient((x, codebooks))
    if not x.shape[0]:
        q = len(codebooks)
        return jnp.zeros((0, q), jnp.int32), x, jnp.zeros((0, q), jnp.float32)
    sharding = jax.typeof(x).sharding
    if sharding.mesh.empty:
        return lookup(x, codebooks)
    rows, whole = P(sharding.spec[0], None), jax.tree.map(lambda array: P(*[None] * array.ndim), codebooks)
    codebooks = jax.tree.map(reshard, codebooks, whole)
    # The loop over row blocks starts from constants, which vma checking would call unvarying.
    by_shard = jax.shard_map(lookup, mesh=sharding.mesh, in_specs=(rows, whole), out_specs=(rows,) * 3, check_vma=False)
    return by_shard(x, codebooks)


def _choose(name: str | None, x: Array, codebooks: Sequence[Array]) -> str:
    """The back end. Raises UnsupportedError when it was named and cannot run here."""
    platform = platform_of(x)
    if name is None:
        name = f"pallas_{platform}"
        return name if name in NEEDS and BACK_ENDS[name].unsupported(x, codebooks) is None else "xla"
    if name in NEEDS:
        if NEEDS[name] != platform:
            raise UnsupportedError(f"rvq {name} needs a {NEEDS[name]}; this runs on {platform}")
        reason = BACK_ENDS[name].unsupported(x, codebooks)
        if reason is not None:
            raise UnsupportedError(f"rvq {name} cannot look up x {x.shape} {x.dtype}: {reason}")
    return name


def _check_codebooks(codebooks: Sequence[Array], implementation: str | None) -> None:
    if implementation is not None and implementation not in BACK_ENDS:
        raise ValueError(f"rvq implementation {implementation!r} is not one of {', '.join(BACK_ENDS)}")
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
