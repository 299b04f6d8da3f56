"""200 requests, a fifth of them bad, eight at a time: the good are answered, the bad refused, memory stays flat."""

import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np
import pytest

from baichuan_omni_jax.checkpoint import abstract_branches
from baichuan_omni_jax.config import GenerationConfig
from baichuan_omni_jax.errors import RequestError
from baichuan_omni_jax.generation.chat import ChatModel, OmniChat
from baichuan_omni_jax.generation.engine import Engine
from baichuan_omni_jax.generation.speech_decoder import SpeechDecoder
from data_pipelines.documents.chat_prompt import ChatPrompts
from data_pipelines.documents.processor import Processor
from tests.helpers.engine_prompts import one_device, small_branches, small_config, tokenizer
from tests.helpers.small_media import tone, write_image

CFG = small_config()
SILENT = replace(GenerationConfig().greedy(), max_tokens=8)
ALOUD = replace(GenerationConfig(speech=True).greedy(), max_tokens=4, segment_tokens=2, segment_frames=3)
GROWTH = 32 << 20  # bytes between the 100th and the last request: the allocator's own, not 8 MB of media a request


@dataclass(frozen=True)
class Case:
    """A question, and the cause it is refused for ("": it is answered). `leaves`: who asks goes after one event."""

    name: str
    content: list
    settings: GenerationConfig = SILENT
    cause: str = ""
    role: str = "user"
    leaves: bool = False


def cases(folder: Path) -> tuple[list[Case], list[Case]]:
    """Good and bad ones."""
    text = {"type": "text", "text": "What? Say no more, please."}
    image = {"type": "image", "path": str(write_image(folder / "a.png", 56, 84))}
    sound = {"type": "audio", "samples": tone(0.5), "rate": 16000}
    heard = {"type": "audio", "codes": np.ones((4, CFG.audio.levels), np.int32)}
    good = [
        Case("text", [text]),
        Case("picture", [image, text]),
        Case("sound", [sound]),
        Case("all", [image, heard, sound, text], ALOUD),
        Case("aloud", [text], ALOUD),
        Case("gone", [text], ALOUD, leaves=True),
    ]
    bad = [
        Case("missing", [{"type": "image", "path": "none.png"}], cause="bad_media"),
        Case("garbage", [{"type": "video", "bytes": b"\x00" * 4096}], cause="bad_media"),
        Case("silence", [{"type": "audio", "samples": np.zeros(16000), "rate": 16000}], cause="bad_media"),
        Case("short", [{"type": "audio", "samples": tone(0.01), "rate": 16000}], cause="bad_media"),
        Case("role", [text], cause="bad_message", role="stranger"),
        Case("voice", [text | {"voice": "alto"}], cause="bad_message"),
        Case("codes", [heard | {"codes": heard["codes"] + 99}], cause="bad_message"),
        Case("long", [{"type": "text", "text": "What? " * 400}], cause="too_long"),
        Case("mute", [text], ALOUD, cause="no_branch"),
    ]
    return good, bad


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def small_chats() -> tuple[OmniChat, OmniChat]:
    """One that speaks, and one of the same engine that cannot."""
    branches, rng = small_branches(one_device(), CFG), np.random.default_rng(2)
    draw = lambda x: 0.05 * rng.standard_normal(x.shape).astype(x.dtype)  # noqa: E731
    sound = {name: jax.tree.map(draw, m) for name, m in abstract_branches(CFG, only=["audio_decoder", "flow"]).items()}
    engine = Engine(branches, CFG, tokenizer(), slots=8, length=192, chunk=64)
    prompts = ChatPrompts(Processor(CFG, tokenizer()))
    speaking = ChatModel(engine, CFG, SpeechDecoder(branches | sound, CFG))
    return OmniChat(speaking, prompts), OmniChat(ChatModel(engine, CFG), prompts)


@pytest.mark.slow
def test_bad_requests_harm_nobody(tmp_path):
    good, bad = cases(tmp_path)
    asked = [good[n % len(good)] for n in range(160)] + [bad[n % len(bad)] for n in range(40)]
    random.Random(0).shuffle(asked)
    chat, mute = small_chats()

    def ask(case: Case):
        reply = None
        try:
            asker = mute if case.cause == "no_branch" else chat
            reply = asker.reply([{"role": case.role, "content": case.content}], settings=case.settings)
            if case.leaves:
                next(reply)
                return None
            answer = reply.answer()
            return answer.finished.sequence.tolist(), answer.codes.tolist(), len(answer.samples)
        except RequestError as error:
            return error

    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(ask, asked[:100]))
        halfway = resident()
        answers += threads.map(ask, asked[100:])
    grown = resident() - halfway
    print(f"memory after 100 requests {halfway / 2**20:.0f} MiB, after 200 {grown / 2**20:+.1f}")
    assert grown < GROWTH

    first = {}
    for case, answer in zip(asked, answers, strict=True):
        if case.cause:
            assert isinstance(answer, RequestError), case.name
            assert (answer.cause, "\n" in str(answer)) == (case.cause, False), case.name
        else:
            assert answer == first.setdefault(case.name, answer), case.name
    assert first["aloud"][2] > 0
    assert first["all"][1] != first["aloud"][1]
    metrics = chat.model.engine.metrics
    assert (metrics.in_use, metrics.waiting) == (0, 0)
