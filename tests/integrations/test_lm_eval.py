"""The model of lm-eval: its requests become prompts and continuations, its answers the engine's own."""

import importlib
from dataclasses import replace

import jax
import numpy as np
import pytest

from baichuan_omni_jax.config import GenerationConfig, SamplingConfig
from baichuan_omni_jax.errors import ConfigError
from baichuan_omni_jax.generation.loglikelihood import ScoringRequest, rolling_windows
from baichuan_omni_jax.integrations.harness_model import HarnessModel, generation_settings
from data_pipelines.documents.document import encode_ids
from data_pipelines.tokenizers.tokenizer import encode, plain_tokenizer
from tests.helpers.fake_harnesses import Request
from tests.helpers.typecheck import unchecked

QUESTIONS = ["Which star is nearest?\nAnswer:", "The lake is", "2 + 2 ="]
CHOICES = [" A", " B", " the sun", " calm and cold"]
GREEDY = {"until": ["\n"], "max_gen_toks": 6, "do_sample": False}


@pytest.fixture(scope="module")
def adapter(installed):
    return importlib.import_module("baichuan_omni_jax.integrations.lm_eval")


@pytest.fixture
def lm(adapter, model):
    return adapter.BaichuanOmniLM.from_model(model)


def ids(model, text: str) -> list[int]:
    return encode(plain_tokenizer(model.engine.tokenizer), text)


def score(model, context: list[int], continuation: list[int]):
    prompt = encode_ids(context, model.engine.cfg)
    return model.engine.log_likelihoods([ScoringRequest(prompt, [continuation])])[0][0]


def test_options_are_scored_as_the_engine_scores_them(lm, model):
    requests = [Request((question, choice)) for question in QUESTIONS for choice in CHOICES]
    answers = lm.loglikelihood(requests)
    for request, (log_likelihood, greedy) in zip(requests, answers, strict=True):
        expected = score(model, *(ids(model, text) for text in request.args))
        assert log_likelihood == pytest.approx(expected.log_likelihood, rel=1e-4)
        assert greedy == expected.is_greedy


def test_options_of_a_question_share_its_prompt(lm, model, monkeypatch):
    asked = []
    real = model.engine.log_likelihoods
    monkeypatch.setattr(model.engine, "log_likelihoods", lambda requests: asked.extend(requests) or real(requests))
    lm.loglikelihood([Request((question, choice)) for choice in CHOICES for question in QUESTIONS])
    assert [len(request.continuations) for request in asked] == [len(CHOICES)] * len(QUESTIONS)


def test_without_a_context_the_end_of_text_stands_before(lm, model):
    ((log_likelihood, _),) = lm.loglikelihood([Request(("", "The lake"))])
    expected = score(model, [model.engine.cfg.tokens.end_of_text], ids(model, "The lake"))
    assert log_likelihood == pytest.approx(expected.log_likelihood, rel=1e-4)


def test_a_context_that_is_too_long_loses_its_left(lm, model):
    context, continuation = "star " * 400 + QUESTIONS[0], CHOICES[3]
    ((log_likelihood, _),) = lm.loglikelihood([Request((context, continuation))])
    kept = ids(model, context)[-(lm.max_length + 1 - len(ids(model, continuation))) :]
    expected = score(model, kept, ids(model, continuation))
    assert log_likelihood == pytest.approx(expected.log_likelihood, rel=1e-4)
    with pytest.raises(ConfigError, match="length is 128"):
        lm.loglikelihood([Request(("a", " lake" * 300))])


def test_whole_texts_are_scored_window_by_window(lm, model):
    texts = ["", "The lake.", "a star and a lake, " * 60]
    found = lm.loglikelihood_rolling([Request((text,)) for text in texts])
    for text, total in zip(texts, found, strict=True):
        windows = rolling_windows(ids(model, text), lm.max_length, lm.eot_token_id)
        assert total == pytest.approx(sum(score(model, *window).log_likelihood for window in windows), rel=1e-4)
    assert found[0] == 0.0


def test_rolling_windows_are_lm_evals_own():
    utils = pytest.importorskip("lm_eval.utils", reason="needs the extra lm-eval")
    if not hasattr(utils, "get_rolling_token_windows"):
        pytest.skip("needs the extra lm-eval, not its double")
    rng = np.random.default_rng(0)
    for length in (1, 2, 5, 8):
        for count in range(1, 30):
            tokens = rng.integers(0, 99, count).tolist()
            for context in range(1, length + 1):
                theirs = utils.get_rolling_token_windows(tokens, 100, length, context)
                theirs = [tuple(map(list, utils.make_disjoint_window(pair))) for pair in theirs]
                assert rolling_windows(tokens, length, 100, context) == theirs


def test_answers_are_the_engines_and_end_before_a_stop_string(lm, model):
    answers = lm.generate_until([Request((question, dict(GREEDY))) for question in QUESTIONS * 3])
    settings = replace(GenerationConfig().greedy(), max_tokens=6, stop=("\n",))
    prompts = [encode_ids(ids(model, question), model.engine.cfg) for question in QUESTIONS]
    expected = [answer.text for answer in model.engine.generate(prompts, settings, [jax.random.key(0)] * len(prompts))]
    assert answers == expected * 3
    # What it would have said, cut where a stop string begins.
    longest = max(expected, key=len)
    question, stop = QUESTIONS[expected.index(longest)], longest[1:3]
    assert stop
    (cut,) = lm.generate_until([Request((question, GREEDY | {"until": stop}))])
    assert cut == longest[: longest.index(stop)]


def test_a_task_that_asks_for_more_than_there_is_keeps_half_of_its_context(lm):
    (answer,) = lm.generate_until([Request(("star " * 400, {"max_gen_toks": 10_000}))])
    assert isinstance(answer, str)


def test_a_conversation_is_encoded_as_chat_encodes_it(lm, model):
    """A name of a special token that somebody wrote is text there too."""
    history = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is <C_A> and a star?"},
        {"role": "assistant", "content": "A star."},
        {"role": "user", "content": "And the lake?"},
    ]
    text = lm.apply_chat_template(history)
    expected = model.chat.processor.encode_messages(history).tokens.tolist()
    assert lm.tok_encode(text) == expected
    # A turn that the model continues; a continuation is text, whatever it looks like.
    begun = lm.apply_chat_template([*history, {"role": "assistant", "content": "It is"}], add_generation_prompt=False)
    assert lm.tok_encode(begun) == expected + ids(model, "It is")
    context, continuation = lm._encode_pair(text, "<C_A>")
    assert (context, continuation) == (expected, ids(model, "<C_A>"))
    with pytest.raises(ConfigError, match="role 'tool'"):
        lm.apply_chat_template([{"role": "tool", "content": "a"}])


def test_its_names_are_those_of_the_tokenizer(lm):
    assert lm.tokenizer_name.startswith("baichuan-omni-")
    assert lm.chat_template(True) == "<B_SYS>{system}<C_Q>{user}<C_A>{assistant}"
    assert lm.chat_template(False) is None
    assert lm.tok_decode(lm.tok_encode("The lake is calm.")) == "The lake is calm."


@pytest.mark.parametrize(
    ("arguments", "settings"),
    [
        ({}, {"max_tokens": 256}),
        ({"until": "a", "max_tokens": 3, "num_beams": 1}, {"max_tokens": 3, "stop": ("a",)}),
        ({"until": ["a", "", "b"], "max_new_tokens": 4, "max_gen_toks": 5}, {"max_tokens": 5, "stop": ("a", "b")}),
        ({"do_sample": False, "temperature": 0.7, "top_p": 0.9}, {}),
        ({"do_sample": True, "temperature": 0.0}, {}),
        ({"temperature": 0.7, "top_p": 0.9, "top_k": -1}, {"text": SamplingConfig(temperature=0.7, top_p=0.9)}),
        ({"do_sample": True, "top_k": 5}, {"text": SamplingConfig(temperature=1.0, top_k=5)}),
        ({"repetition_penalty": 1.2}, {"text": SamplingConfig(repetition_penalty=1.2)}),
    ],
)
def test_generation_arguments_of_tasks(arguments, settings):
    expected = replace(GenerationConfig(text=SamplingConfig(), max_tokens=256), **settings)
    assert generation_settings(arguments) == expected


def test_a_generation_argument_that_would_be_lost_is_refused():
    with pytest.raises(ConfigError, match="num_beams is not supported"):
        generation_settings({"num_beams": 4})


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({}, "name no checkpoint"),
        ({"checkpoint": "x", "lengths": 3}, "no flag --lengths; the nearest known one is --length"),
    ],
)
def test_model_arguments_that_cannot_be_used(arguments, sentence):
    with pytest.raises(ConfigError, match=sentence):
        HarnessModel.from_arguments(arguments)


def test_one_request_that_cannot_be_answered_costs_no_other(model):
    settings = [generation_settings({"max_gen_toks": 3})] * 3
    prompts = [encode_ids(each, model.engine.cfg) for each in ([70, 71], [70] * 500, [72])]
    first, failed, last = model.generate([lambda prompt=prompt: prompt for prompt in prompts], settings)
    assert (len(first.tokens), len(last.tokens)) == (3, 3)
    assert failed.cause == "too_long"


def test_the_command_hands_its_arguments_on(adapter, monkeypatch):
    from baichuan_omni_jax.cli.main import main

    seen = []

    class CLI:
        def parse_args(self):
            import sys

            return sys.argv

        def execute(self, arguments):
            seen.append(arguments)

    monkeypatch.setattr(adapter, "HarnessCLI", CLI)
    monkeypatch.setattr("sys.argv", ["baichuan-omni"])
    with unchecked():
        assert main(["lm-eval", "--tasks", "mmlu", "--help", "-x=3"]) == 0
    assert seen == [["lm-eval", "--tasks", "mmlu", "--help", "-x=3"]]
