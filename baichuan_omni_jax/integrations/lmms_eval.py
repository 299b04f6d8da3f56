"""The model `baichuan_omni_jax` of lmms-eval, which finds it by its entry point: text, images, audio and video.

    python -m lmms_eval --model baichuan_omni_jax --model_args checkpoint=DIR,length=8192 --tasks TASK

Needs lmms-eval, whose bound of PyAV must fit ours (docs/how-to/harnesses.md).
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from lmms_eval.api.instance import GenerationResult, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from tqdm import tqdm

from baichuan_omni_jax.errors import ConfigError, RequestError
from baichuan_omni_jax.generation.events import GenerationResult as Answer
from baichuan_omni_jax.generation.events import Prompt
from baichuan_omni_jax.integrations.harness_model import HarnessModel, generation_settings
from baichuan_omni_jax.integrations.media_messages import chat_messages

log = logging.getLogger(__name__)

MANIFEST = ModelManifest(
    model_id="baichuan_omni_jax", chat_class_path="baichuan_omni_jax.integrations.lmms_eval.BaichuanOmniLMM"
)
# Of an answer, where a task says nothing: what lmms-eval's own models take.
MAX_TOKENS = 1024


class BaichuanOmniLMM(lmms):
    """Answers a task's messages with a checkpoint, in process, many at a time; media stand where the task puts them.

    Model arguments are those of `HarnessModel.from_arguments`. A request that cannot be answered (a file that is not
    there) has the answer "", and the log says why; the others go on.
    """

    is_simple = False

    def __init__(self, batch_size: int | str = 1, max_batch_size: Any = None, device: Any = None, **arguments: Any):
        super().__init__()
        if str(batch_size).isdigit() and int(batch_size) > 1:
            arguments.setdefault("slots", int(batch_size))
        self._model = HarnessModel.from_arguments(arguments)

    @classmethod
    def from_model(cls, model: HarnessModel) -> "BaichuanOmniLMM":
        """Makes it of a model that is open."""
        made = cls.__new__(cls)
        lmms.__init__(made)
        made._model = model
        return made

    def generate_until(self, requests: list) -> list[GenerationResult]:
        """Answers requests (context, messages of a document, generation arguments, document, task, split)."""
        rounds = [(lambda r=r: r.args[1](self._document(r)), dict(r.args[2])) for r in requests]
        answers = self._answer(rounds)
        return list(tqdm(answers, total=len(requests), desc="Model Responding", disable=self.rank != 0))

    def generate_until_multi_round(self, requests: list) -> list[list[str]]:
        """Answers tasks of several rounds, each of which makes its messages of the answers before; a round together."""
        answers: list[list[str]] = [[] for _ in requests]
        # What a task gives of a round, for its next one.
        states: list[Any] = [None for _ in requests]
        left = list(range(len(requests)))
        while left:
            asked: list[tuple[int, Sequence[Any]]] = []
            for n in left:
                request = requests[n]
                messages, over, output, states[n] = request.args[1](
                    self._document(request),
                    round_idx=len(answers[n]),
                    previous_output=answers[n],
                    previous_round_info=states[n],
                )
                if over:
                    answers[n] = list(output)
                else:
                    asked.append((n, messages))
            rounds = [(lambda messages=messages: messages, dict(requests[n].args[2])) for n, messages in asked]
            for (n, _), answer in zip(asked, self._answer(rounds), strict=True):
                answers[n].append(answer.text)
            left = [n for n, _ in asked]
        return answers

    def loglikelihood(self, requests: list) -> list[tuple[float, bool]]:
        """Raises ConfigError: lmms-eval asks models of messages for answers alone."""
        raise ConfigError("lmms-eval asks for log-likelihoods without messages: lm-eval's model has them")

    def _document(self, request: Any) -> Any:
        *_, number, task, split = request.args
        return self.task_dict[task][split][number]

    def _answer(
        self, rounds: Sequence[tuple[Callable[[], Sequence[Any]], dict[str, Any]]]
    ) -> Iterator[GenerationResult]:
        """Answers messages, which are made and encoded when their turn is near."""
        chat, settings = self._model.chat, [generation_settings(options, MAX_TOKENS) for _, options in rounds]
        assert chat.processor is not None  # `from_arguments` lets none through
        encode_messages = chat.processor.encode_messages

        def encode(messages: Callable[[], Sequence[Any]]) -> Prompt:
            return encode_messages(chat_messages(messages()))

        prompts = [lambda messages=messages: encode(messages) for messages, _ in rounds]
        for number, answer in enumerate(self._model.generate(prompts, settings)):
            if isinstance(answer, RequestError):
                log.error("request %d has no answer: %s", number, answer)
                yield GenerationResult(text="", token_counts=TokenCounts())
            else:
                yield GenerationResult(text=answer.text, token_counts=_count(answer))


def _count(answer: Answer) -> TokenCounts:
    return TokenCounts(input_tokens=answer.finished.prompt, output_tokens=answer.finished.tokens)
