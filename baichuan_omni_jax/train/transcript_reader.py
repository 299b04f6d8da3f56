"""First values for audio embeddings: what the reader of the audio tokenizer's transcripts makes of each code.

In the task `audio_tokenizer` a language model reads quantized features through the branch `transcript_adapter`. The
omni model reads the same codes through the tables of its branch `audio_head`, one a level, whose rows are summed. The
adapter is RMSNorm and a linear map, so but for the norm's division it is a sum over levels too: row c of table q is the
adapter's output for code c alone, divided by the features' usual norm. An omni model whose `llm` is that reader then
understands speech from its first step on, instead of learning every code anew.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from baichuan_omni_jax.branches import BRANCHES
from baichuan_omni_jax.checkpoint import load_branches
from baichuan_omni_jax.checkpoint.trees import with_shardings
from baichuan_omni_jax.config import OmniConfig
from baichuan_omni_jax.errors import ConfigError
from baichuan_omni_jax.nn.param import ComputePolicy

TABLES = BRANCHES["audio_head"].path("embedding", "tables")


def read_audio_embeddings(
    path: str, omni: OmniConfig, compute: ComputePolicy, mesh: Any, drawn: dict[str, Array]
) -> dict[str, Array]:
    """Returns audio embeddings from the codebooks and the transcript adapter of a tokenizer's run.

    Args:
        path: a checkpoint with the branches `audio_encoder` and `transcript_adapter`, or such a run's workdir.
        omni: the model's sizes.
        compute: how the branches are computed and placed.
        mesh: the devices that they are placed on.
        drawn: all parameters by name, as first drawn; the rows that end speech are kept of them.

    Returns:
        The tables by name, placed as the drawn ones.

    Raises:
        ConfigError: the model has no audio head, there is no such checkpoint, or its sizes are others.
    """
    tables = {name: table for name, table in drawn.items() if name.startswith(TABLES)}
    if not tables:
        raise ConfigError("checkpoint.audio_embeddings_from needs the branch audio_head, which this model lacks")
    names = ("audio_encoder", "transcript_adapter")
    # Whole codebooks and the adapter are small: each device holds them while the tables are made.
    abstract = jax.eval_shape(lambda key: {name: BRANCHES[name].build(key, omni, compute) for name in names}, _key())
    placed = {name: with_shardings(module, mesh, compute.rules, name=name) for name, module in abstract.items()}
    loaded = load_branches(path, placed)
    encoder, adapter = loaded["audio_encoder"], loaded["transcript_adapter"]

    @jax.jit
    def make(tables: dict[str, Array]) -> dict[str, Array]:
        levels = encoder.quantizer.levels
        codes = [level.embed[...] for level in levels]
        norm = usual_norm(codes, [level.cluster_size[...] for level in levels])
        scale = adapter.norm.scale[...] / norm
        rows = [jnp.einsum("kf,fd->kd", code * scale, adapter.proj.weight[...]) for code in codes]
        return {f"{TABLES}{q}": tables[f"{TABLES}{q}"].at[:-1].set(rows[q]) for q in range(len(rows))}

    return make(tables)


def usual_norm(codes: list[Float[Array, "_ f"]], counts: list[Float[Array, "_"]]) -> Float[Array, ""]:
    """Returns the root mean square of the sums of codes, as often as each is used; levels count as uncorrelated."""
    squares = [
        (jnp.square(code).mean(-1) * count).sum() / count.sum() for code, count in zip(codes, counts, strict=True)
    ]
    return jnp.sqrt(sum(squares, jnp.zeros(())))


def _key() -> Array:
    return jax.random.key(0)
