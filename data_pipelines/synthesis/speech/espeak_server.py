"""eSpeak NG in a process of its own: reads requests from stdin, writes speech to stdout. Imports nothing of ours.

    {"text": "Hello.", "voice": "en-us+m3", "rate": 175, "pitch": 50}\\n       a request
    {"bytes": 26460}\\n and as many bytes: mono int16 at 22050 Hz               its answer, or {"error": "..."}\\n

The library keeps a state from one utterance to the next (its flutter runs on), leaks memory when a text changes the
language, and might crash on some text. So this process only loads it, and each utterance is spoken by a fork that
ends: the same request gives the same samples whatever came before.
"""

import ctypes
import json
import os
import signal
import sys

import espeakng_loader

# Constants of espeak-ng's speak_lib.h.
AUDIO_OUTPUT_SYNCHRONOUS = 2
INITIALIZE_DONT_EXIT = 0x8000
POSITION_CHARACTER = 1
CHARS_UTF8 = 1
RATE, PITCH = 1, 3

SEED = 1  # of the noise of voices with breath, which is otherwise seeded by the clock
TIME_LIMIT = 120  # seconds for one utterance

Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p)


def load() -> ctypes.CDLL:
    """Loads the library and initializes it. Exits with a message when its data cannot be used."""
    library = ctypes.CDLL(str(espeakng_loader.get_library_path()))
    data = str(espeakng_loader.get_data_path()).encode()
    if library.espeak_Initialize(AUDIO_OUTPUT_SYNCHRONOUS, 0, data, INITIALIZE_DONT_EXIT) != 22050:
        sys.exit(f"eSpeak NG could not be initialized with the data at {data.decode()}")
    arguments = [ctypes.c_char_p, ctypes.c_size_t, ctypes.c_uint, ctypes.c_int, ctypes.c_uint, ctypes.c_uint]
    library.espeak_Synth.argtypes = [*arguments, ctypes.c_void_p, ctypes.c_void_p]
    library.espeak_ng_SetRandSeed.argtypes = [ctypes.c_long]
    library.espeak_SetVoiceByName(b"en-us")  # reads the list of voices, which every fork would read again
    return library


def speak(library: ctypes.CDLL, text: str, voice: str, rate: int, pitch: int) -> bytes:
    """Speaks one utterance; returns its samples. Raises ValueError for an unknown voice or a text without sound."""
    chunks: list[bytes] = []

    def receive(samples, count, _events) -> int:
        if samples and count > 0:
            chunks.append(ctypes.string_at(samples, 2 * count))
        return 0

    # Kept in a variable until the end: ctypes does not keep a callback alive.
    callback = Callback(receive)
    library.espeak_SetSynthCallback(callback)
    library.espeak_ng_SetRandSeed(SEED)
    if library.espeak_SetVoiceByName(voice.encode()) != 0:
        raise ValueError(f"eSpeak NG has no voice {voice!r}")
    library.espeak_SetParameter(RATE, rate, 0)
    library.espeak_SetParameter(PITCH, pitch, 0)
    utf8 = text.encode("utf-8")
    status = library.espeak_Synth(utf8, len(utf8) + 1, 0, POSITION_CHARACTER, 0, CHARS_UTF8, None, None)
    if status != 0 or library.espeak_Synchronize() != 0 or not chunks:
        raise ValueError(f"eSpeak NG could not speak {text!r} with voice {voice!r}")
    return b"".join(chunks)


def answer(library: ctypes.CDLL, request: dict) -> None:
    """Speaks one request; writes its samples, or the error."""
    try:
        samples = speak(library, **request)
    except ValueError as error:
        write(json.dumps({"error": str(error)}).encode() + b"\n")
    else:
        write(json.dumps({"bytes": len(samples)}).encode() + b"\n" + samples)


def write(content: bytes) -> None:
    """Writes to stdout until all is taken: a pipe takes what fits."""
    view = memoryview(content)
    while view:
        view = view[os.write(1, view) :]


def main() -> None:
    """Answers requests until stdin closes."""
    library = load()
    for line in sys.stdin:
        # The child speaks and ends, and with it the library's state of this utterance.
        child = os.fork()
        if child == 0:
            signal.alarm(TIME_LIMIT)
            answer(library, json.loads(line))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status != 0:
            write(json.dumps({"error": f"eSpeak NG crashed or hung on {line.strip()}"}).encode() + b"\n")


if __name__ == "__main__":
    main()
