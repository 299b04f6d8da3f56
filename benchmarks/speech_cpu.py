"""Codes to waveform on this machine at released sizes: the real-time factor, by part, and the first sound of a stream.

    JAX_PLATFORMS=cpu python benchmarks/speech_cpu.py [--seconds 10] [--stream-seconds 10] [--repeats 3]
        [--dtype float32] [--clock wall|cpu] [--json]

Random weights of the sizes of `baichuan_omni_7b()` and the released HiFT. The real-time factor is seconds of work for a
second of speech: below 1 is faster than speech. `decoder`: codes to the pre-net's mel (codebooks, audio decoder, the
pre-net of flow matching); `flow`: ten steps of its estimator with guidance; `vocoder`: HiFT; `total` is their sum for
the stretch as a whole. `stream` works chunk by chunk, all codes there from the start; `stream_first_audio` is its work
until the first samples leave, the waiting for codes left out. Compiling is left out of all. `--clock cpu` sums the time
of all cores, which other work on the machine hardly changes.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
from rows import emit, row

from baichuan_omni_jax.audio.decoder import AudioDecoder
from baichuan_omni_jax.audio.encoder import ResidualQuantizer
from baichuan_omni_jax.config import MeshConfig, OmniConfig, baichuan_omni_7b, tiny
from baichuan_omni_jax.config.vocoder import VocoderConfig, tiny_vocoder
from baichuan_omni_jax.flow.model import FlowDecoder
from baichuan_omni_jax.generation.speech_decoder import SpeechDecoder
from baichuan_omni_jax.nn.param import ComputePolicy, named_variables, with_values
from baichuan_omni_jax.sharding import make_mesh
from baichuan_omni_jax.vocoder.model import Vocoder

Clock = Callable[[], float]
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
SIZES = {"released": (baichuan_omni_7b, VocoderConfig), "tiny": (tiny, tiny_vocoder)}


def make_speaker(sizes: str, dtype: str) -> tuple[SpeechDecoder, OmniConfig]:
    cfg, vocoder = (make() for make in SIZES[sizes])
    compute, key = ComputePolicy(dtype=jnp.dtype(dtype), remat="none"), jax.random.key(0)
    makers = {
        "quantizer": lambda: ResidualQuantizer(key, cfg.audio, compute),
        "audio_decoder": lambda: AudioDecoder(key, cfg.audio, cfg.post_net, compute),
        "flow": lambda: FlowDecoder(key, cfg.flow, compute),
        "vocoder": lambda: Vocoder(key, vocoder, compute),
    }
    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
        branches = {name: untrained(make) for name, make in makers.items()}
        return SpeechDecoder(
            branches | {"audio_encoder": SimpleNamespace(quantizer=branches.pop("quantizer"))}, cfg
        ), cfg


def untrained(make):
    """The module with random weights as narrow as its layers are wide, drawn by numpy: no program to compile."""
    rng, abstract = np.random.default_rng(0), jax.eval_shape(make)
    ones, values = ("scale", "alpha", "weight_g"), {}
    for name, variable in named_variables(abstract).items():
        drawn = rng.standard_normal(variable.shape, np.float32)
        spread = max(1, np.prod(variable.shape[-2:-1])) ** -0.5
        values[name] = jnp.ones(variable.shape) if name.endswith(ones) else jnp.asarray(spread * drawn)
    return with_values(abstract, values)


def measure(speaker: SpeechDecoder, codes: np.ndarray, stream: int, repeats: int, now: Clock) -> dict[str, float]:
    """Medians of seconds, by part, `stream` code frames of them streamed; one more turn, the first, compiles."""
    taken: dict[str, list[float]] = {}
    for _ in range(repeats + 1):
        for name, seconds in {**as_a_whole(speaker, codes, now), **as_a_stream(speaker, codes[:stream], now)}.items():
            taken.setdefault(name, []).append(seconds)
    return {name: statistics.median(seconds[1:]) for name, seconds in taken.items()}


def as_a_whole(speaker: SpeechDecoder, codes: np.ndarray, now: Clock) -> dict[str, float]:
    times = [now()]
    mu = speaker.prenet_mel(codes)
    times.append(now())
    mel = speaker.sample_mel(mu, 0)
    times.append(now())
    speaker.windows(speaker.padded_frames(len(mel)))(mel, 0, True)
    times.append(now())
    return dict(zip(("decoder", "flow", "vocoder", "total"), (*np.diff(times), times[-1] - times[0]), strict=True))


def as_a_stream(speaker: SpeechDecoder, codes: np.ndarray, now: Clock) -> dict[str, float]:
    stream, begin, first = speaker.stream(), now(), None
    for frame in range(len(codes)):
        if len(stream.push(codes[frame : frame + 1])) and first is None:
            first = now() - begin
    stream.close()
    whole = now() - begin
    return {"stream": whole, "stream_first_audio": whole if first is None else first}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=10.0, help="of speech")
    parser.add_argument("--stream-seconds", type=float, help="of it streamed; default: all")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", default="float32", help="of computing: float32 or bfloat16")
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--sizes", choices=SIZES, default="released")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    speaker, cfg = make_speaker(args.sizes, args.dtype)
    streamed = min(args.seconds, args.stream_seconds or args.seconds)
    whole, part = (round(seconds * cfg.audio.code_rate) for seconds in (args.seconds, streamed))
    rng = np.random.default_rng(0)
    codes = np.stack([rng.integers(0, size, whole) for size in cfg.audio.codebook_sizes], -1).astype(np.int32)
    rows = []
    for name, taken in measure(speaker, codes, part, args.repeats, CLOCKS[args.clock]).items():
        seconds = streamed if name == "stream" else args.seconds
        how = f"{args.dtype}, {args.clock} time, {jax.devices()[0].device_kind}"
        note = f"{seconds:g} s of speech, {args.sizes} sizes, {how}"
        if name == "stream_first_audio":
            rows.append(row(name, taken, "s", note=f"work for the first {speaker.chunk + 1} code frames"))
        else:
            rows.append(row(f"rtf_{name}", taken / seconds, "s/s", note=note))
    rows.append(row("programs", speaker.compiles, "compiled", note="for all rows together"))
    return emit(rows, args.json)


if __name__ == "__main__":
    sys.exit(main())
