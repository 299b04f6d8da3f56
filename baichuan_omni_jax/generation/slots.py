"""What each row of the running batch is doing, and what it says next: text or speech, every row by itself.

    text     draws tokens; `<audiogen_start>`, drawn, or written where a piece of text ends, turns to speech
    speech   draws frames; the end code, or too many frames, writes `<audiogen_end>` and turns to text again

The first piece of text ends where the model says so, or with as many tokens as it may have; later ones also where
`speech_pieces` cuts a text. That a piece is over shows in the token drawn next, which is then not written: it is drawn
anew after the speech.

All arrays are of one device's rows: `advance` runs inside shard_map, and nothing of a row depends on another.
"""

from enum import IntEnum
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32, UInt32

from baichuan_omni_jax.config import GenerationConfig, SpecialTokens
from baichuan_omni_jax.generation.sampling import SamplingParams, sample
from baichuan_omni_jax.generation.segment_progress import SegmentProgress, advance_segment, init_progress, next_segment
from baichuan_omni_jax.llm.audio_head import Choose
from data_pipelines.text.speech_segments import PieceTable


class OutputKind(IntEnum):
    """What a step wrote for a row: nothing, a text token, a code frame, or a mark that begins or ends speech."""

    NONE = 0
    TOKEN = 1
    FRAME = 2
    MARK = 3


class FinishReason(IntEnum):
    """Why a row ended: not at all yet, at the model's end of text, or for want of tokens, frames or cache."""

    RUNNING = 0
    END = 1
    LENGTH = 2


@runtime_checkable
class FrameDecoder(Protocol):
    """What makes code frames: the branch `audio_head` in the decode layout. `end_code` of level 0 ends speech."""

    @property
    def end_code(self) -> int: ...

    def decode_frame(self, hidden: Float[Array, "b d"], choose: Choose) -> Int32[Array, "b q"]: ...


class SlotState(NamedTuple):
    """Settings and progress of b rows.

    `position` is the next item's; `tokens` were written in all, `piece` of them since the last speech, `frames` since
    speech began, `pieces` times in all. `least` are the units that a later piece takes to speak at least, `progress`
    is how far this one is. `turn`: `<audiogen_start>` comes next. `ending`: the reason to end once this speech is
    over.     `seen_tokens` are the tokens of the sequence, `seen_codes` the codes of this speech, level by level.
    """

    first: SamplingParams
    later: SamplingParams
    codes: SamplingParams
    key: UInt32[Array, "b 2"]
    max_tokens: Int32[Array, " b"]
    piece_tokens: Int32[Array, " b"]
    piece_frames: Int32[Array, " b"]
    max_pieces: Int32[Array, " b"]
    least: Int32[Array, " b"]
    speech_enabled: Bool[Array, " b"]
    position: Int32[Array, " b"]
    tokens: Int32[Array, " b"]
    piece: Int32[Array, " b"]
    frames: Int32[Array, " b"]
    pieces: Int32[Array, " b"]
    progress: SegmentProgress
    speaking: Bool[Array, " b"]
    turn: Bool[Array, " b"]
    ending: Int32[Array, " b"]
    reason: Int32[Array, " b"]
    active: Bool[Array, " b"]
    seen_tokens: Bool[Array, "b v"]
    seen_codes: Bool[Array, "b q w"]


class StepOutput(NamedTuple):
    """What came next in b rows: `kind` of it, its token or its codes, the log-probability of a token."""

    kind: Int32[Array, " b"]
    token: Int32[Array, " b"]
    logprob: Float[Array, " b"]
    codes: Int32[Array, "b q"]


def init_slot(
    prompt: Int32[np.ndarray, " n"],
    settings: GenerationConfig,
    key: UInt32[np.ndarray, "2"],
    tokens: SpecialTokens,
    vocab: int,
    codes: tuple[int, int],
) -> SlotState:
    """One row that is to answer `prompt`, on the host; `codes` are levels and the width of `seen_codes`.

    A prompt that ends in `<audiogen_start>` is answered by speech at once, and by that alone unless `settings.speech`.
    """
    speaking = int(prompt[-1]) == tokens.audiogen_start
    seen_tokens: Any = np.zeros((1, vocab), bool)
    seen_tokens[0, prompt] = True
    first = settings.first_piece if settings.speech else settings.text

    # Numpy's arrays where JAX's are declared: a jitted function takes either.
    def number(value: int) -> Any:
        return np.array([value], np.int32)

    def flag(value: bool) -> Any:
        return np.array([value], bool)

    row_key: Any = key[None]
    no_codes: Any = np.zeros((1, *codes), bool)
    return SlotState(
        first=SamplingParams.from_settings([first]),
        later=SamplingParams.from_settings([settings.piece]),
        codes=SamplingParams.from_settings([settings.codes]),
        key=row_key,
        max_tokens=number(settings.max_tokens),
        piece_tokens=number(settings.piece_tokens),
        piece_frames=number(settings.piece_frames),
        max_pieces=number(settings.max_pieces),
        least=number(round(100 * settings.piece_seconds)),
        speech_enabled=flag(settings.speech),
        position=number(len(prompt)),
        tokens=number(0),
        piece=number(0),
        frames=number(0),
        pieces=number(speaking),
        progress=init_progress(1),
        speaking=flag(speaking),
        turn=flag(False),
        ending=number(FinishReason.END if speaking and not settings.speech else FinishReason.RUNNING),
        reason=number(FinishReason.RUNNING),
        active=flag(True),
        seen_tokens=seen_tokens,
        seen_codes=no_codes,
    )


def idle_slots(count: int, tokens: SpecialTokens, vocab: int, codes: tuple[int, int]) -> SlotState:
    """`count` rows that do nothing, on the host."""
    prompt = np.array([tokens.end_of_text], np.int32)
    one = init_slot(prompt, GenerationConfig(), np.zeros(2, np.uint32), tokens, vocab, codes)
    return jax.tree.map(lambda x: np.repeat(x, count, 0), one._replace(active=np.zeros(1, bool)))


def advance(
    rows: SlotState,
    logits: Float[Array, "b v"],
    hidden: Float[Array, "b d"],
    audio_head: FrameDecoder | None,
    table: PieceTable,
    tokens: SpecialTokens,
    length: int,
) -> tuple[SlotState, StepOutput]:
    """What comes after `hidden` in every active row, and the rows after it.

    `logits` are those of rows that draw a token; `table` says where a piece of text ends. A row ends when it may draw
    no more, or when its item has no place in a cache of `length`.
    """
    # What is drawn: a token, or a frame of speech.
    full = rows.speaking & (rows.frames >= rows.piece_frames)
    draws_token = rows.active & ~rows.speaking & ~rows.turn
    draws_frame = rows.active & rows.speaking & ~full
    token, logprob = _sample_token(rows, logits, draws_token, tokens, 1 + rows.seen_codes.shape[1])
    codes = _sample_frame(rows, hidden, draws_frame, audio_head)

    # What that comes to. A drawn token before which the piece is over is dropped: speech begins in its place.
    end_code = draws_frame & (codes[:, 0] == (audio_head.end_code if audio_head else -1))
    frame = draws_frame & ~end_code
    silence = rows.active & (full | end_code)
    end_of_text = draws_token & (token == tokens.end_of_text)
    start_drawn = draws_token & (token == tokens.audiogen_start)
    text = draws_token & ~end_of_text & ~start_drawn
    step = advance_segment(table, rows.progress, token, text & rows.speech_enabled & (rows.pieces > 0) & _ripe(rows))
    text &= ~step.before
    cut_short = text & step.within
    logprob = jnp.where(cut_short, _logprob(logits, step.token), logprob)
    token = jnp.where(cut_short, step.token, token)
    progress = jax.tree.map(lambda new, old: jnp.where(text, new, old), step.progress, rows.progress)
    # The end of text comes after the last piece's speech, if there is anything to say in it.
    speak_last = end_of_text & rows.speech_enabled & (rows.progress.units > 0)
    voice = (rows.active & rows.turn) | start_drawn | speak_last | step.before

    drawn, piece = rows.tokens + text, rows.piece + text
    capped = text & (drawn >= rows.max_tokens)
    piece_over = text & rows.speech_enabled & (cut_short | (piece >= rows.piece_tokens) | capped)
    last_piece = (
        silence & rows.speech_enabled & (rows.pieces >= rows.max_pieces) & (rows.ending == FinishReason.RUNNING)
    )
    ending = jnp.where(
        speak_last, FinishReason.END, jnp.where(capped & rows.speech_enabled, FinishReason.LENGTH, rows.ending)
    )
    reason = jnp.where(end_of_text & ~speak_last, FinishReason.END, FinishReason.RUNNING)
    reason = jnp.where(capped & ~rows.speech_enabled, FinishReason.LENGTH, reason)
    reason = jnp.where(
        silence, jnp.where((full & ~rows.speech_enabled) | last_piece, FinishReason.LENGTH, rows.ending), reason
    )
    reason = jnp.where(
        rows.active & (reason == FinishReason.RUNNING) & (rows.position >= length), FinishReason.LENGTH, reason
    )

    token = jnp.where(voice, tokens.audiogen_start, jnp.where(silence, tokens.audiogen_end, token))
    kind = jnp.where(
        frame,
        OutputKind.FRAME,
        jnp.where(text, OutputKind.TOKEN, jnp.where(rows.active, OutputKind.MARK, OutputKind.NONE)),
    )
    active = rows.active & (reason == FinishReason.RUNNING)
    seen_tokens = rows.seen_tokens | (
        (jnp.arange(rows.seen_tokens.shape[1]) == token[:, None]) & (active & ~frame)[:, None]
    )
    after = rows._replace(
        position=rows.position + active,
        tokens=drawn,
        piece=jnp.where(voice, 0, piece),
        frames=jnp.where(voice, 0, rows.frames + frame),
        pieces=rows.pieces + voice,
        progress=jax.tree.map(lambda new, old: jnp.where(voice, new, old), next_segment(progress), progress),
        speaking=(rows.speaking | voice) & ~silence,
        turn=piece_over,
        ending=ending,
        reason=jnp.where(rows.active, reason, rows.reason),
        active=active,
        seen_tokens=seen_tokens,
        seen_codes=_seen_codes(rows.seen_codes, codes, frame, voice),
    )
    return after, StepOutput(kind, token, logprob, codes)


def _ripe(rows: SlotState) -> Array:
    """Where a piece takes long enough to speak."""
    return (rows.progress.units > 0) & (rows.progress.units >= rows.least)


def _logprob(logits: Array, token: Array) -> Array:
    logits = logits.astype(jnp.float32)
    return jnp.take_along_axis(logits, token[:, None], -1)[:, 0] - jax.nn.logsumexp(logits, -1)


def _sample_token(
    rows: SlotState, logits: Array, wanted: Array, tokens: SpecialTokens, stride: int
) -> tuple[Array, Array]:
    later = (rows.pieces > 0) & rows.speech_enabled
    params = jax.tree.map(lambda later_, first: jnp.where(later, later_, first), rows.later, rows.first)
    params = params._replace(temperature=jnp.where(wanted, params.temperature, 0))
    # An answer that is text alone never turns to speech.
    allowed = (jnp.arange(logits.shape[1]) != tokens.audiogen_start) | rows.speech_enabled[:, None]
    return sample(logits, rows.seen_tokens, params, rows.key, rows.position * stride, allowed)


def _sample_frame(rows: SlotState, hidden: Array, wanted: Array, audio_head: FrameDecoder | None) -> Array:
    """Codes (b, q) where `wanted`; the audio head rests when no row of this device is."""
    b, levels, _ = rows.seen_codes.shape
    silent = jnp.zeros((b, levels), jnp.int32)
    if audio_head is None:
        return silent
    params = rows.codes._replace(temperature=jnp.where(wanted, rows.codes.temperature, 0))

    def choose(level, logits):
        seen_tokens = jax.lax.dynamic_index_in_dim(rows.seen_codes, level, 1, keepdims=False)
        return sample(logits, seen_tokens, params, rows.key, rows.position * (1 + levels) + 1 + level)[0]

    return jax.lax.cond(wanted.any(), lambda: audio_head.decode_frame(hidden, choose), lambda: silent)


def _seen_codes(seen_tokens: Array, codes: Array, frame: Array, begins: Array) -> Array:
    new = (jnp.arange(seen_tokens.shape[2]) == codes[:, :, None]) & frame[:, None, None]
    return (seen_tokens | new) & ~begins[:, None, None]
