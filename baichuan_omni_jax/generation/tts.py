"""Speaking what is given: one request a sentence, each continuing the text and the speech of those before."""

from collections.abc import Generator, Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int32, PRNGKeyArray

from baichuan_omni_jax.config import GenerationConfig
from baichuan_omni_jax.errors import RequestError
from baichuan_omni_jax.generation.events import AudioCodes, Event, Finished, Prompt

Prompts = Generator[Prompt, Int32[np.ndarray, "n q"], None]
"""Prompts that end with the mark that begins speech; each is sent the code frames of the one before."""


def sentence_prompts(processor: Any, sentences: Sequence[str]) -> Prompts:
    """Encodes the sentences one by one, each after those before and their speech.

    Raises RequestError when there is nothing to say.
    """
    spoken = [sentence for sentence in sentences if sentence.strip()]
    if not spoken:
        raise RequestError("bad_message", "there is nothing to say: the text is empty")
    spoken_so_far: list[dict[str, Any]] = []
    for sentence in spoken:
        spoken_so_far.append({"type": "text", "text": sentence})
        codes = yield processor.encode_content(spoken_so_far, speak=True)
        if len(codes):
            spoken_so_far.append({"type": "audio", "codes": codes})


def one_prompt(prompt: Prompt) -> Prompts:
    """A single prompt that is encoded already."""
    yield prompt


class TtsRequest:
    """The frames of each prompt's speech as events, at last one `Finished` for all; text that follows is left out.

    Raises RequestError here for what the engine refuses of the first prompt, and when iterated for the others.
    """

    def __init__(self, engine: Any, prompts: Prompts, settings: GenerationConfig, key: PRNGKeyArray):
        self._engine, self._prompts, self._settings, self._key = engine, prompts, settings, key
        self._cancelled = False
        self._request = self._submit(next(prompts))

    def cancel(self) -> None:
        self._cancelled = True
        self._request.cancel()

    def __iter__(self) -> Iterator[Event]:
        ended: list[Finished] = []
        while not self._cancelled:
            codes = []
            for event in self._request:
                if isinstance(event, AudioCodes):
                    codes.append(event.codes)
                    yield event
                    # Text after the speech is not wanted: the sentence is over.
                    if event.last:
                        self._request.cancel()
                elif isinstance(event, Finished):
                    ended.append(event)
            try:
                # A sentence's prompt holds the speech before it: no sentence can be read ahead of the one before.
                spoken_so_far = np.concatenate(codes) if codes else np.zeros((0, 0), np.int32)
                self._request = self._submit(self._prompts.send(spoken_so_far))
            except StopIteration:
                break
        cut = any(each.finish_reason == "length" for each in ended)
        yield _together(ended, "cancelled" if self._cancelled else "length" if cut else "end")

    def _submit(self, prompt: Prompt) -> Any:
        return self._engine.submit(prompt, self._settings, self._key)


def _together(ended: Sequence[Finished], reason: str) -> Finished:
    """One `Finished` for requests that came one after the other; no text is given."""
    return Finished(
        finish_reason=reason,
        prompt=sum(each.prompt for each in ended),
        tokens=0,
        frames=sum(each.frames for each in ended),
        first_token=None,
        first_frame=ended[0].first_frame if ended else None,
        total=sum(each.total for each in ended),
        sequence=ended[-1].sequence if ended else np.zeros(0, np.int32),
    )
