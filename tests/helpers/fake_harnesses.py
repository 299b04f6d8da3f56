"""Doubles of what our adapters take from lm-eval and lmms-eval, where these are not installed."""

import contextlib
import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest


@dataclass
class Request:
    """A harness's request: what its task says, as positional arguments."""

    args: tuple


class CacheHook:
    """Keeps what is reported to a harness's cache of answers."""

    def __init__(self):
        self.kept: list[tuple] = []

    def add_partial(self, *entry: Any) -> None:
        self.kept.append(entry)


class TemplateLM:
    """lm-eval's base class: encodes contexts with continuations, and leaves the scoring to the model."""

    def __init__(self):
        self.cache_hook = CacheHook()

    @property
    def prefix_token_id(self) -> int:
        return self.eot_token_id

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        bare = context.rstrip()
        whole, first = self.tok_encode(context + continuation), self.tok_encode(bare)
        return whole[: len(first)], whole[len(first) :]

    def loglikelihood(self, requests: list[Request]) -> list[tuple[float, bool]]:
        asked = []
        for request in requests:
            context, continuation = request.args
            ids = (
                self._encode_pair(*request.args) if context else ([self.prefix_token_id], self.tok_encode(continuation))
            )
            asked.append((request.args, *ids))
        return self._loglikelihood_tokens(asked)


class LMM:
    """lmms-eval's base class."""

    def __init__(self):
        self.rank, self.task_dict, self.cache_hook = 0, {}, CacheHook()


@dataclass
class TokenCounts:
    input_tokens: int | None = None
    output_tokens: int | None = None


@dataclass
class GenerationResult:
    text: str
    token_counts: TokenCounts = field(default_factory=TokenCounts)


def _modules() -> dict[str, dict[str, Any]]:
    same = lambda name: lambda made: made  # noqa: E731
    return {
        "lm_eval": {},
        "lm_eval._cli": {"HarnessCLI": SimpleNamespace},
        "lm_eval.api": {},
        "lm_eval.api.model": {"TemplateLM": TemplateLM},
        "lm_eval.api.registry": {"register_model": same},
        "lm_eval.utils": {"setup_logging": lambda: None},
        "lmms_eval": {},
        "lmms_eval.api": {},
        "lmms_eval.api.instance": {"GenerationResult": GenerationResult, "TokenCounts": TokenCounts},
        "lmms_eval.api.model": {"lmms": LMM},
        "lmms_eval.models": {},
        "lmms_eval.models.registry_v2": {"ModelManifest": SimpleNamespace},
        "tqdm": {"tqdm": lambda items, **options: items},
    }


@contextlib.contextmanager
def harnesses() -> Iterator[None]:
    """Puts doubles in the place of harnesses that are not installed; the adapters are imported anew inside."""
    with pytest.MonkeyPatch.context() as patch:
        absent = {name for name in ("lm_eval", "lmms_eval", "tqdm") if importlib.util.find_spec(name) is None}
        for name, contents in _modules().items():
            if name.split(".")[0] in absent:
                module = ModuleType(name)
                vars(module).update(contents)
                patch.setitem(sys.modules, name, module)
        adapters = [f"baichuan_omni_jax.integrations.{name}" for name in ("lm_eval", "lmms_eval")]
        for name in adapters:
            patch.delitem(sys.modules, name, raising=False)
        yield
        for name in adapters:
            sys.modules.pop(name, None)
