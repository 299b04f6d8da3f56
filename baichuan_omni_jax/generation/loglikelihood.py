"""Log-likelihoods of given continuations, many questions in a row, a prompt computed once for all its continuations.

    yes, no = engine.log_likelihoods([ScoringRequest(prompt, [[35], [36, 41]])])[0]
    yes.log_likelihood, yes.is_greedy

Rows are those of `scoring_rows`, through the training forward. Sizes of rows are powers of two, so that many questions
compile few programs.
"""

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float

from baichuan_omni_jax.config import GenerationConfig, OmniConfig
from baichuan_omni_jax.errors import RequestError
from baichuan_omni_jax.generation.events import Prompt
from baichuan_omni_jax.generation.prefill import bucket, check_prompt, count_programs
from baichuan_omni_jax.generation.programs import DecodeModels, DeviceState, on_shards, place_media
from baichuan_omni_jax.generation.scoring_rows import (
    Part,
    RowSizes,
    ScoringRow,
    add_media,
    cut_request,
    join_prompts,
    lay_out_rows,
    pack_parts,
)
from baichuan_omni_jax.kernels.flash_attention import Segments
from baichuan_omni_jax.llm.model import RowKeys
from baichuan_omni_jax.nn.param import split_as

# Positions of a row whose logits over the whole vocabulary are in memory at once.
LOGITS_AT_ONCE = 256
# Tokens of a row that short questions share; a longer question has a row of its own.
ROW_TOKENS = 4096
# A row has at most so many times as many keys as tokens: questions with more continuations are computed in parts.
MOST_KEYS = 8


@dataclass(frozen=True)
class ScoringRequest:
    """A prompt and the continuations that are asked about, as token ids: each of at least one token, text alone."""

    prompt: Prompt
    continuations: Sequence[Sequence[int]]


@dataclass(frozen=True)
class ContinuationScore:
    """What the model gives a continuation: each token's log-probability (natural), and whether none is likelier."""

    logprobs: tuple[float, ...]
    greedy: tuple[bool, ...]

    @property
    def log_likelihood(self) -> float:
        """The sum over the tokens: minus the text loss of training times their number."""
        return math.fsum(self.logprobs)

    @property
    def is_greedy(self) -> bool:
        """Whether greedy decoding would give the whole continuation."""
        return all(self.greedy)


@jax.jit
def score_rows(
    models: DecodeModels, row: ScoringRow, buffer: Float[Array, "g s d"] | None
) -> tuple[Float[Array, "g m"], Bool[Array, "g m"]]:
    """Computes the log-probability of every target, and whether no token is likelier.

    Args:
        models: what computes it.
        row: the rows' tokens, keys and targets.
        buffer: embeddings of the rows' images by position; None for text alone.

    Returns:
        Log-probabilities (fp32) and flags, zeros from `used` on, in units of `LOGITS_AT_ONCE`.
    """
    llm, audio_head = models
    row = jax.tree.map(lambda x: split_as(x, llm.compute, "batch"), row)
    split = llm.compute.rules.spec("batch")

    # The training forward, with the prompts' keys in the segments of all their continuations.
    x = llm.embed(row.chunk.tokens)
    if buffer is not None:
        buffer = split_as(buffer, llm.compute, "batch")
        x = on_shards(place_media, (split, split, split, P()), split)(x, row.chunk, buffer, audio_head)
    positions = jnp.maximum(row.chunk.positions, 0)
    segments = Segments(row.q_ids, positions, row.kv_ids, row.kv_pos)
    hidden = llm(x, positions, keys=RowKeys(row.key_places, segments))

    # Only positions that predict a target have logits, some at a time: as many rounds as the fullest row needs.
    def score_some(n: Array, found: tuple[Array, Array]) -> tuple[Array, Array]:
        some = lambda x: jax.lax.dynamic_slice_in_dim(x, n * LOGITS_AT_ONCE, LOGITS_AT_ONCE, 1)  # noqa: E731
        picked = on_shards(_pick, (split, split), split)(hidden, some(row.target_places))
        logits = jax.sharding.reshard(llm.logits(picked), llm.compute.rules.spec("batch", None, None))
        scores = on_shards(_score, (split, split), (split, split))(logits, some(row.targets))
        put = lambda whole, part: jax.lax.dynamic_update_slice_in_dim(whole, part, n * LOGITS_AT_ONCE, 1)  # noqa: E731
        return put(found[0], scores[0]), put(found[1], scores[1])

    rounds = -(-row.used.max() // LOGITS_AT_ONCE)
    empty = partial(jnp.zeros, row.targets.shape, out_sharding=llm.compute.rules.spec("batch", None))
    return jax.lax.fori_loop(0, rounds, score_some, (empty(jnp.float32), empty(jnp.bool_)))


def _pick(hidden: Array, places: Array) -> Array:
    return jax.vmap(lambda row, places: row.at[places].get(mode="clip"))(hidden, places)


def _score(logits: Array, targets: Array) -> tuple[Array, Array]:
    """Log-probabilities of targets, and whether each is the first of the likeliest."""
    picked = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
    return picked - jax.nn.logsumexp(logits, -1), jnp.argmax(logits, -1) == targets


class LogLikelihoodScorer:
    """Scores continuations with the models of an engine's `device`, whose prompts have at most `length` tokens."""

    def __init__(self, device: DeviceState, cfg: OmniConfig, branches: Collection[str], length: int):
        self._device, self._cfg, self._branches, self._length = device, cfg, branches, length
        # Of a row: tokens, keys, targets. Images lie in a buffer of `length` places, so no row has more.
        row = min(length, ROW_TOKENS)
        self._limits = RowSizes(row, MOST_KEYS * row, bucket(length, LOGITS_AT_ONCE))
        self._compiled_before = count_programs(score_rows)

    @property
    def compiles(self) -> int:
        """Programs compiled since this was made (of all engines, while several live)."""
        return count_programs(score_rows) - self._compiled_before

    def check(self, request: ScoringRequest) -> None:
        """Raises RequestError: as for a prompt that is answered, and `bad_message`, `too_long` for a continuation."""
        # Nothing is generated, so a prompt may fill a whole row.
        check_prompt(request.prompt, GenerationConfig(), self._cfg, self._branches, self._length + 1)
        special, vocabulary = self._cfg.tokens, self._cfg.llm.vocab_size
        pads = (special.audio_pad, special.image_pad, special.video_place)
        for number, continuation in enumerate(request.continuations, 1):
            ids = np.asarray(continuation)
            if not len(ids) or ids.min() < 0 or ids.max() >= vocabulary or np.isin(ids, pads).any():
                raise RequestError(
                    "bad_message",
                    f"continuation {number} must have at least one token, all in 0 .. {vocabulary - 1}, none of media",
                )
            if len(request.prompt.tokens) + len(ids) - 1 > self._length:
                raise RequestError(
                    "too_long",
                    f"the prompt of {len(request.prompt.tokens)} tokens and continuation {number} of {len(ids)} "
                    f"are longer than {self._length}",
                )

    def score(self, requests: Sequence[ScoringRequest]) -> Iterator[list[tuple[int, int, ContinuationScore]]]:
        """Scores checked requests; call `next` with the mesh set.

        Yields:
            After each program, (number of the request, number of the continuation, score).
        """
        parts: list[Part] = []
        for number, request in enumerate(requests):
            parts += cut_request(number, request.prompt, request.continuations, self._limits)
        rows = pack_parts(parts, self._limits)
        devices = self._device.devices
        for first in range(0, len(rows), devices):
            yield self._run(rows[first : first + devices])

    def _run(self, rows: list[list[Part]]) -> list[tuple[int, int, ContinuationScore]]:
        """Scores one row a device."""
        # Prompts of a row as one, whose slots count from the row's first token.
        joined = {device: join_prompts(parts) for device, parts in enumerate(rows)}
        media = {device: row for device, row in joined.items() if len(row.audio_slots) or len(row.patches)}
        images = {device: row for device, row in media.items() if len(row.patches)}
        codes = {device: self._device.encode_audio(row) for device, row in media.items()}
        row = lay_out_rows(rows, self._device.devices, LOGITS_AT_ONCE, self._limits)
        buffer = None
        if media:
            chunk = add_media(row.chunk, {device: (joined[device], codes[device]) for device in media}, self._length)
            row = row._replace(chunk=chunk)
            buffer = self._device.embed_images(images) if images else self._device.image_buffer()
        found = score_rows(self._device.models, self._device.placed(row), buffer)
        logprobs, greedy = jax.device_get(found)

        # Targets lie part after part, in the order of `lay_out_rows`.
        scores = []
        for device, parts in enumerate(rows):
            at = 0
            for part in parts:
                for number, continuation in zip(part.numbers, part.continuations, strict=True):
                    here = slice(at, at + len(continuation))
                    score = ContinuationScore(
                        tuple(logprobs[device, here].tolist()), tuple(greedy[device, here].tolist())
                    )
                    scores.append((part.request, number, score))
                    at += len(continuation)
        return scores


def rolling_windows(
    tokens: Sequence[int], length: int, first: int, context: int = 1
) -> list[tuple[list[int], list[int]]]:
    """Cuts a long text into windows (prompt, continuation), in which every token is predicted exactly once.

    The first window begins with `first`, which is not predicted. Later ones predict the next `length - context + 1`
    tokens after `context` tokens; the last, which has fewer left, sees as many before them as it has room for:

    >>> rolling_windows([1, 2, 3, 4, 5], length=2, first=0)
    [([0], [1, 2]), ([2], [3, 4]), ([3, 4], [5])]

    Args:
        tokens: of the text.
        length: most tokens of a row: of a window all but the last continuation token.
        first: the token that the text is preceded by.
        context: tokens that each window but the first sees at least, of those that were predicted before.

    Returns:
        The windows, in order; their log-likelihoods add up to the text's.
    """
    if not 1 <= context <= length:
        raise ValueError(f"context {context} must be in 1 .. length {length}")
    tokens = list(tokens)
    windows = [([first], tokens[:length])] if tokens else []
    done = min(length, len(tokens))
    while done < len(tokens):
        end = min(done + length - context + 1, len(tokens))
        # As many before as there is room for: `context` in a whole window, more in the last.
        windows.append((tokens[end - length - 1 : done], tokens[done:end]))
        done = end
    return windows
