"""Codes of many sound windows: batches of fixed shape, so that few programs are compiled."""

import hashlib
from collections.abc import Iterable, Iterator
from itertools import islice

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int32

from baichuan_omni_jax.audio.config import AudioConfig
from baichuan_omni_jax.audio.model import AudioTokenizer
from baichuan_omni_jax.nn.param import named_values


def fingerprint(tokenizer: AudioTokenizer) -> str:
    """Changes with any parameter: what a store of codes was written by (32 hex digits)."""
    digest = hashlib.sha256()
    for name, value in sorted(named_values(tokenizer).items()):
        digest.update(f"{name} {value.shape} {value.dtype}".encode())
        digest.update(np.ascontiguousarray(value).tobytes())
    return digest.hexdigest()[:32]


def mel_bucket(frames: int, cfg: AudioConfig) -> int:
    """The padded length of a window: the smallest of 1/6, 1/3, 2/3 and the whole of 30 s that holds it."""
    whole = cfg.max_mel_frames
    return next(size for size in (whole // 6, whole // 3, whole * 2 // 3, whole) if size >= frames)


def encode_windows(
    tokenizer: AudioTokenizer, windows: Iterable[Float[np.ndarray, "mels f"]], *, batch: int = 8
) -> Iterator[Int32[np.ndarray, "g q"]]:
    """Codes (g, levels), g = `AudioConfig.bridge_length(f)`, of each log-mel window, in order.

    `batch` windows are encoded at a time, padded to the longest one's bucket; a window's codes do not depend on its
    batch. Runs on the mesh in use; `batch` must be a multiple of its batch shards.
    """
    cfg = tokenizer.cfg
    encode = jax.jit(lambda tokenizer, books, mel, lengths: tokenizer.encode(mel, lengths, codebooks=books)[0])
    codebooks = jax.jit(lambda tokenizer: tokenizer.quantizer.prepared())(tokenizer)
    windows = iter(windows)
    while group := list(islice(windows, batch)):
        lengths = [window.shape[1] for window in group]
        mel = np.zeros((batch, mel_bucket(max(lengths), cfg), cfg.num_mel_bins), np.float32)
        for row, window in zip(mel, group, strict=False):
            row[: window.shape[1]] = window.T
        counts = np.array(lengths + [0] * (batch - len(lengths)), np.int32)
        codes = np.asarray(encode(tokenizer, codebooks, jnp.asarray(mel), jnp.asarray(counts)))
        for row, frames in zip(codes, lengths, strict=False):
            yield row[: cfg.bridge_length(frames)]
