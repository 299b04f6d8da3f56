"""The model `baichuan-omni` of lm-eval (EleutherAI's harness), and the command that runs it.

    baichuan-omni lm-eval run --model baichuan-omni --model_args checkpoint=DIR,length=4096 --tasks mmlu

lm-eval finds models by their decorators alone, so the module of a model must be imported first: this command does, and
hands its arguments on. Needs the extra `lm-eval`.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from typing import Any

from baichuan_omni_jax.errors import ConfigError, RequestError

try:
    from lm_eval._cli import HarnessCLI
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.utils import setup_logging
    from tqdm import tqdm
except ModuleNotFoundError as error:
    missing = (error.name or "lm_eval").partition(".")[0]
    raise ConfigError(f"{missing} is not installed: pip install 'baichuan_omni_jax[lm-eval]'") from error

from baichuan_omni_jax.generation.events import Prompt
from baichuan_omni_jax.generation.loglikelihood import rolling_windows
from baichuan_omni_jax.integrations.harness_model import HarnessModel, generation_settings
from data_pipelines.documents.document import encode_ids
from data_pipelines.documents.prompt_writing import ROLES, Source, join, role_mark
from data_pipelines.documents.prompts import escape, read_text
from data_pipelines.tokenizers.tokenizer import encode, plain_tokenizer, tokenizer_fingerprint

log = logging.getLogger(__name__)


@register_model("baichuan-omni")
class BaichuanOmniLM(TemplateLM):
    """Scores and continues text with a checkpoint, in process, many requests at a time.

    Model arguments are those of `HarnessModel.from_arguments`. Text is taken literally: the name of a special token in
    it is text. With `--apply_chat_template` it stands in the turns of a conversation.
    """

    def __init__(
        self,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        **arguments: Any,
    ):
        super().__init__()
        # Its own names of what we have: how many at a time, and on what. JAX has chosen the devices already.
        if batch_size is not None and str(batch_size).isdigit() and int(batch_size) > 1:
            arguments.setdefault("slots", int(batch_size))
        if device is not None:
            log.warning("device %s is not used: --data and --tensor of the model arguments share JAX's devices", device)
        self._open(HarnessModel.from_arguments(arguments))

    def _open(self, model: HarnessModel) -> None:
        self._model, engine = model, model.engine
        assert engine.tokenizer is not None  # `from_arguments` lets none through
        self._tokenizer, self._plain = engine.tokenizer, plain_tokenizer(engine.tokenizer)
        self.max_length = engine.length
        # Whether requests are conversations as `apply_chat_template` writes them.
        self._templated = False

    @classmethod
    def from_model(cls, model: HarnessModel) -> "BaichuanOmniLM":
        """Makes it of a model that is open, for `lm_eval.simple_evaluate(model=...)`."""
        made = cls.__new__(cls)
        TemplateLM.__init__(made)
        made._open(model)
        return made

    @property
    def eot_token_id(self) -> int:
        return self._model.engine.cfg.tokens.end_of_text

    @property
    def tokenizer_name(self) -> str:
        """Differs between tokenizers that differ: lm-eval keeps encoded requests by it."""
        return f"baichuan-omni-{tokenizer_fingerprint(self._tokenizer)}"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Encodes text, or a conversation that `apply_chat_template` wrote; nothing is added."""
        if not self._templated:
            return encode(self._plain, string)
        # Marks of roles are their tokens; what people wrote was escaped, and is text.
        parts = ((self._plain if part.plain else self._tokenizer, part.text) for part in read_text(string))
        return [token for tokenizer, text in parts for token in encode(tokenizer, text)]

    def tok_decode(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(list(tokens), skip_special_tokens=False)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Says what conversations look like, for lm-eval's log."""
        if not chat_template:
            return None
        return "".join(f"{role_mark(role, spoken=False)}{{{role}}}" for role in ROLES)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Writes a conversation in the released form, as chat and training do; the answer follows its last mark."""
        # From here on every request is one of these.
        self._templated = True
        parts: list[str] = []
        for message in chat_history:
            if message["role"] not in ROLES:
                raise ConfigError(f"a task has a message of role {message['role']!r}; there are {', '.join(ROLES)}")
            parts += [Source(role_mark(message["role"], spoken=False)), message["content"]]
        if add_generation_prompt:
            parts.append(Source(role_mark("assistant", spoken=False)))
        return str(join(parts))

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        return super()._encode_pair(context, escape(continuation) if self._templated else continuation)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str] | None, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        # The options of a question have one context, of which the left is cut off where it is too long.
        prompts: dict[tuple[int, ...], Prompt] = {}
        pairs = []
        for _, context, continuation in requests:
            if len(continuation) > self.max_length:
                raise ConfigError(f"a continuation has {len(continuation)} tokens, length is {self.max_length}")
            kept = tuple(context[-(self.max_length + 1 - len(continuation)) :])
            if kept not in prompts:
                prompts[kept] = encode_ids(list(kept), self._model.engine.cfg)
            pairs.append((prompts[kept], continuation))
        scores = [(score.log_likelihood, score.is_greedy) for score in self._model.log_likelihoods(pairs)]
        for (arguments, _, _), score in zip(requests, scores, strict=True):
            # lm-eval keeps what has a name; windows of a long text have none.
            if arguments is not None:
                self.cache_hook.add_partial("loglikelihood", arguments, score)
        return scores

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list[float]:
        """Scores whole texts, those longer than a row in windows (`rolling_windows`); all windows together."""
        windows: list[Any] = []
        counts = []
        for request in requests:
            tokens = self.tok_encode(request.args[0])
            cut = rolling_windows(tokens, self.max_length, self.prefix_token_id)
            windows += [(None, context, continuation) for context, continuation in cut]
            counts.append(len(cut))
        scores = iter(self._loglikelihood_tokens(windows))
        sums = [sum((next(scores)[0] for _ in range(count)), 0.0) for count in counts]
        for request, score in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, score)
        return sums

    def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
        """Continues contexts, of which the left is cut off where there is no room for the answer."""
        arguments = [request.args for request in requests]
        settings = [generation_settings(options) for _, options in arguments]
        config = self._model.engine.cfg

        def encode_context(context: str, room: int) -> Prompt:
            # A task that asks for more than there is keeps half of the room for its context.
            left = self.max_length - min(room, self.max_length // 2)
            return encode_ids((self.tok_encode(context) or [self.prefix_token_id])[-left:], config)

        prompts = [
            lambda context=context, room=each.max_tokens: encode_context(context, room)
            for (context, _), each in zip(arguments, settings, strict=True)
        ]
        answers = []
        found = self._model.generate(prompts, settings)
        for request, answer in zip(arguments, tqdm(found, total=len(requests), disable=disable_tqdm), strict=True):
            # A context of text that is cut to fit can always be answered: what fails is no task's affair.
            if isinstance(answer, RequestError):
                raise answer
            answers.append(answer.text)
            self.cache_hook.add_partial("generate_until", request, answer.text)
        return answers


def run(options: argparse.Namespace) -> None:
    """Runs lm-eval's own command line in this process. Raises ConfigError for what its model cannot use."""
    setup_logging()
    # lm-eval reads the arguments of the process, not those it is given.
    sys.argv = ["lm-eval", *options.arguments]
    parser = HarnessCLI()
    parser.execute(parser.parse_args())
