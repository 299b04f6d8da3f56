"""Stand-ins for the programs that users bring: named by dotted path in the tests of synthesis."""

import numpy as np


class BrightnessCaptioner:
    """Says how bright a picture is; fails on dark ones, has nothing to say about grey ones."""

    def caption(self, image: np.ndarray, prompt: str, language: str) -> str:
        level = int(image.mean())
        if level < 50:
            raise RuntimeError("too dark")
        if level < 100:
            return "  "
        return f"亮度{level}" if language == "zh" else f"Brightness {level}"


class LengthTranscriber:
    """Hears "one two three four", as many words as the recording has tenths of a second."""

    def transcribe(self, samples: np.ndarray, rate: int, language: str) -> str:
        words = ["one", "two", "three", "four"]
        return " ".join(words[: round(len(samples) / rate * 10)])


class Nothing:
    """Has none of the methods that a hook needs."""
