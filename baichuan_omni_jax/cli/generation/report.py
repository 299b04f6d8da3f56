"""An answer at the terminal: its text, its numbers, and both as fields of a JSON record."""

import signal
from typing import Any

from baichuan_omni_jax.generation.chat import ChatAnswer, ChatModel, ChatStream
from baichuan_omni_jax.generation.events import TextDelta


def show(reply: ChatStream) -> ChatAnswer:
    """Prints the text as it is made, or at the end the tokens where there is no tokenizer; Ctrl-C ends the answer."""
    # Raised inside the engine, KeyboardInterrupt would cost it all that it is doing.
    before = signal.signal(signal.SIGINT, lambda *_: reply.cancel())
    try:
        for event in reply:
            if isinstance(event, TextDelta):
                print(event.text, end="", flush=True)
    finally:
        signal.signal(signal.SIGINT, before)
    answer = reply.answer()
    print("" if answer.text else " ".join(map(str, answer.tokens)), flush=True)
    return answer


def describe(answer: ChatAnswer, model: ChatModel) -> str:
    """Lines of text: what was made and why it ended, how fast, and what the engine holds."""
    finished, metrics = answer.finished, model.engine.metrics
    made = f"{finished.tokens} tokens" + (f" and {finished.frames} code frames" if finished.frames else "")
    speed = [f"{answer.tokens_per_second:.1f} tokens/s"]
    if finished.first_token is not None:
        speed.insert(0, f"first token {finished.first_token:.2f} s")
    if answer.first_audio is not None:
        speed.append(f"first audio {answer.first_audio:.2f} s")
        speed.append(f"real-time factor {answer.real_time_factor:.2f} ({answer.audio_seconds:.1f} s of speech)")
    cache = f"cache {metrics.cache_bytes / 2**20:.1f} MiB, {metrics.compiles} programs compiled"
    return f"{finished.prompt} tokens read, {made} made: {finished.finish_reason}\n{', '.join(speed)}\n{cache}"


def as_record(answer: ChatAnswer) -> dict[str, Any]:
    """The answer as JSON fields; sound itself is left out. Times are seconds from the request."""
    finished = answer.finished
    fields = {
        "text": answer.text,
        "finish": finished.finish_reason,
        "tokens": list(answer.tokens),
        "logprobs": [round(value, 5) for value in answer.logprobs],
        "prompt_tokens": finished.prompt,
        "first_token": finished.first_token,
        "seconds": answer.seconds,
    }
    if answer.speech:
        fields |= {
            "codes": [stretch.tolist() for stretch in answer.speech],
            "first_audio": answer.first_audio,
            "audio_seconds": answer.audio_seconds,
            "rate": answer.rate,
        }
    return fields
