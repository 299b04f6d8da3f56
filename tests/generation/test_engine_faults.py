"""What goes wrong with one request stays with it: refused with its cause, cancelled, dropped, or failed."""

import gc
import threading
from collections import deque
from contextlib import nullcontext
from dataclasses import replace

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baichuan_omni_jax.config import GenerationConfig
from baichuan_omni_jax.errors import ConfigError, RequestError
from baichuan_omni_jax.generation import programs
from baichuan_omni_jax.generation.engine import Engine
from baichuan_omni_jax.generation.events import Finished, GenerationResult
from baichuan_omni_jax.generation.requests import Request, TextStream
from data_pipelines.tokenizers.tokenizer import encode
from tests.helpers.engine_prompts import (
    TEXTS,
    TestPrompt,
    media_prompt,
    numbers,
    one_device,
    random_text,
    small_branches,
    small_config,
    text_prompt,
    tokenizer,
)
from tests.helpers.typecheck import unchecked

CFG = small_config()
KEY = jax.random.key(0)
SILENT = replace(GenerationConfig().greedy(), max_tokens=10)
ALOUD = replace(GenerationConfig(speech=True).greedy(), max_tokens=9, segment_tokens=4, segment_frames=5)
PICTURE = media_prompt(np.random.default_rng(1), CFG, codes=0)
SOUND = media_prompt(np.random.default_rng(1), CFG, pictures=(4,), mels=90)


def with_(prompt: TestPrompt, **changes) -> TestPrompt:
    return replace(prompt, **changes)


@pytest.fixture(scope="module")
def branches():
    return small_branches(one_device(), CFG)


@pytest.fixture(scope="module")
def engine(branches):
    return Engine(branches, CFG, tokenizer(), slots=8, length=96, chunk=32)


@pytest.fixture
def prompts():
    rng = np.random.default_rng(4)
    return [random_text(rng, CFG, n) for n in (3, 9, 20, 5)]


BAD = {
    "empty": (text_prompt([]), SILENT, "bad_message", "at least one token"),
    "a token outside the vocabulary": (text_prompt([5, 512]), SILENT, "bad_message", "0 .. 511"),
    "beyond the cache": (text_prompt([5] * 96), SILENT, "too_long", "96 tokens; the cache holds 96"),
    "codes of another width": (
        with_(text_prompt([5]), audio_codes=numbers(0, 3)), ALOUD, "bad_media", "0 slots of 8 levels"
    ),
    "codes without slots": (with_(SOUND, audio_slots=numbers(1)), SILENT, "bad_media", "1 slots"),
    "a code that there is not": (
        with_(SOUND, audio_codes=np.full_like(SOUND.audio_codes, 64)), SILENT, "bad_media", "outside its codebook"
    ),
    "slots outside the prompt": (
        with_(PICTURE, visual_slots=PICTURE.visual_slots + 900), SILENT, "bad_media", "visual slots"
    ),
    "patches that are no picture": (with_(PICTURE, patches=PICTURE.patches[:5]), SILENT, "bad_media", "5 patches"),
    "pictures in disorder": (
        with_(PICTURE, patch_frames=PICTURE.patch_frames[::-1]), SILENT, "bad_media", "must ascend from 1"
    ),
    "a mel of other bins": (with_(SOUND, mels=(np.zeros((90, 7), np.float32),)), SILENT, "bad_media", "mel window"),
    "a mel of no number": (with_(SOUND, mels=(SOUND.mels[0] * np.nan,)), SILENT, "bad_media", "not finite"),
    "a mel without a place": (with_(SOUND, mel_places=()), SILENT, "bad_media", "have 0 places"),
    "a mel past its frames": (with_(SOUND, mel_places=(40,)), SILENT, "bad_media", "lie outside"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_request_is_refused_with_its_cause(engine, name):
    prompt, how, cause, words = BAD[name]
    with unchecked(), pytest.raises(RequestError, match=words) as found:
        engine.submit(prompt, how, KEY)
    assert found.value.cause == cause
    assert engine.metrics.waiting == 0


@pytest.mark.parametrize(
    ("prompt", "how", "missing"),
    [
        (PICTURE, SILENT, "vision"),
        (with_(SOUND, patches=PICTURE.patches[:0], patch_grid=numbers(0, 2), patch_frames=numbers(0),
               visual_slots=numbers(0)), SILENT, "audio_encoder"),
        (text_prompt([5]), ALOUD, "audio_head"),
        (text_prompt([5, CFG.tokens.audiogen_start]), SILENT, "audio_head"),
    ],
)  # fmt: skip
def test_what_the_checkpoint_cannot_do_is_refused(branches, prompt, how, missing):
    engine = Engine({"llm": branches["llm"]}, CFG, None, slots=1, length=64)
    with pytest.raises(RequestError, match=f"no {missing}") as found:
        engine.submit(prompt, how, KEY)
    assert found.value.cause == "no_branch"
    with pytest.raises(RequestError, match="need a tokenizer"):
        engine.submit(text_prompt([5]), replace(SILENT, stop=("x",)), KEY)


def test_an_engine_needs_a_language_model_on_a_mesh(branches):
    with pytest.raises(ConfigError, match="branch llm"):
        Engine({}, CFG, None)
    wrong = (("chunk", 100, "power of two"), ("chunk", 0, "chunk 0"), ("steps_per_call", 0, "steps_per_call 0"))
    for name, size, words in wrong:
        with pytest.raises(ConfigError, match=words):
            Engine(branches, CFG, None, **{name: size})
    nowhere = jax.tree.map(lambda x: jax.device_put(np.asarray(x), jax.devices()[0]), branches["llm"])
    with pytest.raises(ConfigError, match="mesh"):
        Engine({"llm": nowhere}, CFG, None)


def test_an_answer_ends_where_the_cache_does(engine):
    answer = GenerationResult.from_events(engine.submit(text_prompt([5] * 90), replace(SILENT, max_tokens=50), KEY))
    assert answer.finished.finish_reason == "length"
    # Six places of the cache, and the token drawn from the last, which needs none.
    assert answer.finished.tokens == 7


def test_cancelled_and_dropped_requests_give_their_slots_back(engine, prompts):
    long = replace(SILENT, max_tokens=60)
    kept, cancelled, dropped, waiting = (engine.submit(prompt, long, KEY) for prompt in prompts)
    while engine.metrics.waiting:
        next(kept)
    assert engine.metrics.in_use == 4
    cancelled.cancel()
    del dropped
    waiting.close()
    gc.collect()
    assert engine.metrics.in_use == 1
    assert isinstance(list(cancelled)[-1], Finished)
    assert list(waiting)[-1].finish_reason == "cancelled"
    assert list(kept)[-1].tokens == 60
    assert (engine.metrics.in_use, engine.metrics.waiting) == (0, 0)


def test_a_request_that_is_cancelled_while_it_waits_never_runs(engine, prompts):
    running = [engine.submit(prompts[0], SILENT, KEY) for _ in range(8)]
    late = engine.submit(prompts[1], SILENT, KEY)
    late.cancel()
    assert [type(event) for event in late] == [Finished]
    assert all(list(request)[-1].tokens == 10 for request in running)


def test_a_request_that_is_cancelled_while_its_prompt_is_read_is_read_no_further(engine, prompts, monkeypatch):
    """Three chunks of 32: it goes after the first, and what was in line takes its slot."""
    long, chunks = engine.submit(text_prompt([5] * 90), SILENT, KEY), []
    read = programs.prefill
    with monkeypatch.context() as patched:
        patched.setattr(programs, "prefill", lambda *args: chunks.append(args[2]) or read(*args))
        other = engine.submit(prompts[0], SILENT, KEY)
        engine._serve(long._active)
        assert (len(chunks), engine.metrics.in_use) == (1, 1)
        long.cancel()
        assert [type(event) for event in long] == [Finished]
        assert list(other)[-1].tokens == 10
    assert len(chunks) == 2


def test_the_last_event_is_not_lost_when_another_thread_makes_it():
    """Between finding no event and seeing that the answer is over, the answer may end."""

    class Job:
        def __init__(self):
            self.events = deque()

        @property
        def over(self) -> bool:
            self.events.append("the last")
            return True

        def cancel(self) -> None: ...

    with unchecked():
        request = Request(Job(), lambda job: None)
        assert next(request) == "the last"


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_what_breaks_off_before_a_prompt_is_seated_ends_its_request(engine, prompts, monkeypatch, caplog, error):
    """Its owner would wait for ever. Whoever interrupts the engine did so on purpose: there is nothing to log."""
    made, caches, gone = programs.init_cache, [], []

    def seat(*_):
        caches.append(engine._device._state.cache.layers[0].k)
        raise error("in the middle")

    def init_cache(*args):
        gone.append(caches[0].is_deleted())
        return made(*args)

    first, second = engine.submit(prompts[0], SILENT, KEY), engine.submit(prompts[1], SILENT, KEY)
    with monkeypatch.context() as patched:
        patched.setattr(programs, "insert", seat)
        patched.setattr(programs, "init_cache", init_cache)
        with pytest.raises(KeyboardInterrupt) if error is KeyboardInterrupt else nullcontext():
            engine._serve(first._active)
    assert first._active.over
    with pytest.raises(RequestError, match="in the middle"):
        next(first)
    assert gone == [True]  # two caches may be more than there is room for
    assert any("generating failed" in line for line in caplog.messages) == (error is ZeroDivisionError)
    assert list(second)[-1].tokens == 10
    assert engine.metrics.in_use == 0


def test_a_step_that_fails_fails_what_it_served_and_the_engine_goes_on(engine, prompts, monkeypatch):
    expected = GenerationResult.from_events(engine.submit(prompts[0], SILENT, KEY))
    with monkeypatch.context() as patched:
        patched.setattr(programs, "decode_steps", lambda *_, **__: 1 / 0)
        request = engine.submit(prompts[0], SILENT, KEY)
        with pytest.raises(RequestError, match="division") as found:
            list(request)
    assert found.value.cause == "failed"
    assert list(request) == []
    again = GenerationResult.from_events(engine.submit(prompts[0], SILENT, KEY))
    assert again.tokens == expected.tokens
    assert engine.metrics.in_use == 0


def test_media_that_cannot_be_taken_in_fail_their_request_alone(engine, prompts, monkeypatch):
    good = GenerationResult.from_events(engine.submit(prompts[0], SILENT, KEY))
    with monkeypatch.context() as patched:
        patched.setattr(programs, "encode_images", lambda *_: 1 / 0)
        first, second = engine.submit(PICTURE, SILENT, KEY), engine.submit(prompts[0], SILENT, KEY)
        with pytest.raises(RequestError, match="could not be encoded"):
            list(first)
        assert GenerationResult.from_events(second).tokens == good.tokens


def test_several_threads_are_served_at_once(engine, prompts):
    alone = [GenerationResult.from_events(engine.submit(prompt, ALOUD, KEY)) for prompt in prompts]
    found = {}

    def ask(n: int) -> None:
        found[n] = GenerationResult.from_events(engine.submit(prompts[n % 4], ALOUD, KEY))

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(found) == 12
    for n, answer in found.items():
        assert answer.finished.sequence.tolist() == alone[n % 4].finished.sequence.tolist()


def test_a_stop_string_ends_the_answer_before_it(engine, prompts):
    whole = GenerationResult.from_events(engine.submit(prompts[0], replace(SILENT, max_tokens=30), KEY))
    stop = whole.text[6:9]
    answer = GenerationResult.from_events(engine.submit(prompts[0], replace(SILENT, max_tokens=30, stop=(stop,)), KEY))
    assert answer.finished.finish_reason == "stop"
    assert answer.text == whole.text[: whole.text.index(stop)]
    assert len(answer.finished.sequence) < len(whole.finished.sequence)


WORDS = st.lists(st.sampled_from([*TEXTS, "be", "停", "é", "🙂", "abcabd", " ", "end"]), max_size=6).map("".join)


@settings(max_examples=60)
@given(WORDS, st.lists(st.sampled_from(["abd", "end", "界。", "🙂", "t to", "zz"]), max_size=2))
def test_text_comes_whole_and_in_time(text, stops):
    """Characters are never cut; nothing after a stop string is shown; every token before it comes once, in order."""
    ids = encode(tokenizer(), text)
    stream, shown, came = TextStream(tokenizer(), tuple(stops)), "", []
    cut = min((text.index(stop) for stop in stops if stop in text), default=len(text))
    for n, token in enumerate(ids):
        piece = stream.push(token, -float(n))
        shown, came = (shown + piece.text, came + list(piece.tokens)) if piece else (shown, came)
        assert text[:cut].startswith(shown)
        if stream.stopped:
            break
    last = stream.flush()
    shown, came = (shown + last.text, came + list(last.tokens)) if last else (shown, came)
    assert shown == text[:cut]
    assert stream.stopped == (cut < len(text))
    assert came == ids[: len(came)]
    assert stream.stopped or came == ids
