"""Log-likelihoods of answers to choose from: prompts shared and rows packed, beside one sequence at a time.

    JAX_PLATFORMS=cpu python benchmarks/log_likelihoods.py [--questions 40] [--repeats 3] [--json]

The small model with random weights. Questions have the form of few-shot choice suites: a prompt of 200 to 700 tokens
and four continuations, of one letter (as MMLU is scored) or of 5 to 30 tokens (as answers in words are). The peer is
the same engine that is given one prompt with one continuation a call, as a harness without batches does.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace

import jax
import numpy as np
from many_requests import make_prompt
from rows import emit, row

from baichuan_omni_jax.config import MeshConfig, OmniConfig, small
from baichuan_omni_jax.generation.engine import Engine
from baichuan_omni_jax.generation.loglikelihood import ScoringRequest
from baichuan_omni_jax.nn.param import ComputePolicy
from baichuan_omni_jax.omni.model import OmniModel
from baichuan_omni_jax.sharding import make_mesh

LENGTH, CHOICES, GOAL = 1024, 4, 2.0


def make_engine(cfg: OmniConfig) -> Engine:
    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
        model = jax.jit(lambda key: OmniModel(key, cfg, ComputePolicy(remat="none", attention_block=64)))(
            jax.random.key(0)
        )
    branches = {"llm": model.llm, "vision": model.vision, "audio_head": model.audio_head}
    return Engine(branches, cfg, None, slots=2, length=LENGTH)


def make_questions(count: int, least: int, most: int, cfg: OmniConfig) -> list[ScoringRequest]:
    """`count` prompts with four continuations of `least` to `most` tokens each."""
    rng = np.random.default_rng(0)
    questions = []
    for _ in range(count):
        prompt: SimpleNamespace = make_prompt(rng, cfg, int(rng.integers(200, 700)), 0, 0)
        lengths = rng.integers(least, most + 1, CHOICES)
        questions.append(ScoringRequest(prompt, [rng.integers(60, cfg.llm.vocab_size, n).tolist() for n in lengths]))
    return questions


def one_by_one(engine: Engine, questions: list[ScoringRequest]) -> list[list[float]]:
    """A call for each continuation."""
    return [
        [
            engine.log_likelihoods([ScoringRequest(asked.prompt, [each])])[0][0].log_likelihood
            for each in asked.continuations
        ]
        for asked in questions
    ]


def together(engine: Engine, questions: list[ScoringRequest]) -> list[list[float]]:
    """One call for all."""
    return [[score.log_likelihood for score in scores] for scores in engine.log_likelihoods(questions)]


def seconds(run: Callable, *given) -> float:
    begin = time.perf_counter()
    run(*given)
    return time.perf_counter() - begin


def measure(count: int, repeats: int) -> list[dict]:
    cfg = small()
    engine, rows = make_engine(cfg), []
    for name, least, most in (("letters", 1, 1), ("answers in words", 5, 30)):
        questions = make_questions(count, least, most, cfg)
        # Once to compile, which also shows that both give the same numbers.
        wide = np.abs(np.array(together(engine, questions)) - np.array(one_by_one(engine, questions))).max()
        # In turns, so that what else the machine does meets both.
        times = [(seconds(together, engine, questions), seconds(one_by_one, engine, questions)) for _ in range(repeats)]
        ours, peer = (count * CHOICES / statistics.median(column) for column in zip(*times, strict=True))
        rows.append(
            row(name, ours, "continuations/s", peer="one at a time", peer_value=peer, ratio=ours / peer,
                goal=f"ratio >= {GOAL:g}", ok=ours / peer >= GOAL,
                note=f"{count} questions of {CHOICES}; largest difference {wide:.1e} nats")
        )  # fmt: skip
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    return emit(measure(options.questions, options.repeats), options.json)


if __name__ == "__main__":
    sys.exit(main())
