"""Reading a text aloud: one request a sentence, each continuing the text and the speech of those before."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import PRNGKeyArray

from baichuan_omni_jax.config import GenerationSettings, RequestError
from baichuan_omni_jax.omni.answer import Event, Finished, Frames


class Reading:
    """Events of a text that is read aloud: the frames of each sentence, at last one `Finished` for all.

    Raises RequestError here for a text without anything to say and what the engine refuses of the first sentence.
    """

    def __init__(self, engine: Any, processor: Any, text: str, settings: GenerationSettings, key: PRNGKeyArray):
        self._engine, self._processor, self._settings, self._key = engine, processor, settings, key
        self._sentences = [sentence for sentence in processor.sentences(text) if sentence.strip()]
        if not self._sentences:
            raise RequestError("bad_message", "there is nothing to say: the text is empty")
        self._said: list[dict[str, Any]] = []
        self._cancelled = False
        self._request = self._begin(self._sentences[0])

    def cancel(self) -> None:
        self._cancelled = True
        self._request.cancel()

    def __iter__(self) -> Iterator[Event]:
        ended: list[Finished] = []
        for number, sentence in enumerate(self._sentences):
            if number:
                self._request = self._begin(sentence)
            codes: list[np.ndarray] = []
            for event in self._request:
                if isinstance(event, Frames):
                    codes.append(event.codes)
                    yield event
                    if event.last:  # what the model would write after it is not asked for
                        self._request.cancel()
                elif isinstance(event, Finished):
                    ended.append(event)
            if codes:
                self._said.append({"type": "audio", "codes": np.concatenate(codes)})
            if self._cancelled:
                break
        yield _together(ended, "cancelled" if self._cancelled else "end")

    def _begin(self, sentence: str) -> Any:
        self._said.append({"type": "text", "text": sentence})
        return self._engine.submit(self._processor.encode_content(self._said, speak=True), self._settings, self._key)


def _together(ended: list[Finished], reason: str) -> Finished:
    """One `Finished` for requests that came one after the other; what came first is of the first. No text is given."""
    return Finished(
        reason=reason,
        prompt=sum(each.prompt for each in ended),
        tokens=0,
        frames=sum(each.frames for each in ended),
        first_token=None,
        first_frame=ended[0].first_frame if ended else None,
        total=sum(each.total for each in ended),
        sequence=ended[-1].sequence if ended else np.zeros(0, np.int32),
    )
