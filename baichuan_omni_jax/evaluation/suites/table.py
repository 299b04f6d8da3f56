"""The table of suites: how each is read, put to the model and scored, and what the report has for it.

To add one: a reader of its layout that yields `Item` (`layouts.py`, or any module), and an entry here. Figures are
those of the report on Baichuan-Omni-1.5 (arXiv:2501.15368), in percent unless a scale is named.
"""

import difflib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from baichuan_omni_jax.errors import ConfigError
from baichuan_omni_jax.evaluation.suites import layouts, speech_layouts
from baichuan_omni_jax.evaluation.suites.items import LETTERS, Item
from data_pipelines.documents.prompt_writing import ASR_PROMPT

Task = Literal["chat", "transcribe", "choose", "speak"]
SEE, HEAR = ("vision",), ("audio_head", "audio_encoder")


@dataclass(frozen=True)
class Published:
    """A figure of the report, on its own scale of 0 to `of`."""

    value: float
    of: int = 100

    @property
    def percent(self) -> float:
        return 100 * self.value / self.of


@dataclass(frozen=True, kw_only=True)
class Suite:
    """One benchmark.

    Attributes:
        title: what a table calls it.
        folder: of its files below `data/`, where no other is named.
        read: yields its items from a folder.
        prompt: the text that goes with an item's media.
        task: "chat": a user's message, answered; "transcribe": recognition of speech, without roles; "choose": the
            likeliest letter after the text; "speak": text read aloud.
        scorer: "letter" of a choice; "judge" of free answers; "errors" of words or characters.
        branches: of the checkpoint, beside `llm`.
        average: whether the score of all is the mean over items or over groups.
        published: the report's figures by group, and of "all"; `spoken` those of answers in speech.
        max_tokens: of an answer.
    """

    title: str
    folder: str
    read: Callable[[Path], Iterator[Item]]
    prompt: Callable[[Item], str]
    task: Task = "chat"
    scorer: Literal["letter", "judge", "errors"] = "letter"
    branches: tuple[str, ...] = ()
    average: Literal["items", "groups"] = "items"
    published: Mapping[str, Published] = field(default_factory=dict)
    spoken: Mapping[str, Published] = field(default_factory=dict)
    max_tokens: int = 64


def choice_prompt(item: Item) -> str:
    """The question with its options, and that a letter is wanted."""
    ask = "请只回答正确选项的字母。" if item.language == "zh" else "Answer with the letter of the right option alone."
    return f"{_with_options(item)}\n{ask}"


def likelihood_prompt(item: Item) -> str:
    """Solved questions, then the question up to where its letter stands. The letter follows as `answer_text` has it."""
    if item.language == "zh":
        head = f"下面是“{item.group}”的单项选择题，每题后面是正确选项的字母。"
    else:
        head = f"Questions on {item.group.replace('_', ' ')}, each followed by the letter of its right option."
    # Solved questions in the same form, so that the letter is what comes next.
    solved = [f"{_with_options(shot)}\n{_mark(item)}{answer_text(shot.references[0])}" for shot in item.shots]
    return "\n\n".join([head, *solved, f"{_with_options(item)}\n{_mark(item)}"])


def answer_text(letter: str) -> str:
    """The letter as it follows the prompt of `likelihood_prompt`: a token of its own, by its space, in Chinese too."""
    return f" {letter}"


def _mark(item: Item) -> str:
    return "答案：" if item.language == "zh" else "Answer:"


def _with_options(item: Item) -> str:
    lines = [item.context, item.question]
    lines += [f"{letter}. {text}" for letter, text in zip(LETTERS, item.options, strict=False)]
    return "\n".join(line for line in lines if line)


def media_alone(item: Item) -> str:
    """No text: the recording is the message."""
    return ""


def message_of(suite: Suite, item: Item) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Makes the content of an item's message, and the same for the file of answers, with hashes in place of media.

    Raises RequestError "bad_media" naming the file.
    """
    # The file of answers has hashes: whose figures differ can see whether the media do.
    content, shown = [], []
    for media in item.media:
        part, digest = media.load()
        content.append(part)
        shown.append({"type": media.kind, "name": media.name, "sha256": digest})
    # Text after the media, as everywhere; recognition has its prompt before the recording.
    if text := suite.prompt(item):
        at = 0 if suite.task == "transcribe" else len(content)
        content.insert(at, {"type": "text", "text": text})
        shown.insert(at, {"type": "text", "text": text})
    return content, shown


def _omni(setting: layouts.Setting, title: str, figure: float) -> Suite:
    branches = (*(SEE if "image" in setting else ()), *(HEAR if "audio" in setting else ()))
    return Suite(
        title=f"OmniBench, {title}",
        folder="OmniBench",
        read=partial(layouts.read_omni_bench, setting=setting),
        prompt=choice_prompt,
        branches=branches,
        published={"all": Published(figure)},
    )


def _exam(title: str, folder: str, figure: float, split: str = "test", language: Literal["en", "zh"] = "en") -> Suite:
    return Suite(
        title=title,
        folder=folder,
        read=partial(layouts.read_exam, split=split, language=language),
        prompt=likelihood_prompt,
        task="choose",
        # Hendrycks' own code counts questions; the Chinese ones give subjects equal weight.
        average="items" if language == "en" else "groups",
        published={"all": Published(figure)},
    )


def _recordings(title: str, folder: str, language: Literal["en", "zh"]) -> Suite:
    return Suite(
        title=title,
        folder=folder,
        read=partial(speech_layouts.read_recordings, language=language),
        prompt=lambda item: ASR_PROMPT,
        task="transcribe",
        scorer="errors",
        branches=HEAR,
        max_tokens=512,
    )


def _spoken(title: str, folder: str, language: Literal["en", "zh"]) -> Suite:
    return Suite(
        title=title,
        folder=folder,
        read=partial(speech_layouts.read_texts_to_speak, language=language),
        prompt=lambda item: item.question,
        task="speak",
        scorer="errors",
        branches=("audio_head", "audio_encoder", "audio_decoder", "flow"),
    )


SUITES: dict[str, Suite] = {
    "openaudiobench": Suite(
        title="OpenAudioBench",
        folder="OpenAudioBench",
        read=layouts.read_open_audio_bench,
        prompt=media_alone,
        scorer="judge",
        branches=HEAR,
        average="groups",
        published={
            "alpaca_eval": Published(7.79, 10),
            "llama_questions": Published(78.5),
            "reasoning_qa": Published(50.0),
            "trivia_qa": Published(5.72, 10),
            "web_questions": Published(5.91, 10),
        },
        spoken={
            "alpaca_eval": Published(6.94, 10),
            "llama_questions": Published(75.3),
            "reasoning_qa": Published(40.9),
            "trivia_qa": Published(5.31, 10),
            "web_questions": Published(5.52, 10),
        },
        max_tokens=1024,
    ),
    "openmm-medical": Suite(
        title="OpenMM-Medical",
        folder="OpenMM-Medical",
        read=layouts.read_image_choice,
        prompt=choice_prompt,
        branches=SEE,
        published={"all": Published(83.8)},
    ),
    "gmai-mmbench": Suite(
        title="GMAI-MMBench VAL",
        folder="GMAI-MMBench",
        read=layouts.read_image_choice,
        prompt=choice_prompt,
        branches=SEE,
        published={"all": Published(49.9)},
    ),
    "omnibench": _omni("image-audio", "image and audio", 42.9),
    "omnibench-caption-audio": _omni("caption-audio", "caption and audio", 37.7),
    "omnibench-image-transcript": _omni("image-transcript", "image and transcript", 47.9),
    "omnibench-caption-transcript": _omni("caption-transcript", "caption and transcript", 46.9),
    "video-mme": Suite(
        title="Video-MME, without subtitles",
        folder="Video-MME",
        read=layouts.read_video_choice,
        prompt=choice_prompt,
        branches=SEE,
        published={"all": Published(60.1)},
    ),
    "mmlu": _exam("MMLU", "MMLU", 72.2),
    "cmmlu": _exam("CMMLU", "CMMLU", 75.5, language="zh"),
    "ceval": _exam("C-Eval", "C-Eval", 73.1, split="val", language="zh"),
    "agieval": Suite(
        title="AGIEval",
        folder="AGIEval",
        read=layouts.read_agieval,
        prompt=likelihood_prompt,
        task="choose",
        average="groups",
        published={"all": Published(54.4)},
    ),
    "asr-en": _recordings("speech recognition, English words", "LibriSpeech", "en"),
    "asr-zh": _recordings("speech recognition, Chinese characters", "AISHELL", "zh"),
    "tts-en": _spoken("text to speech, English", "Seed-TTS-eval", "en"),
    "tts-zh": _spoken("text to speech, Chinese", "Seed-TTS-eval", "zh"),
}


def find_suite(name: str) -> Suite:
    """Returns the suite called `name`. Raises ConfigError, with the nearest name there is."""
    if name not in SUITES:
        near = difflib.get_close_matches(name, SUITES, n=1)
        known = f"the nearest known one is {near[0]}" if near else f"there are {', '.join(SUITES)}"
        raise ConfigError(f"there is no suite {name!r}; {known}")
    return SUITES[name]
