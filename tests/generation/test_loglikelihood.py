"""Log-likelihoods of continuations: the training loss's own, whatever they are packed with and share."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from baichuan_omni_jax.config import GenerationConfig, RunConfig
from baichuan_omni_jax.errors import RequestError
from baichuan_omni_jax.generation import loglikelihood
from baichuan_omni_jax.generation.chat import ChatModel, OmniChat
from baichuan_omni_jax.generation.engine import Engine
from baichuan_omni_jax.generation.events import GenerationResult
from baichuan_omni_jax.generation.loglikelihood import ScoringRequest, rolling_windows
from baichuan_omni_jax.omni.batch import BatchSizes, empty_batch
from baichuan_omni_jax.omni.model import OmniModel
from baichuan_omni_jax.train.losses import omni_entropies
from data_pipelines.documents.chat_prompt import ChatPrompts
from data_pipelines.documents.document import encode_ids
from data_pipelines.documents.processor import Processor
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
from tests.helpers.micro import REPOSITORY, place

CFG = small_config()
LENGTH = 96


@pytest.fixture(scope="module")
def branches():
    return small_branches(one_device(), CFG)


@pytest.fixture(scope="module")
def engine(branches):
    return Engine(branches, CFG, tokenizer(), slots=2, length=LENGTH, chunk=32)


@pytest.fixture(scope="module")
def entropies(branches):
    """Cross-entropies (b, t) of a batch, as a training step computes them."""
    names = ("vision", "llm", "audio_head")
    model = jax.eval_shape(lambda: OmniModel(jax.random.key(0), CFG, COMPUTE, names))
    for name in names:
        setattr(model, name, branches[name])
    run = RunConfig(name="score", model="tiny")
    compiled = jax.jit(lambda model, batch: omni_entropies(model, batch, run)[0])

    def compute(batch):
        with jax.set_mesh(one_device()):
            return np.asarray(compiled(model, place(batch, one_device(), COMPUTE.rules)))

    return compute


def random_continuations(rng: np.random.Generator, *lengths: int) -> list[list[int]]:
    return [rng.integers(60, CFG.llm.vocab_size, n).tolist() for n in lengths]


def questions() -> list[ScoringRequest]:
    """Of text and of all media, with continuations of one token and of several, more than a row holds."""
    rng = np.random.default_rng(0)
    asked = [(random_text(rng, CFG, 9), (1, 1, 1, 1)), (random_text(rng, CFG, 30), (5, 1, 17, 2))]
    asked += [(media_prompt(rng, CFG), (3, 1, 4)), (media_prompt(rng, CFG, pictures=(8, 4, 4)), (2, 6))]
    asked += [(random_text(rng, CFG, 60), (30, 12, 25)), (random_text(rng, CFG, LENGTH), (1,))]
    return [ScoringRequest(prompt, random_continuations(rng, *lengths)) for prompt, lengths in asked]


def training_batch(request: ScoringRequest, continuation: list[int]) -> dict[str, np.ndarray]:
    """A row of one document: the prompt and one continuation, which carries the loss."""
    prompt, n, t = request.prompt, len(request.prompt.tokens), 128
    merged = CFG.vision.merged_patches
    sizes = BatchSizes(
        tokens=t,
        patches=64,
        audio_frames=16,
        audio_targets=1,
        visual_tokens=64 // merged,
        patch_values=CFG.vision.patch_values,
        levels=CFG.audio.levels,
    )
    names = (
        "tokens positions segment_ids text_targets text_weights audio_codes audio_index audio_targets audio_weights "
    )
    names += "audio_target_index patches patch_grid patch_segments visual_index"
    batch = empty_batch(names.split(), 1, sizes)
    whole = np.concatenate([prompt.tokens, continuation])
    batch["tokens"][0, : len(whole)] = whole
    batch["positions"][0, : len(whole)] = np.arange(len(whole))
    batch["segment_ids"][0, : len(whole)] = 1
    batch["text_targets"][0, : len(whole) - 1] = whole[1:]
    batch["text_weights"][0, n - 1 : len(whole) - 1] = 1
    fields = {"audio_codes": "audio_codes", "audio_index": "audio_slots", "patches": "patches"}
    fields |= {"patch_grid": "patch_grid", "patch_segments": "patch_frames", "visual_index": "visual_slots"}
    for name, field in fields.items():
        values = getattr(prompt, field)
        batch[name][0, : len(values)] = values
    return batch


def test_they_are_the_training_loss_of_prompt_and_continuation(engine, entropies):
    """Sums to 1e-4, in fp32; every prompt shares its row, and its keys, with others."""
    asked = questions()
    for request, scores in zip(asked, engine.log_likelihoods(asked), strict=True):
        assert len(scores) == len(request.continuations)
        for continuation, score in zip(request.continuations, scores, strict=True):
            batch = training_batch(request, continuation)
            loss = float((entropies(batch) * batch["text_weights"]).sum())
            assert score.log_likelihood == pytest.approx(-loss, rel=1e-4)
            assert len(score.logprobs) == len(score.greedy) == len(continuation)


def test_company_and_parts_change_nothing(engine, monkeypatch):
    asked = questions()
    together = engine.log_likelihoods(asked)
    for request, scores in zip(asked, together, strict=True):
        check_close(engine.log_likelihoods([request])[0], scores)
    # So few keys that every continuation of several tokens is computed with a prompt of its own.
    small = loglikelihood.LogLikelihoodScorer(engine._device, CFG, engine._branches, LENGTH)
    small._limits = small._limits._replace(keys=LENGTH)
    monkeypatch.setattr(engine, "_scorer", small)
    for scores, before in zip(engine.log_likelihoods(asked), together, strict=True):
        check_close(scores, before)


def check_close(scores, expected) -> None:
    assert [score.greedy for score in scores] == [score.greedy for score in expected]
    for score, other in zip(scores, expected, strict=True):
        np.testing.assert_allclose(score.logprobs, other.logprobs, rtol=1e-4, atol=1e-5)


def test_what_the_engine_says_greedily_is_greedy_and_has_its_log_probabilities(engine):
    prompt = media_prompt(np.random.default_rng(4), CFG)
    settings = replace(GenerationConfig().greedy(), max_tokens=8)
    request = engine.submit(prompt, settings, jax.random.key(0))
    # Half of the answer is made before, half after the scoring: neither disturbs the other.
    first = next(iter(request))
    other = engine.log_likelihoods(questions()[:2])
    answer = GenerationResult.from_events([first, *request])
    said, changed = list(answer.tokens), list(answer.tokens)
    changed[3] = changed[3] + 1 if changed[3] + 1 < CFG.llm.vocab_size else 60
    score, worse = engine.log_likelihoods([ScoringRequest(prompt, [said, changed])])[0]
    assert score.is_greedy
    np.testing.assert_allclose(score.logprobs, answer.logprobs, rtol=1e-4, atol=1e-5)
    assert worse.greedy[:4] == (True, True, True, False)
    assert not worse.is_greedy
    for scores, again in zip(other, engine.log_likelihoods(questions()[:2]), strict=True):
        check_close(scores, again)


def test_a_heard_prompt_is_scored_as_its_codes(engine, branches):
    """What is given as mel windows is encoded first, also where two such prompts share a row."""
    rng = np.random.default_rng(5)
    heard = [media_prompt(rng, CFG, mels=90) for _ in range(2)]
    continuations = random_continuations(rng, 1, 3)
    scores = engine.log_likelihoods([ScoringRequest(prompt, continuations) for prompt in heard])
    with jax.set_mesh(one_device()):
        codes = [engine._device.encode_audio(prompt) for prompt in heard]
    given = [replace(p, audio_codes=c, mels=(), mel_places=()) for p, c in zip(heard, codes, strict=True)]
    for before, after in zip(
        scores, engine.log_likelihoods([ScoringRequest(prompt, continuations) for prompt in given]), strict=True
    ):
        check_close(before, after)


def test_fifty_questions_of_different_lengths_compile_nothing(engine):
    engine.log_likelihoods(questions())
    rng = np.random.default_rng(3)
    before = engine.compiles
    asked = [ScoringRequest(random_text(rng, CFG, n), random_continuations(rng, 1, 1, 2)) for n in range(20, 70)]
    engine.log_likelihoods(asked)
    engine.log_likelihoods(asked[:1])
    assert engine.compiles <= before + 2
    before = engine.compiles
    for request in asked[1:]:
        engine.log_likelihoods([request])
    engine.log_likelihoods(asked[7:30])
    assert engine.compiles <= before + 1


@pytest.mark.parametrize(
    ("prompt", "continuations", "cause", "words"),
    [
        ([70] * 90, [[61], [62] * 8], "too_long", "continuation 2 of 8 are longer than 96"),
        ([70] * 97, [[61]], "too_long", "97 tokens"),
        ([70], [[61], []], "bad_message", "continuation 2 must have at least one token"),
        ([70], [[512]], "bad_message", "continuation 1"),
        ([70], [[CFG.tokens.audio_pad]], "bad_message", "none of media"),
        ([], [[61]], "bad_message", "a prompt has at least one token"),
    ],
)
def test_what_cannot_be_scored_is_refused(engine, prompt, continuations, cause, words):
    with pytest.raises(RequestError, match=words) as error:
        engine.log_likelihoods([ScoringRequest(text_prompt(prompt), continuations)])
    assert error.value.cause == cause


def test_windows_of_a_long_text_predict_every_token_once(engine):
    tokens = np.random.default_rng(6).integers(60, CFG.llm.vocab_size, 2 * LENGTH + 17).tolist()
    windows = rolling_windows(tokens, LENGTH, first=5)
    assert [token for _, predicted in windows for token in predicted] == tokens
    assert all(len(prompt) + len(predicted) - 1 <= LENGTH for prompt, predicted in windows)
    assert len(windows[-1][0]) + len(windows[-1][1]) == LENGTH + 1
    scores = engine.log_likelihoods([ScoringRequest(encode_ids(prompt, CFG), [rest]) for prompt, rest in windows])
    assert sum(len(score.logprobs) for (score,) in scores) == len(tokens)
    assert rolling_windows([], 4, first=5) == []
    assert rolling_windows([1, 2, 3, 4, 5, 6, 7], 4, first=0, context=2) == [([0], [1, 2, 3, 4]), ([3, 4], [5, 6, 7])]


def test_the_documented_example_runs(engine, capsys):
    page = (REPOSITORY / "docs" / "how-to" / "generate.md").read_text(encoding="utf-8")
    section = page[page.index("## Log-likelihoods") :]
    code = section.split("```python\n")[1].split("```")[0]
    chat = OmniChat(ChatModel(engine, CFG), ChatPrompts(Processor(CFG, tokenizer())))
    exec(code, {"chat": chat, "tokenizer": tokenizer()})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert all(line.startswith("Is the ") and line.count("-") == 3 for line in lines)
