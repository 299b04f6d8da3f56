"""A checkpoint as evaluation harnesses ask it, whatever their own classes look like: many requests at a time."""

import logging
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

from baichuan_omni_jax.branches import CONVERTED_BRANCHES
from baichuan_omni_jax.cli.chat import add_model_arguments, open_chat
from baichuan_omni_jax.cli.common import CommandParser
from baichuan_omni_jax.config import GenerationConfig, SamplingConfig
from baichuan_omni_jax.errors import ConfigError, RequestError
from baichuan_omni_jax.generation.chat import OmniChat
from baichuan_omni_jax.generation.engine import Engine
from baichuan_omni_jax.generation.events import GenerationResult, Prompt
from baichuan_omni_jax.generation.loglikelihood import ContinuationScore, ScoringRequest
from baichuan_omni_jax.generation.requests import Request

log = logging.getLogger(__name__)

MAX_TOKENS = 256  # of an answer, where a task says nothing
# Harnesses' names of one thing, the first that is given counts.
_MAX_TOKENS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_SAMPLING = ("temperature", "top_k", "top_p", "repetition_penalty")
_GENERATION = frozenset((*_MAX_TOKENS, *_SAMPLING, "until", "do_sample"))


class HarnessModel:
    """Answers and scores encoded prompts with the engine of `chat`, as many at a time as it has slots."""

    def __init__(self, chat: OmniChat, engine: Engine):
        self.chat, self.engine = chat, engine

    @classmethod
    def from_arguments(cls, arguments: Mapping[str, Any]) -> "HarnessModel":
        """Opens the checkpoint that a harness's model arguments name.

        Args:
            arguments: `checkpoint` and any other flag that `baichuan-omni generate` has of the model, by its name
                without dashes: `length`, `slots`, `dtype`, `cache_dtype`, ... . Branches that lie elsewhere go by
                their names, as a harness cuts `checkpoint=llm=A,audio_head=B` at the comma.

        Raises:
            ConfigError: names what is unknown or cannot be used.
        """
        given = {name: value for name, value in arguments.items() if value is not None}
        checkpoint = [str(given.pop("checkpoint", ""))]
        checkpoint += [f"{name}={given.pop(name)}" for name in CONVERTED_BRANCHES if name in given]
        if not checkpoint[0]:
            raise ConfigError("the model arguments name no checkpoint: checkpoint=DIR")
        parser = CommandParser(prog="model arguments")
        add_model_arguments(parser)
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
        options = parser.parse_args([f"--checkpoint={','.join(checkpoint)}", *flags])
        opened = open_chat(options, GenerationConfig(), speaks=False)
        if opened.chat.processor is None:
            raise ConfigError(f"checkpoint {checkpoint[0]} brings no text tokenizer: name one by tokenizer=FILE")
        # A harness prints a table at the end: what makes its numbers meaningless is said before.
        if opened.notice:
            log.warning("%s", opened.notice)
        return cls(opened.chat, opened.engine)

    def log_likelihoods(self, pairs: Sequence[tuple[Prompt, Sequence[int]]]) -> list[ContinuationScore]:
        """Scores (prompt, continuation) pairs; those that follow with the same prompt, the same object, share it."""
        # Harnesses ask about each option apart: the options of a question are brought together again.
        groups: dict[int, list[int]] = defaultdict(list)
        for number, (prompt, _) in enumerate(pairs):
            groups[id(prompt)].append(number)
        requests = [ScoringRequest(pairs[group[0]][0], [pairs[n][1] for n in group]) for group in groups.values()]
        scores: dict[int, ContinuationScore] = {}
        for group, found in zip(groups.values(), self.engine.log_likelihoods(requests), strict=True):
            scores |= zip(group, found, strict=True)
        return [scores[number] for number in range(len(pairs))]

    def generate(
        self, prompts: Sequence[Callable[[], Prompt]], settings: Sequence[GenerationConfig]
    ) -> Iterator[GenerationResult | RequestError]:
        """Answers prompts in order; one that cannot be answered gives its error, and the others go on.

        Args:
            prompts: what encodes each, called when its turn is near: media are large.
            settings: of each answer.

        Yields:
            The answers.
        """
        asked: deque[Request | RequestError] = deque()
        left = deque(enumerate(zip(prompts, settings, strict=True)))
        # Twice as many as there are slots: while some are decoded, the next are prepared.
        at_once = 2 * self.engine.metrics.slots
        while left or asked:
            while left and len(asked) < at_once:
                number, (prompt, each) = left.popleft()
                try:
                    asked.append(self.engine.submit(prompt(), each, jax.random.fold_in(self.chat.key, number)))
                except RequestError as error:
                    asked.append(error)
            request = asked.popleft()
            try:
                yield request if isinstance(request, RequestError) else GenerationResult.from_events(request)
            except RequestError as error:
                yield error


def generation_settings(arguments: Mapping[str, Any], max_tokens: int = MAX_TOKENS) -> GenerationConfig:
    """Reads a task's generation arguments: greedy unless it asks for sampling.

    >>> generation_settings({"until": "\\n", "max_gen_toks": 8, "do_sample": False, "temperature": 0.7}).max_tokens
    8

    Args:
        arguments: `until` (a string or several), the most tokens by any of their names, `do_sample`, `temperature`,
            `top_k`, `top_p`, `repetition_penalty`.
        max_tokens: where the task says nothing.

    Returns:
        The settings of an answer of text.

    Raises:
        ConfigError: an argument that changes what is generated and is not supported, or a value that cannot be.
    """
    given = {name: value for name, value in arguments.items() if value is not None}
    # What is 1 or nothing says that there is one answer, as there always is.
    neutral = {name for name in ("num_beams", "n", "num_return_sequences") if given.get(name) == 1}
    if unknown := sorted(given.keys() - _GENERATION - neutral):
        raise ConfigError(
            f"generation argument {unknown[0]} is not supported; there are {', '.join(sorted(_GENERATION))}"
        )
    until = given.get("until", ())
    stop = tuple(text for text in ((until,) if isinstance(until, str) else until) if text)
    count = next((int(given[name]) for name in _MAX_TOKENS if name in given), max_tokens)
    # As Hugging Face has it: without sampling no temperature counts, and at 0 nothing is sampled.
    sampled = given.get("do_sample", given.get("temperature", 0) > 0) and given.get("temperature", 1.0) > 0
    sampling = {name: given[name] for name in _SAMPLING if name in given} if sampled else {}
    if not sampled and "repetition_penalty" in given:
        sampling["repetition_penalty"] = given["repetition_penalty"]
    if sampled:
        sampling.setdefault("temperature", 1.0)
        sampling["top_k"] = max(int(sampling.get("top_k", 0)), 0)  # -1 means all, too
    return GenerationConfig(max_tokens=count, stop=stop, text=SamplingConfig(**sampling))
