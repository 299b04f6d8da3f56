"""Greedy generation by computing the whole row again for every token: slow, and with nothing that could go wrong.

Rows have one padded length, so that one program is compiled; what follows the last token is not seen, as all is causal.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Int32

from baichuan_omni_jax.llm.audio_head import AudioHeadBranch
from baichuan_omni_jax.llm.model import LanguageModel
from baichuan_omni_jax.omni.merge import merge_media, pick_slots
from baichuan_omni_jax.verify.fixtures import COMPUTE, as_media, as_rows


def greedy_text(llm: LanguageModel, prompt: Int32[np.ndarray, "b p"], steps: int) -> Int32[np.ndarray, "b t"]:
    """`prompt` and the `steps` tokens after it. All rows of the prompt are of the same length."""
    tokens = np.pad(prompt, ((0, 0), (0, steps)))
    for at in range(prompt.shape[1], tokens.shape[1]):
        tokens[:, at] = _next_token(llm, tokens, np.full((len(tokens), 1), at - 1, np.int32))
    return tokens


def greedy_codes(
    llm: LanguageModel, head: AudioHeadBranch, prompt: Int32[np.ndarray, "1 p"], *, end: int, limit: int
) -> Int32[np.ndarray, "n q"]:
    """Frames after `prompt`, up to and including the one whose level 0 is `end`, at most `limit`."""
    start, levels = prompt.shape[1], len(head.embedding.tables)
    tokens = np.pad(prompt, ((0, 0), (0, limit)))
    codes, slots = np.zeros((1, limit, levels), np.int32), np.full((1, limit), start + limit, np.int32)
    for n in range(limit):
        codes[:, n] = _next_frame(llm, head, tokens, codes, slots, np.array([[start + n - 1]], np.int32))
        if codes[0, n, 0] == end:
            break
        slots[:, n] = start + n
    return codes[0, : n + 1]


@jax.jit
def _next_token(llm, tokens, at):
    x = llm.embed(*as_rows(tokens))
    hidden = pick_slots(_hidden(llm, x), *as_media(at), COMPUTE.rules)
    return jnp.argmax(llm.logits(hidden)[:, 0], -1)


@jax.jit
def _next_frame(llm, head, tokens, codes, slots, at):
    x = llm.embed(*as_rows(tokens))
    x = merge_media(x, [(head.embed(codes), *as_media(slots))], COMPUTE.rules)
    hidden = pick_slots(_hidden(llm, x), *as_media(at), COMPUTE.rules)
    levels = codes.shape[-1]

    def choose(level, frame):
        logits = head(hidden, frame)
        width = max(x.shape[-1] for x in logits)
        # Only level 0 may choose its extra index, the end of speech.
        allowed = [x if q == 0 else x[..., :-1] for q, x in enumerate(logits)]
        padded = [jnp.pad(x[:, 0], ((0, 0), (0, width - x.shape[-1])), constant_values=-jnp.inf) for x in allowed]
        best = jax.reshard(jnp.argmax(jnp.stack(padded)[level], -1), PartitionSpec())
        return jnp.where(jnp.arange(levels) == level, best[:, None, None], frame)

    frame = jnp.zeros((len(tokens), 1, levels), jnp.int32)
    return jax.lax.fori_loop(0, levels, choose, frame)[:, 0]


def _hidden(llm, x):
    positions = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2])
    return llm(x, *as_rows(positions, jnp.ones_like(positions)))
