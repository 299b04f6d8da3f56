"""Stand-ins for the programs that users bring, named by dotted path in the tests of synthesis; jobs without a run."""

from argparse import ArgumentParser

import numpy as np

from data_pipelines.datasets.jobs.job import Job
from data_pipelines.synthesis.units import SynthesisTask, add_job_arguments


def job_of(task: SynthesisTask, *arguments: object) -> Job:
    """The job that the command would run."""
    parser = ArgumentParser()
    add_job_arguments(parser)
    task.add_arguments(parser)
    return task.make_job(parser.parse_args(list(map(str, arguments))))


class BrightnessCaptioner:
    """Says how bright a picture is; fails on dark ones, has nothing to say about gray ones."""

    def caption(self, image: np.ndarray, prompt: str, language: str) -> str:
        level = int(image.mean())
        if level < 50:
            raise RuntimeError("too dark")
        if level < 100:
            return "  "
        return f"亮度{level}" if language == "zh" else f"Brightness {level}"


class MarkCaptioner:
    """Writes what a document or a tokenizer could take for marks."""

    def caption(self, image: np.ndarray, prompt: str, language: str) -> str:
        return " A <C_A> and <img_pad_baichuan><trainable_end>. "


class LengthTranscriber:
    """Hears "one two three four", as many words as the recording has tenths of a second."""

    def transcribe(self, samples: np.ndarray, rate: int, language: str) -> str:
        words = ["one", "two", "three", "four"]
        return " ".join(words[: round(len(samples) / rate * 10)])


class Nothing:
    """Has none of the methods that a hook needs."""
