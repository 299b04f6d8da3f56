"""The generating engine: what it says is what computing everything again would say, in any company."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from baichuan_omni_jax.config import GenerationConfig, SamplingConfig
from baichuan_omni_jax.generation.engine import Engine
from baichuan_omni_jax.generation.events import GenerationResult
from baichuan_omni_jax.generation.prefill import PromptAudioEncoder
from baichuan_omni_jax.nn.param import split_as
from baichuan_omni_jax.omni.merge import merge_media
from baichuan_omni_jax.verify.fixtures import Fixtures, exact_arithmetic
from tests.helpers.engine_prompts import (
    COMPUTE,
    media_prompt,
    one_device,
    random_text,
    small_branches,
    small_config,
    text_prompt,
    tokenizer,
)
from tests.helpers.golden import golden_path

CFG = small_config()
LENGTH = 96
ALOUD = replace(GenerationConfig(speech=True).greedy(), max_tokens=12, segment_tokens=4, segment_frames=5)
SILENT = replace(GenerationConfig().greedy(), max_tokens=10)


@pytest.fixture(scope="module")
def branches():
    return small_branches(one_device(), CFG)


@pytest.fixture(scope="module")
def engine(branches):
    return Engine(branches, CFG, tokenizer(), slots=8, length=LENGTH, chunk=32)


def eight(mels: int = 0) -> list[tuple]:
    """Prompts and settings of every kind and of unequal lengths; with `mels`, two with sound to be heard."""
    rng = np.random.default_rng(0)
    tts = text_prompt([*rng.integers(60, 400, 9), CFG.tokens.audiogen_start])
    return [
        (random_text(rng, CFG, 5), SILENT),
        (random_text(rng, CFG, 40), ALOUD),
        (media_prompt(rng, CFG, mels=mels), ALOUD),
        (tts, SILENT),
        (media_prompt(rng, CFG, mels=mels), SILENT),
        (tts, ALOUD),
        (random_text(rng, CFG, 1), ALOUD),
        (random_text(rng, CFG, 70), ALOUD),
    ]


def answer_all(engine, asked) -> list[GenerationResult]:
    requests = [engine.submit(*request, jax.random.key(7)) for request in asked]
    return [GenerationResult.from_events(request) for request in requests]


def same(a: GenerationResult, b: GenerationResult) -> bool:
    return (
        a.finished.sequence.tolist() == b.finished.sequence.tolist()
        and a.finished.finish_reason == b.finished.finish_reason
        and a.text == b.text
        and [x.tolist() for x in a.speech] == [x.tolist() for x in b.speech]
    )


def test_eight_unequal_prompts_together_are_eight_alone(engine):
    asked = eight()
    together = answer_all(engine, asked)
    for one, answer in zip(asked, together, strict=True):
        assert same(answer, *answer_all(engine, [one]))
    assert {answer.finished.finish_reason for answer in together} >= {"length"}
    assert sum(len(answer.speech) for answer in together) > 8
    # More than there are slots, in another order: rows that were freed are used again.
    again = answer_all(engine, asked[::-1] + asked)
    assert all(map(same, again, together[::-1] + together))


def test_answers_equal_computing_the_whole_row_again(engine, branches):
    """Text, speech and mixed turns: log-probabilities to 1e-4, and every choice the likeliest."""
    asked = eight()
    for (prompt, _), answer in zip(asked, answer_all(engine, asked), strict=True):
        check_recomputed(branches, prompt, answer)


@pytest.mark.slow
def test_so_do_answers_to_what_was_heard(engine, branches):
    asked = eight(mels=90)
    for one, answer in zip(asked, answer_all(engine, asked), strict=True):
        assert same(answer, *answer_all(engine, [one]))
        check_recomputed(branches, one[0], answer)


@cache
def prompt_audio_encoder(tokenizer) -> PromptAudioEncoder:
    """One for all prompts, so that it is compiled once."""
    return PromptAudioEncoder(tokenizer, one_device())


def check_recomputed(branches, prompt, answer) -> None:
    sequence, n = answer.finished.sequence, len(prompt.tokens)
    spoken = np.flatnonzero(sequence[n:] == CFG.tokens.audio_pad) + n
    codes = np.concatenate([prompt.audio_codes, *answer.speech]).astype(np.int32)
    if prompt.mels:
        with jax.set_mesh(one_device()):
            codes[: len(prompt.audio_codes)] = prompt_audio_encoder(branches["audio_encoder"]).encode(prompt)
    slots = np.concatenate([prompt.audio_slots, spoken]).astype(np.int32)
    logits, levels = recompute(branches, prompt, sequence, codes, slots)
    at, speech = 0, (CFG.tokens.audio_pad, CFG.tokens.audiogen_start)
    for place in range(n, len(sequence)):
        if sequence[place] == CFG.tokens.audio_pad:
            frame = codes[len(prompt.audio_codes) :][np.searchsorted(spoken, place)]
            for q, level in enumerate(levels):
                row = np.asarray(level[0, place - 1])[: CFG.audio.codebook_sizes[q] + (q == 0)]
                assert row[frame[q]] >= row.max() - 1e-4 * np.abs(row).max()
        elif sequence[place] == CFG.tokens.audiogen_end and sequence[place - 1] in speech:
            continue  # written by the end of the frames, not chosen, though text may choose the same token next
        elif at < len(answer.tokens) and sequence[place] == answer.tokens[at]:
            row = logits[0, place - 1].astype(np.float64)
            total = np.log(np.exp(row - row.max()).sum()) + row.max()
            assert abs(row[answer.tokens[at]] - total - answer.logprobs[at]) < 1e-4 * np.abs(row).max()
            at += 1
    assert at == len(answer.tokens)


def recompute(branches, prompt, sequence, codes, slots):
    """Logits of every position of a whole row, and of each level of the frame after it."""
    n = 128

    def pad(x, fill, size=n):
        out = np.full((1, size, *x.shape[1:]), fill, x.dtype)
        out[0, : len(x)] = x
        return out

    frames = np.zeros((1, n, codes.shape[1]), np.int32)
    frames[0, slots - 1] = codes
    arrays = [pad(sequence, 0), pad(codes, 0), pad(slots, n), frames]
    pictures = [pad(x, 0, 256) for x in (prompt.patches, prompt.patch_grid, prompt.patch_frames)]
    with jax.set_mesh(one_device()):
        logits, levels = _forward(branches, *arrays, *pictures, pad(prompt.visual_slots, n, 64))
    return np.asarray(logits), [np.asarray(x) for x in levels]


@jax.jit
def _forward(branches, tokens, codes, slots, frames, patches, grid, ids, visual_slots):
    llm, head = branches["llm"], branches["audio_head"]
    row = lambda x: split_as(x, COMPUTE, "batch", "length")  # noqa: E731
    media = lambda x: split_as(x, COMPUTE, "batch", "media")  # noqa: E731
    seen = branches["vision"](patches, grid, ids), media(visual_slots)
    x = merge_media(llm.embed(row(tokens)), [(head.embed(codes), media(slots)), seen], COMPUTE.rules)
    positions = row(jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape))
    hidden = llm(x, positions, jnp.ones_like(positions))
    return llm.logits(hidden), head(hidden, frames)


def test_a_request_draws_the_same_in_any_company(engine):
    rng = np.random.default_rng(2)
    prompt = media_prompt(rng, CFG)
    settings = replace(GenerationConfig(speech=True), max_tokens=14, segment_frames=4)
    hot = replace(
        settings, first_segment=SamplingConfig(temperature=2.0), codes=SamplingConfig(temperature=2.0, top_p=0.9)
    )
    (alone,) = answer_all(engine, [(prompt, settings)])
    others = [(random_text(rng, CFG, n), hot) for n in (3, 30, 60)]
    first, second, *_ = (
        answer_all(engine, [(prompt, settings), others[0]]),
        answer_all(engine, [*others, (prompt, settings)]),
    )
    assert same(first[0], alone)
    assert same(second[-1], alone)
    other_key = GenerationResult.from_events(engine.submit(prompt, settings, jax.random.key(8)))
    assert not same(other_key, alone)


def test_fifty_prompts_of_different_lengths_compile_nothing(engine):
    engine.warm_up()
    before = engine.compiles
    rng = np.random.default_rng(3)
    asked = [(random_text(rng, CFG, n), replace(SILENT, max_tokens=2)) for n in range(1, 90, 2)]
    asked += [(media_prompt(rng, CFG, pictures=(4,) * n), replace(ALOUD, max_tokens=2)) for n in range(1, 6)]
    assert len(asked) == 50
    answer_all(engine, asked)
    assert engine.compiles == before


@pytest.mark.slow
def test_the_golden_answers_alone_and_among_others():
    fixtures = Fixtures(golden_path("omni_a"))
    text, speech = fixtures.golden("generate_text"), fixtures.golden("generate_audio")
    cfg = fixtures.config
    with exact_arithmetic():
        branches = {name: fixtures.branch(name) for name in ("llm", "audio_head")}
    engine = Engine(branches, cfg, None, slots=4, length=80)
    rng, sequence, codes = np.random.default_rng(0), text.reference("sequence")[0], speech.reference("codes")
    read, said = text.input("prompt")[0], speech.input("prompt")[0]
    settings = replace(GenerationConfig().greedy(), max_tokens=len(sequence) - len(read), segment_frames=48)
    asked = [(text_prompt(read), settings), (text_prompt(said), settings)]
    others = [(text_prompt(rng.integers(0, 400, n)), replace(ALOUD, max_tokens=30)) for n in (3, 30)]
    for company in (asked[:1], asked[1:], [*others, *asked]):
        answers = {
            tuple(one[0].tokens.tolist()): a for one, a in zip(company, answer_all(engine, company), strict=True)
        }
        if found := answers.get(tuple(read.tolist())):
            assert found.finished.sequence.tolist() == sequence.tolist()
        if found := answers.get(tuple(said.tolist())):
            # The reference's last frame is the one whose level 0 says the end.
            assert codes[-1, 0] == cfg.audio.codebook_sizes[0]
            assert found.finished.finish_reason == "end"
            assert found.speech[0].tolist() == codes[:-1].tolist()
