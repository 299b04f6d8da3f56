"""What each row of the running batch is doing, and what it says next: text or speech, every row by itself.

    text     samples tokens; `<audiogen_start>`, sampled, or written where a segment of text ends, turns to speech
    speech   samples frames; the end code, or too many frames, writes `<audiogen_end>` and turns to text again

The first segment of text ends where the model says so, or with as many tokens as it may have; later ones also where
`segments` finds their end. That a segment is over shows in the token sampled next, which is then not written: it is
sampled anew after the speech.

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
from baichuan_omni_jax.generation.segments import SegmentProgress, advance_segment, init_progress, next_segment
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
    """Settings and progress of b rows."""

    # Settings, each an array so that one program serves every row.
    first: SamplingParams  # of the first segment of text
    later: SamplingParams  # of the segments after it
    codes: SamplingParams  # of speech
    key: UInt32[Array, "b 2"]  # of the row's sampling
    max_tokens: Int32[Array, " b"]
    segment_tokens: Int32[Array, " b"]  # of a segment of text, at most
    segment_frames: Int32[Array, " b"]  # of a segment's speech, at most
    max_segments: Int32[Array, " b"]
    least: Int32[Array, " b"]  # units that a later segment takes to speak, at least
    speech_enabled: Bool[Array, " b"]  # text and speech in turn, not text alone
    # Progress.
    position: Int32[Array, " b"]  # of the next item in the cache
    tokens: Int32[Array, " b"]  # of text, written in all
    in_segment: Int32[Array, " b"]  # of text, written since the last speech
    frames: Int32[Array, " b"]  # since this speech began
    segments: Int32[Array, " b"]  # how often speech began
    progress: SegmentProgress  # how far this segment of text is
    speaking: Bool[Array, " b"]
    turn: Bool[Array, " b"]  # `<audiogen_start>` comes next
    ending: Int32[Array, " b"]  # the `FinishReason` once this speech is over
    reason: Int32[Array, " b"]  # the `FinishReason` of a row that has ended
    active: Bool[Array, " b"]
    # What the repetition penalty meets: of text the whole sequence, of speech this stretch, level by level.
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
    """Makes one row that is to answer `prompt`, on the host.

    A prompt that ends in `<audiogen_start>` is answered by speech at once, and by that alone unless `settings.speech`.

    Args:
        prompt: its tokens, which the repetition penalty counts as seen.
        settings: what the caller asked for.
        key: two words of the row's own randomness (`sampling.key_data`).
        tokens: the special tokens.
        vocab: the size of the vocabulary.
        codes: levels of audio codes, and the width of `seen_codes`.
    """
    speaking = int(prompt[-1]) == tokens.audiogen_start
    seen_tokens: Any = np.zeros((1, vocab), bool)
    seen_tokens[0, prompt] = True
    first = settings.first_segment if settings.speech else settings.text

    # Numpy's arrays where JAX's are declared: a jitted function takes either.
    def number(value: int) -> Any:
        return np.array([value], np.int32)

    def flag(value: bool) -> Any:
        return np.array([value], bool)

    row_key: Any = key[None]
    no_codes: Any = np.zeros((1, *codes), bool)
    return SlotState(
        first=SamplingParams.from_settings([first]),
        later=SamplingParams.from_settings([settings.segment]),
        codes=SamplingParams.from_settings([settings.codes]),
        key=row_key,
        max_tokens=number(settings.max_tokens),
        segment_tokens=number(settings.segment_tokens),
        segment_frames=number(settings.segment_frames),
        max_segments=number(settings.max_segments),
        least=number(round(100 * settings.segment_seconds)),
        speech_enabled=flag(settings.speech),
        position=number(len(prompt)),
        tokens=number(0),
        in_segment=number(0),
        frames=number(0),
        segments=number(speaking),
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
    """Makes `count` rows that do nothing, on the host."""
    prompt = np.array([tokens.end_of_text], np.int32)
    # Made as rows of requests are: same types and shapes, so that no program is compiled for idle ones.
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
    """Decides what comes next in every active row.

    A row ends when it may sample no more, or when its item has no place in the cache.

    Args:
        rows: settings and progress of each row.
        logits: of the next token; read where a row samples one.
        hidden: the state of each row's last item, which the audio head continues.
        audio_head: makes code frames; None where no row speaks.
        table: says where a segment of text ends.
        tokens: the special tokens.
        length: of the cache.

    Returns:
        The rows after this item, and the item.
    """
    item = _next_item(rows, logits, hidden, audio_head, table, tokens)
    written, in_segment, segment_end, ending, reason = _what_ends(rows, item, length)
    frame, text, voice, silence = item.frame, item.text, item.voice, item.silence

    # What is written, and the row after it. A mark is a token that no one sampled for its own sake.
    token = jnp.where(voice, tokens.audiogen_start, jnp.where(silence, tokens.audiogen_end, item.token))
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
        tokens=written,
        in_segment=jnp.where(voice, 0, in_segment),
        frames=jnp.where(voice, 0, rows.frames + frame),
        segments=rows.segments + voice,
        progress=jax.tree.map(lambda new, old: jnp.where(voice, new, old), next_segment(item.progress), item.progress),
        speaking=(rows.speaking | voice) & ~silence,
        turn=segment_end,
        ending=ending,
        reason=jnp.where(rows.active, reason, rows.reason),
        active=active,
        seen_tokens=seen_tokens,
        # Of this stretch alone: the mark that begins another forgets them.
        seen_codes=(
            rows.seen_codes | ((jnp.arange(rows.seen_codes.shape[2]) == item.codes[:, :, None]) & frame[:, None, None])
        )
        & ~voice[:, None, None],
    )
    return after, StepOutput(kind, token, item.logprob, item.codes)


class _Item(NamedTuple):
    """What comes next in b rows, before it is known what ends with it. Flags are (b,) bool."""

    token: Array  # (b,), where `text`
    logprob: Array
    codes: Array  # (b, q), where `frame`
    frame: Array
    text: Array
    voice: Array  # `<audiogen_start>` is written
    silence: Array  # `<audiogen_end>` is
    full: Array  # the speech has as many frames as it may
    end_of_text: Array
    speak_last: Array  # the end of text waits for the last segment's speech
    cut_short: Array  # the segment ends with this token
    progress: SegmentProgress


def _next_item(
    rows: SlotState,
    logits: Array,
    hidden: Array,
    audio_head: FrameDecoder | None,
    table: PieceTable,
    tokens: SpecialTokens,
) -> _Item:
    """Samples for every active row, and says what the sample comes to; the arguments are those of `advance`."""
    # What is sampled: a token, or a frame of speech.
    full = rows.speaking & (rows.frames >= rows.segment_frames)
    draws_token = rows.active & ~rows.speaking & ~rows.turn
    draws_frame = rows.active & rows.speaking & ~full
    token, logprob = _sample_token(rows, logits, draws_token, tokens, 1 + rows.seen_codes.shape[1])
    codes = _sample_frame(rows, hidden, draws_frame, audio_head)

    # What that comes to. A sampled token before which the segment is over is dropped: speech begins in its place.
    end_code = draws_frame & (codes[:, 0] == (audio_head.end_code if audio_head else -1))
    frame = draws_frame & ~end_code
    silence = rows.active & (full | end_code)
    end_of_text = draws_token & (token == tokens.end_of_text)
    start_drawn = draws_token & (token == tokens.audiogen_start)
    text = draws_token & ~end_of_text & ~start_drawn
    # A segment ends only where it takes long enough to speak.
    may_end = (
        text
        & rows.speech_enabled
        & (rows.segments > 0)
        & ((rows.progress.units > 0) & (rows.progress.units >= rows.least))
    )
    step = advance_segment(table, rows.progress, token, may_end)
    # A segment may also end within a token (`,so`): then the token that stands for its beginning is written.
    text &= ~step.before
    cut_short = text & step.within
    wide = logits.astype(jnp.float32)
    own = jnp.take_along_axis(wide, step.token[:, None], -1)[:, 0] - jax.nn.logsumexp(wide, -1)
    logprob = jnp.where(text & (step.token != token), own, logprob)
    token = jnp.where(text, step.token, token)
    progress = jax.tree.map(lambda new, old: jnp.where(text, new, old), step.progress, rows.progress)
    # The end of text comes after the last segment's speech, if there is anything to say in it.
    speak_last = end_of_text & rows.speech_enabled & (rows.progress.units > 0)
    voice = (rows.active & rows.turn) | start_drawn | speak_last | step.before
    return _Item(token, logprob, codes, frame, text, voice, silence, full, end_of_text, speak_last, cut_short, progress)


def _what_ends(rows: SlotState, item: _Item, length: int) -> tuple[Array, Array, Array, Array, Array]:
    """Says what ends with an item: the segment (speech comes next), the speech (text comes next), or the answer.

    Args:
        rows: settings and progress of each row, before the item.
        item: what comes next in each.
        length: of the cache.

    Returns:
        Of each row after the item: tokens written, those in the segment, whether that ends, and the reasons why the
        answer ends once this speech is over and now.
    """
    text, silence = item.text, item.silence
    written, in_segment = rows.tokens + text, rows.in_segment + text
    capped = text & (written >= rows.max_tokens)
    segment_end = text & rows.speech_enabled & (item.cut_short | (in_segment >= rows.segment_tokens) | capped)
    last_segment = (
        silence & rows.speech_enabled & (rows.segments >= rows.max_segments) & (rows.ending == FinishReason.RUNNING)
    )
    ending = jnp.where(
        item.speak_last, FinishReason.END, jnp.where(capped & rows.speech_enabled, FinishReason.LENGTH, rows.ending)
    )
    # Reasons in the order in which one overrides another; a full cache ends whatever has not ended yet.
    reason = jnp.where(item.end_of_text & ~item.speak_last, FinishReason.END, FinishReason.RUNNING)
    reason = jnp.where(capped & ~rows.speech_enabled, FinishReason.LENGTH, reason)
    reason = jnp.where(
        silence, jnp.where((item.full & ~rows.speech_enabled) | last_segment, FinishReason.LENGTH, rows.ending), reason
    )
    reason = jnp.where(
        rows.active & (reason == FinishReason.RUNNING) & (rows.position >= length), FinishReason.LENGTH, reason
    )
    return written, in_segment, segment_end, ending, reason


def _sample_token(
    rows: SlotState, logits: Array, wanted: Array, tokens: SpecialTokens, stride: int
) -> tuple[Array, Array]:
    later = (rows.segments > 0) & rows.speech_enabled
    params = jax.tree.map(lambda later_, first: jnp.where(later, later_, first), rows.later, rows.first)
    # Rows that draw no token are made greedy, so that no vocabulary is sorted for them.
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
    # Likewise; their codes are made along with the others' and dropped.
    params = rows.codes._replace(temperature=jnp.where(wanted, rows.codes.temperature, 0))

    def choose(level, logits):
        seen = jax.lax.dynamic_index_in_dim(rows.seen_codes, level, 1, keepdims=False)
        # Steps of a row: its token's, then one a level, so that no two draws share their noise.
        return sample(logits, seen, params, rows.key, rows.position * (1 + levels) + 1 + level)[0]

    return jax.lax.cond(wanted.any(), lambda: audio_head.decode_frame(hidden, choose), lambda: silent)
