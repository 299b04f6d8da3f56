"""Muon: the momentum of a layer's matrix, with all its singular values made nearly 1 (Jordan et al., 2024).

The matrices of all layers are stacked, their dimensions split over the mesh, and a device orthogonalizes whole ones of
its own: for that they are dealt out, padded with zeros where the layers do not divide, and brought back. As they lie,
each of their fifteen products would need an exchange.

Updates are as large as AdamW's, whose rates and decay may stay (Liu et al., 2025): their RMS is 0.2.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from baichuan_omni_jax.sharding import axis_product

# Of x, x^3 and x^5: five rounds take singular values from 1e-3 to 1 to between 0.7 and 1.2.
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ROUNDS = 5
_RMS = 0.2


class MuonState(NamedTuple):
    """The momentum, by the parameters' names."""

    momentum: Any


def is_matrix(name: str) -> bool:
    """Whether a parameter is a stack of layers' matrices: what Muon is for."""
    return ".layers." in name and name.rsplit(".", 1)[-1] not in ("scale", "bias")


def scale_by_muon(decay: float = 0.95) -> optax.GradientTransformation:
    """Makes orthogonal updates of momentum with Nesterov's look ahead, for stacks (layers, ...) of matrices."""

    def init(params: optax.Params) -> MuonState:
        return MuonState(jax.tree.map(jnp.zeros_like, params))

    def update(updates: Any, state: Any, params: optax.Params | None = None) -> tuple[Any, Any]:
        del params
        momentum = jax.tree.map(lambda old, new: decay * old + new, state.momentum, updates)
        ahead = jax.tree.map(lambda old, new: decay * old + new, momentum, updates)
        return jax.tree.map(orthogonal_stack, ahead), MuonState(momentum)

    return optax.GradientTransformation(init, update)


def orthogonal_stack(x: Float[Array, "l ..."]) -> Float[Array, "l ..."]:
    """Orthogonalizes each of a stack of matrices, scaled to an RMS of 0.2. Layers are split over no mesh axis.

    Dimensions of heads belong to the side that makes the matrix most nearly square: (d, heads, h) is d x heads h.
    """
    sharding = jax.typeof(x).sharding
    if sharding.mesh.empty:
        return _orthogonal(x)
    # Dims that are split, with their mesh axes: what the matrices are dealt out over.
    split = [(dim, axes) for dim, axes in enumerate(sharding.spec) if axes is not None]
    devices = math.prod(axis_product(sharding.mesh, (axes,) if isinstance(axes, str) else axes) for _, axes in split)
    padded = -(-x.shape[0] // devices) * devices

    def own(part: Array) -> Array:
        part = jnp.pad(part, [(0, padded - part.shape[0]), *[(0, 0)] * (part.ndim - 1)])
        # Each device gives away layers and gets the rest of its own; then the same way back.
        for dim, axes in split:
            part = jax.lax.all_to_all(part, axes, split_axis=0, concat_axis=dim, tiled=True)
        part = _orthogonal(part)
        for dim, axes in reversed(split):
            part = jax.lax.all_to_all(part, axes, split_axis=dim, concat_axis=0, tiled=True)
        return part[: x.shape[0]]

    # Matrices that whole groups of devices have alike come out alike: the type of a device's part does not say so.
    return jax.shard_map(own, mesh=sharding.mesh, in_specs=sharding.spec, out_specs=sharding.spec, check_vma=False)(x)


def _orthogonal(x: Float[Array, "l ..."]) -> Float[Array, "l ..."]:
    layers, *dims = x.shape
    size = math.prod(dims)
    rows = min((math.prod(dims[:cut]) for cut in range(1, len(dims))), key=lambda m: abs(math.log(m * m / size)))
    matrices = x.reshape(layers, rows, -1)
    # Few rows beside many columns: the products are of the smaller side.
    wide = rows * rows <= size
    found = newton_schulz(matrices if wide else matrices.mT)
    return ((found if wide else found.mT) * (_RMS * math.sqrt(max(matrices.shape[1:])))).reshape(x.shape)


def newton_schulz(x: Float[Array, "l m n"]) -> Float[Array, "l m n"]:
    """Brings the singular values of each matrix (m <= n) near to 1; of zeros to 0."""
    a, b, c = _COEFFICIENTS
    x = x / (jnp.sqrt((x * x).sum((1, 2), keepdims=True)) + 1e-7)
    for _ in range(_ROUNDS):
        square = jnp.einsum("lmn,lkn->lmk", x, x)
        x = a * x + jnp.einsum("lmk,lkn->lmn", b * square + c * jnp.einsum("lmk,lkj->lmj", square, square), x)
    return x
