"""Codes of many audio windows: batches of few fixed shapes over the mesh, so that few programs are compiled."""

import hashlib
from collections import deque
from collections.abc import Iterable, Iterator

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float, Int32

from baichuan_omni_jax.audio.encoder import AudioEncoderBranch
from baichuan_omni_jax.config.architecture import AudioConfig
from baichuan_omni_jax.nn.param import CLIPS, named_values
from baichuan_omni_jax.sharding import axis_product

WINDOWS_PER_DEVICE = 8
# Batches that are computed while the next one is put together.
IN_FLIGHT = 2


def fingerprint(tokenizer: AudioEncoderBranch) -> str:
    """Returns 32 hex digits that change with any parameter or size of the tokenizer: by which codes were written."""
    digest = hashlib.sha256(repr(tokenizer.cfg).encode())
    for name, value in sorted(named_values(tokenizer).items()):
        digest.update(f"{name} {value.shape} {value.dtype}".encode())
        digest.update(np.ascontiguousarray(value).tobytes())
    return digest.hexdigest()[:32]


def mel_buckets(cfg: AudioConfig) -> tuple[int, ...]:
    """Returns the lengths that windows are padded to: 1/6, 1/3, 2/3 and the whole of 30 s."""
    whole = cfg.max_mel_frames
    return whole // 6, whole // 3, whole * 2 // 3, whole


class WindowEncoder:
    """Encodes log-mel windows on `mesh`: its windows over data x fsdp, `tokenizer` wherever its parameters are.

    A batch holds windows of one padded length alone, so a window's codes depend neither on the others nor on their
    order, and there is one program a length (`mel_buckets`). Call it with the mesh set.
    """

    def __init__(self, tokenizer: AudioEncoderBranch, mesh: Mesh, windows_per_device: int = WINDOWS_PER_DEVICE):
        rules = tokenizer.compute.rules
        self._cfg, self._tokenizer = tokenizer.cfg, tokenizer
        self._batch = windows_per_device * axis_product(mesh, rules.axes(CLIPS))
        self._split = [NamedSharding(mesh, rules.spec(CLIPS, *rest)) for rest in ((None, None), ())]
        self._codebooks = jax.jit(lambda tokenizer: tokenizer.quantizer.prepared())(tokenizer)
        self.encode = jax.jit(lambda tokenizer, books, mel, lengths: tokenizer.encode(mel, lengths, codebooks=books)[0])

    def __call__(
        self, windows: Iterable[tuple[int, Float[np.ndarray, "mels f"]]]
    ) -> Iterator[tuple[int, Int32[np.ndarray, "g q"]]]:
        """Yields (name, codes (g, levels)) of each (name, log mel), not in their order; g = `cfg.bridge_length(f)`."""
        # A batch leaves when it is full; while devices compute it, the next one is put together.
        waiting = {size: [] for size in mel_buckets(self._cfg)}
        running: deque[tuple[list, Array]] = deque()
        for name, mel in windows:
            size = next(size for size in waiting if size >= mel.shape[1])
            waiting[size].append((name, mel))
            if len(waiting[size]) == self._batch:
                running.append((waiting[size], self._start(waiting[size], size)))
                waiting[size] = []
            while len(running) > IN_FLIGHT:
                yield from self._finish(*running.popleft())
        # What is left fills its batches with empty places.
        running.extend((group, self._start(group, size)) for size, group in waiting.items() if group)
        while running:
            yield from self._finish(*running.popleft())

    def _start(self, group: list[tuple[int, np.ndarray]], size: int) -> Array:
        """Sends a batch to the devices; returns its codes, which are not there yet."""
        # Empty places have length 0: the encoder gives them no codes.
        mel = np.zeros((self._batch, size, self._cfg.num_mel_bins), np.float32)
        lengths = np.zeros(self._batch, np.int32)
        for row, (_, window) in enumerate(group):
            mel[row, : window.shape[1]] = window.T
            lengths[row] = window.shape[1]
        return self.encode(self._tokenizer, self._codebooks, *jax.device_put((mel, lengths), tuple(self._split)))

    def _finish(self, group: list[tuple[int, np.ndarray]], codes: Array) -> Iterator[tuple[int, np.ndarray]]:
        for (name, window), row in zip(group, np.asarray(codes), strict=False):
            yield name, row[: self._cfg.bridge_length(window.shape[1])]
