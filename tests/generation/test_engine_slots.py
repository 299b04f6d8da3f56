"""When a row writes text and when it speaks: rows of one batch by scripts of their own, without a language model."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from baichuan_omni_jax.config import GenerationConfig
from baichuan_omni_jax.generation.slots import OutputKind, advance, init_slot
from data_pipelines.text.speech_segments import table_of_texts
from tests.helpers.engine_prompts import small_config

CFG = small_config()
IDS = CFG.tokens
V, W, LENGTH = CFG.llm.vocab_size, max(CFG.audio.codebook_sizes) + 1, 40
START, STOP, EOT = IDS.audiogen_start, IDS.audiogen_end, IDS.end_of_text
COMMA, QUOTED, SILENT_SIGN = 100, 110, 111
# What tokens are to the rule that ends a piece: 100 a comma, 110 a comma and more, 111 a sign; the others are words.
TEXTS = {COMMA: ",", QUOTED: ",so", SILENT_SIGN: " -"}
TABLE = table_of_texts([TEXTS.get(i, "" if i in (START, STOP, EOT) else " word") for i in range(V)])
END_CODE = CFG.audio.codebook_sizes[0]
ALOUD = replace(
    GenerationConfig(speech=True).greedy(), max_tokens=20, segment_tokens=3, segment_frames=2, segment_seconds=0.5
)
LONG = replace(ALOUD, segment_tokens=9)
SILENT = replace(GenerationConfig().greedy(), max_tokens=3)


class Script:
    """Says given frames."""

    end_code = END_CODE

    def __init__(self, codes):
        self.codes = codes

    def decode_frame(self, hidden, choose):
        return self.codes


@jax.jit
def step(rows, logits, codes):
    hidden = jnp.zeros((len(logits), 1))
    table = jax.tree.map(jnp.asarray, TABLE)
    return advance(rows, logits, hidden, Script(codes), table, IDS, LENGTH)


def play(*rows: tuple[list[int], GenerationConfig, list[int]]) -> list[tuple[list, int]]:
    """What rows write: (prompt, settings, what is drawn: tokens, or level-0 codes while it speaks) -> items, reason."""
    zero = np.zeros(2, np.uint32)
    new = [init_slot(np.array(prompt, np.int32), how, zero, IDS, V, (8, W)) for prompt, how, _ in rows]
    state = jax.tree.map(lambda *x: np.concatenate(x), *new)
    scripts, written = [list(script) for *_, script in rows], [[] for _ in rows]
    while np.asarray(state.active).any():
        logits, codes = np.zeros((len(rows), V), np.float32), np.zeros((len(rows), 8), np.int32)
        for row, script in enumerate(scripts):
            wanted = script[0] if script else EOT
            logits[row, wanted], codes[row, 0] = 5, wanted
            logits[row, 105] = 1
        draws = np.asarray(state.active & ~state.turn & ~(state.speaking & (state.frames >= state.segment_frames)))
        state, items = step(state, logits, codes)
        for row, (kind, token) in enumerate(zip(np.asarray(items.kind), np.asarray(items.token), strict=True)):
            if kind in (OutputKind.TOKEN, OutputKind.MARK):
                written[row].append(int(token))
            elif kind == OutputKind.FRAME:
                written[row].append(f"frame {int(items.codes[row, 0])}")
            if draws[row]:
                scripts[row] = scripts[row][1:]
    return [(row, ("running", "end", "length")[int(reason)]) for row, reason in zip(written, state.reason, strict=True)]


CASES = {
    "punctuation does not end the first piece, the model does": (
        ([7], LONG, [101, 102, COMMA, 103, START, 5, END_CODE, EOT]),
        ([101, 102, COMMA, 103, START, "frame 5", STOP, EOT], "end"),
    ),
    "it ends later ones, before the next word, which is drawn again": (
        ([7, START], LONG, [5, END_CODE, 101, 102, COMMA, 103, 6, END_CODE, 104, EOT, END_CODE]),
        (["frame 5", STOP, 101, 102, COMMA, START, "frame 6", STOP, 104, START, STOP], "end"),
    ),
    "or within a token, of which the mark is kept": (
        ([7, START], LONG, [END_CODE, 101, 102, QUOTED, 6, END_CODE, EOT]),
        ([STOP, 101, 102, COMMA, START, "frame 6", STOP, EOT], "end"),
    ),
    "but no piece of less than its least time": (
        ([7, START], LONG, [END_CODE, 101, COMMA, 102, COMMA, 103, 6, END_CODE, EOT]),
        ([STOP, 101, COMMA, 102, COMMA, START, "frame 6", STOP, EOT], "end"),
    ),
    "nor one without anything to say": (
        ([7, START], replace(LONG, segment_seconds=0.0), [END_CODE, SILENT_SIGN, COMMA, SILENT_SIGN, EOT]),
        ([STOP, SILENT_SIGN, COMMA, SILENT_SIGN, EOT], "end"),
    ),
    "an answer has so many pieces at most": (
        ([7], replace(ALOUD, max_segments=2), [101, START, 5, END_CODE, 102, START, 6, END_CODE]),
        ([101, START, "frame 5", STOP, 102, START, "frame 6", STOP], "length"),
    ),
    "so do as many tokens, and as many frames end speech": (
        ([7], ALOUD, [101, 102, 103, 5, 6, EOT]),
        ([101, 102, 103, START, "frame 5", "frame 6", STOP, EOT], "end"),
    ),
    "the last piece is spoken before the end": (
        ([7], ALOUD, [101, EOT, 5, END_CODE]),
        ([101, START, "frame 5", STOP], "end"),
    ),
    "the model may begin to speak by itself": (
        ([7], ALOUD, [101, START, 5, END_CODE, 102, EOT, END_CODE]),
        ([101, START, "frame 5", STOP, 102, START, STOP], "end"),
    ),
    "but not where the answer is text alone": (([7], SILENT, [101, START, 102]), ([101, 105, 102], "length")),
    "text alone ends by itself": (([7], SILENT, [101, EOT]), ([101, EOT], "end")),
    "a prompt that ends in the start of speech is spoken": (
        ([7, START], SILENT, [5, END_CODE]),
        (["frame 5", STOP], "end"),
    ),
    "for as long as it may be": (
        ([7, START], replace(SILENT, segment_frames=2), [5, 6]),
        (["frame 5", "frame 6", STOP], "length"),
    ),
    "and goes on where it is to answer aloud": (
        ([7, START], ALOUD, [5, END_CODE, 101, 102, START, END_CODE, EOT]),
        (["frame 5", STOP, 101, 102, START, STOP, EOT], "end"),
    ),
    "too many tokens are spoken too": (
        ([7], replace(ALOUD, max_tokens=2), [101, 102, 5, END_CODE]),
        ([101, 102, START, "frame 5", STOP], "length"),
    ),
    "a full cache ends it anywhere": (([7] * (LENGTH - 1), ALOUD, [101, 102, 103]), ([101, 102], "length")),
}


def test_rows_take_their_turns_each_by_itself():
    """All scripts at once, as rows of one batch."""
    found = play(*(case for case, _ in CASES.values()))
    for name, row in zip(CASES, found, strict=True):
        assert row == CASES[name][1], name


def test_a_penalty_knows_each_level_s_codes_of_this_speech_alone():
    one = init_slot(np.array([START], np.int32), ALOUD, np.zeros(2, np.uint32), IDS, V, (8, W))
    b = len(CASES)  # as above, so that nothing is compiled again
    rows = jax.tree.map(lambda x: np.repeat(x, b, 0), one)
    nothing, codes = np.zeros((b, V), np.float32), np.full((b, 8), 4, np.int32)
    rows, _ = step(rows, nothing, codes)
    seen_tokens = np.asarray(rows.seen_codes)
    assert seen_tokens[:, :, 4].all()
    assert seen_tokens.sum() == b * 8
    rows, _ = step(rows._replace(speaking=np.zeros(b, bool), turn=np.ones(b, bool)), nothing, codes)
    assert not np.asarray(rows.seen_codes).any()
