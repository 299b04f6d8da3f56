"""The audio head for one frame after the other: level by level, nothing of a level computed twice.

The same computation as `audio_head.AudioHead`, with a cache over depth and a level's own weights side by side. No
array carries a sharding of its own: rows are split by the caller's `shard_map`, weights are whole on every device.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from baichuan_omni_jax.llm.audio_head import AudioHeadBranch, DepthLayer
from baichuan_omni_jax.nn.layers import gelu
from baichuan_omni_jax.nn.linear import Linear
from baichuan_omni_jax.nn.param import use

# Keys and values (layers, b, levels, n, h).
DepthCache = tuple[Float[Array, "l b q n h"], Float[Array, "l b q n h"]]
Choose = Callable[[Int32[Array, ""], Float[Array, "b w"]], Int32[Array, " b"]]


@partial(jax.tree_util.register_dataclass, data_fields=["weight", "bias"], meta_fields=[])
@dataclass(frozen=True)
class Dense:
    """A weight and its bias."""

    weight: Array
    bias: Array

    @classmethod
    def of(cls, linear: Linear, dtype: DTypeLike, layer: int) -> "Dense":
        """Those of one layer of a stack."""
        return cls(*(use(x, linear.compute, dtype)[layer] for x in (linear.weight, linear.bias)))

    def __call__(self, equation: str, x: Array) -> Array:
        return jnp.einsum(equation, x, self.weight) + self.bias


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["attention_norm", "q_proj", "k_proj", "v_proj", "o_proj", "mlp_norm", "linear1", "linear2"],
    meta_fields=["eps"],
)
@dataclass(frozen=True)
class DecodeDepthLayer:
    """One layer: `linear1` (f, d) and `linear2` (d, f) are tuples of one weight a level."""

    attention_norm: Array
    q_proj: Dense
    k_proj: Dense
    v_proj: Dense
    o_proj: Dense
    mlp_norm: Array
    linear1: tuple[Array, ...]
    linear2: tuple[Array, ...]
    eps: float

    @classmethod
    def of(cls, layers: DepthLayer, dtype: DTypeLike, layer: int) -> "DecodeDepthLayer":
        attention = layers.attention
        compute = layers.linear1.compute
        first, second = (use(x.weight, compute, dtype)[layer] for x in (layers.linear1, layers.linear2))
        return cls(
            use(layers.attention_norm.scale, compute, jnp.float32)[layer],
            *(
                Dense.of(x, dtype, layer)
                for x in (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
            ),
            use(layers.mlp_norm.scale, compute, jnp.float32)[layer],
            tuple(first[:, q] for q in range(first.shape[1])),
            tuple(second[:, q] for q in range(second.shape[1])),
            layers.attention_norm.eps,
        )

    def __call__(self, x: Array, level: int, keys: Array, values: Array) -> tuple[Array, Array, Array]:
        """The stream (b, d) at `level`, and keys and values (b, levels, n, h) with this level's written."""
        y = _rms_norm(x, self.attention_norm, self.eps)
        query = self.q_proj("bd,dnh->bnh", y)
        keys = keys.at[:, level].set(self.k_proj("bd,dnh->bnh", y))
        values = values.at[:, level].set(self.v_proj("bd,dnh->bnh", y))
        seen, scale = slice(level + 1), query.shape[-1] ** -0.5
        scores = jnp.einsum("bnh,bsnh->bns", query, keys[:, seen], preferred_element_type=jnp.float32) * scale
        weights = jax.nn.softmax(scores, -1).astype(x.dtype)
        attended = self.o_proj("bnh,nhd->bd", jnp.einsum("bns,bsnh->bnh", weights, values[:, seen]))
        x = _rms_norm(x + attended, self.mlp_norm, self.eps)
        hidden = gelu(jnp.einsum("bd,fd->bf", x, self.linear1[level]))
        return x + jnp.einsum("bf,df->bd", hidden, self.linear2[level]), keys, values


@partial(
    jax.tree_util.register_dataclass, data_fields=["tables", "layers", "norm", "heads"], meta_fields=["eps", "dtype"]
)
@dataclass(frozen=True)
class DepthDecoder:
    """The branch `audio_head` made ready for decoding: layers apart, weights cast once."""

    tables: tuple[Array, ...]
    layers: tuple[DecodeDepthLayer, ...]
    norm: Array
    heads: tuple[Dense, ...]
    eps: float
    dtype: jnp.dtype

    @classmethod
    def of(cls, branch: AudioHeadBranch, dtype: DTypeLike | None = None) -> "DepthDecoder":
        """`dtype` is that of weights and stream (default: the branch's compute dtype). Inside a jitted function."""
        compute, head = branch.compute, branch.head
        dtype = jnp.dtype(dtype or compute.dtype)
        count = head.layers.linear1.weight.shape[0]
        return cls(
            tables=tuple(use(table, compute, dtype) for table in branch.embedding.tables),
            layers=tuple(DecodeDepthLayer.of(head.layers, dtype, layer) for layer in range(count)),
            norm=use(head.norm.scale, compute, jnp.float32),
            heads=tuple(Dense(use(x.weight, compute, dtype), use(x.bias, compute, jnp.float32)) for x in head.heads),
            eps=head.norm.eps,
            dtype=dtype,
        )

    @property
    def levels(self) -> int:
        return len(self.tables)

    @property
    def width(self) -> int:
        """Of a level's logits: those of the largest codebook, its extra index included."""
        return max(len(table) for table in self.tables)

    def embed(self, codes: Int32[Array, "*b q"]) -> Float[Array, "*b d"]:
        """What audio positions feed the language model: the sum over levels of each table at its code."""
        return sum(table[codes[..., q]] for q, table in enumerate(self.tables))

    def frame(self, hidden: Float[Array, "b d"], choose: Choose) -> Int32[Array, "b q"]:
        """The frames that follow `hidden`; `choose(level, logits)` takes each level's codes (b,) in turn.

        Logits are (b, width), fp32; what is no code of the level is -inf, of levels above 0 the extra index too.
        """
        b, levels = len(hidden), self.levels

        def one_level(level, carry):
            x, total, cache, codes = carry
            # A branch a level, so that its weights are read where they lie; choosing is compiled once.
            logits, cache = jax.lax.switch(level, [partial(self.logits, q) for q in range(levels)], x, cache)
            chosen = choose(level, logits)
            embedded = jax.lax.switch(level, [partial(_lookup, table) for table in self.tables], chosen)
            total = total + embedded.astype(jnp.float32)
            codes = jnp.where(jnp.arange(levels) == level, chosen[:, None], codes)
            return total.astype(self.dtype), total, cache, codes

        total, codes = jnp.zeros(hidden.shape, jnp.float32), jnp.zeros((b, levels), jnp.int32)
        carry = hidden.astype(self.dtype), total, self.empty_cache(b), codes
        with jax.named_scope("depth_decode"):
            return jax.lax.fori_loop(0, levels, one_level, carry)[-1]

    def empty_cache(self, rows: int) -> DepthCache:
        heads, head_dim = self.layers[0].q_proj.bias.shape
        shape = (len(self.layers), rows, self.levels, heads, head_dim)
        return jnp.zeros(shape, self.dtype), jnp.zeros(shape, self.dtype)

    def logits(self, level: int, x: Float[Array, "b d"], cache: DepthCache) -> tuple[Float[Array, "b w"], DepthCache]:
        """Logits of one level (see `frame`) and the cache with it, of which levels below must be there.

        `x` is the hidden state at level 0, then the sum of the embeddings of the codes chosen so far.
        """
        keys, values = cache
        for i, layer in enumerate(self.layers):
            x, k, v = layer(x, level, keys[i], values[i])
            keys, values = keys.at[i].set(k), values.at[i].set(v)
        head = self.heads[level]
        logits = jnp.einsum(
            "bd,dv->bv", _rms_norm(x, self.norm, self.eps), head.weight, preferred_element_type=jnp.float32
        )
        logits = (logits + head.bias)[:, : None if level == 0 else -1]
        return jnp.pad(logits, ((0, 0), (0, self.width - logits.shape[1])), constant_values=-jnp.inf), (keys, values)


def _lookup(table: Array, codes: Array) -> Array:
    return table[codes]


def _rms_norm(x: Array, scale: Array, eps: float) -> Array:
    wide = x.astype(jnp.float32)
    return (wide * jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + eps) * scale).astype(x.dtype)
