"""The branch `audio_encoder`: from mel windows to codes at 12.5 Hz (arXiv:2502.17239, section 3.1).

    log mel --AudioEncoder--> states at 50 Hz --AudioBridge--> features at 12.5 Hz --ResidualQuantizer--> codes

`audio_tokenizer.audio_model.*` (Whisper's encoder), `audio_bridge_model.*` and its `vq_list.*` of the checkpoint. A
clip's result never depends on what it is batched with: mel frames and the first convolution's output are zero past the
clip's end, as if it were alone. The released code leaves the latter non-zero, which `padded=True` repeats.
`WindowEncoder` gives the codes of many windows: batches of few fixed shapes, so that few programs are compiled.
"""

import hashlib
from collections import deque
from collections.abc import Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int32, PRNGKeyArray

from baichuan_omni_jax.config.architecture import AudioConfig
from baichuan_omni_jax.kernels.rvq_lookup import Prepared, prepare_codebooks, rvq_lookup
from baichuan_omni_jax.nn.encoder import EncoderLayer, EncoderSizes, run_encoder
from baichuan_omni_jax.nn.layers import Conv1d, LayerNorm, gelu, length_mask
from baichuan_omni_jax.nn.linear import Linear
from baichuan_omni_jax.nn.param import CLIPS, Buffer, ComputePolicy, named_values, split_as, stack, use
from baichuan_omni_jax.sharding import axis_product, placement

# Spread of the random convolutions: as large as the sinusoids added to them, or every clip of an untrained encoder
# would sound alike.
GAINS = (3.0, 4.0)


def sinusoids(length: int, width: int) -> Float[Array, "t d"]:
    """Returns the position table, fp32: angle = position * 10000^(-i / (width/2 - 1)); all sines, then all cosines.

    width 4: frequencies 1 and 0.0001, so position 2 is [sin 2, sin 0.0002, cos 2, cos 0.0002].
    """
    frequency = 10000.0 ** (-jnp.arange(width // 2, dtype=jnp.float32) / (width // 2 - 1))
    angles = jnp.arange(length, dtype=jnp.float32)[:, None] * frequency
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)


def encoder_lengths(mel_lengths: Int32[Array, " m"], stride: int) -> Int32[Array, " m"]:
    """Returns frames after the strided convolution: (frames - 1) // stride + 1; 0 stays 0."""
    return (mel_lengths - 1) // stride + 1


class AudioEncoder(nnx.Module):
    """Encodes log mel: two convolutions, sinusoidal positions, layers over the clip's own frames, LayerNorm."""

    def __init__(self, key: PRNGKeyArray, cfg: AudioConfig, compute: ComputePolicy):
        keys = jax.random.split(key, 3)
        self.sizes = EncoderSizes(
            width=cfg.d_model,
            heads=cfg.encoder_attention_heads,
            ffn=cfg.encoder_ffn_dim,
            eps=cfg.norm_eps,
            rows=(CLIPS, None),
            key_bias=False,
        )
        # conv1 keeps the 100 Hz of the mel, conv2 halves it.
        padding, d = cfg.kernel_size // 2, cfg.d_model
        conv1, conv2 = (cfg.kernel_size, cfg.num_mel_bins, d), (cfg.kernel_size, d, d)
        self.conv1 = Conv1d(keys[0], conv1, padding=padding, rows=CLIPS, compute=compute, gain=GAINS[0])
        self.conv2 = Conv1d(
            keys[1], conv2, padding=padding, stride=cfg.stride_size, rows=CLIPS, compute=compute, gain=GAINS[1]
        )
        self.layers = stack(lambda k: EncoderLayer(k, self.sizes, compute), keys[2], cfg.encoder_layers)
        self.norm = LayerNorm(d, eps=cfg.norm_eps, compute=compute)
        self.cfg, self.compute = cfg, compute

    def __call__(
        self, mel: Float[Array, "m f mels"], mel_lengths: Int32[Array, " m"], *, padded: bool = False
    ) -> Float[Array, "m t d"]:
        """Encodes clips.

        Args:
            mel: log mel (m, f, mels), one window of at most 30 s a row.
            mel_lengths: valid frames of each (m,); 0: an unused slot.
            padded: compute the released, batch dependent variant.

        Returns:
            States (m, (f-1)//2 + 1, d), zero past each clip's encoder length.

        Raises:
            ValueError: shapes that do not fit.
        """
        if mel.shape[-1] != self.cfg.num_mel_bins or mel_lengths.shape != mel.shape[:1]:
            raise ValueError(
                f"mel {mel.shape} and mel_lengths {mel_lengths.shape}: expected (clips, frames, "
                f"{self.cfg.num_mel_bins}) and (clips,)"
            )
        mel, mel_lengths = split_as(mel, self.compute, CLIPS), split_as(mel_lengths, self.compute, CLIPS)
        with jax.named_scope("convolutions"):
            # Parity quirk: the strided convolution reads one frame past a clip of an odd length. Alone, that frame is
            # padding and zero; in a batch the released code has there what conv1's bias made of zeros.
            real = length_mask(mel_lengths, mel.shape[1])[..., None]
            x = gelu(self.conv1(jnp.where(real, mel, 0)))
            x = gelu(self.conv2(x if padded else jnp.where(real, x, 0)))
        x = x + sinusoids(x.shape[1], x.shape[2]).astype(x.dtype)
        real = length_mask(encoder_lengths(mel_lengths, self.cfg.stride_size), x.shape[1])
        # Bidirectional over a clip's own frames: its frames are segment 1, padding 0, and all positions are equal.
        ids = real.astype(jnp.int32)
        x = run_encoder(self.layers, x, ids, jnp.zeros_like(ids), sizes=self.sizes, compute=self.compute)
        # The norm would make a bias of padding: zeroed after it.
        return jnp.where(real[..., None], self.norm(x), 0)


class AudioBridge(nnx.Module):
    """Joins four states into one feature: LayerNorm(down(silu(gate(x)) * up(x)) + the four side by side).

    `gate_proj` and `up_proj` are (4, d, 4d); the checkpoint holds them as convolutions (4d, d, 4).
    """

    def __init__(self, key: PRNGKeyArray, cfg: AudioConfig, compute: ComputePolicy):
        keys = jax.random.split(key, 3)
        k, d, f, out = cfg.avg_pooler, cfg.d_model, cfg.code_dim, (CLIPS, None, None)
        axes = ("kernel", "embed", "small")
        self.gate_proj = Linear(keys[0], "mgkd,kdf->mgf", (k, d, f), axes, out=out, compute=compute)
        self.up_proj = Linear(keys[1], "mgkd,kdf->mgf", (k, d, f), axes, out=out, compute=compute)
        self.down_proj = Linear(keys[2], "mgf,fe->mge", (f, f), ("small", "embed"), out=out, compute=compute)
        self.norm = LayerNorm(f, eps=cfg.norm_eps, compute=compute)
        self.pool, self.compute = k, compute

    def __call__(self, x: Float[Array, "m t d"]) -> Float[Array, "m g f"]:
        """Maps (m, t, d) to (m, t // 4, 4d); a trailing partial group is dropped."""
        with jax.named_scope("audio_bridge"):
            m, t, d = x.shape
            groups = t // self.pool
            spec = self.compute.spec(CLIPS, None, None)
            x = x[:, : groups * self.pool].reshape(m, groups, self.pool, d)
            # The checkpoint's stride-4 convolutions, as products over groups of four frames.
            y = self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))
            return self.norm(y + x.reshape(m, groups, self.pool * d, out_sharding=spec))


# Spread of the first random codebook, and of each next one relative to it. Codes as long as the vectors themselves
# would be chosen for being short, so these are shorter: half and more of each codebook is used on speech.
SPREAD, DECAY = 0.5, 0.9

Codebooks = tuple[Float[Array | np.ndarray, "_ d"] | Prepared, ...]


class Codebook(nnx.Module):
    """Holds `embed` (codes, d) and the running sums it is made of: `embed_avg` (codes, d), `cluster_size` (codes,)."""

    def __init__(self, key: PRNGKeyArray, size: int, width: int, std: float):
        embed = std * jax.random.normal(key, (size, width), jnp.float32)
        self.embed = Buffer(embed, axes=("codes", "embed"), moments=(0.0, std))
        self.embed_avg = Buffer(embed, axes=("codes", "embed"), moments=(0.0, std))
        self.cluster_size = Buffer(jnp.ones((size,), jnp.float32), axes=("codes",), moments=(1.0, 0.0))


class ResidualQuantizer(nnx.Module):
    """Quantizes vectors of `code_dim` level by level. Untrained codebooks are normal, narrower at each next level."""

    def __init__(self, key: PRNGKeyArray, cfg: AudioConfig, compute: ComputePolicy):
        keys = jax.random.split(key, cfg.levels)
        self.levels = nnx.List(
            [Codebook(keys[q], size, cfg.code_dim, SPREAD * DECAY**q) for q, size in enumerate(cfg.codebook_sizes)]
        )
        self.compute = compute

    def codebooks(self) -> tuple[Float[Array, "_ d"], ...]:
        """Returns the codes of every level, fp32, whole on every device."""
        return tuple(use(level.embed, self.compute, jnp.float32) for level in self.levels)

    def prepared(self) -> Codebooks:
        """Returns the codebooks for many calls of `quantize`: what their lookup needs of them is computed once."""
        return prepare_codebooks(self.codebooks())

    def quantize(
        self, x: Float[Array, "m g d"], codebooks: Codebooks | None = None
    ) -> tuple[Int32[Array, "m g q"], Float[Array, "m g d"], Float[Array, "m g q"]]:
        """Finds the codes of features. No gradient passes.

        Args:
            x: features (m, g, d).
            codebooks: this quantizer's `prepared()` ones, where they were made before.

        Returns:
            Codes (m, g, q), the sum of the chosen codes (m, g, d), and the norm of what is left after each level.
        """
        with jax.named_scope("quantize"):
            # The lookup knows rows: frames of all clips in one list, each on the device of its clip.
            x = split_as(x, self.compute, CLIPS)
            m, g, d = x.shape
            codes, chosen, norms = (
                _reshape(result, (m, g, result.shape[-1]))
                for result in rvq_lookup(_reshape(x, (m * g, d)), codebooks or self.codebooks())
            )
            return codes, chosen, norms

    def decode(self, codes: Int32[Array, "m g q"]) -> Float[Array, "m g d"]:
        """Returns the sum of the chosen codes, fp32."""
        # One gather a level, summed from coarse to fine as the checkpoint does.
        codes = split_as(codes, self.compute, CLIPS)
        spec = self.compute.spec(CLIPS, None, None)
        with jax.named_scope("dequantize"):
            first, *others = (
                table.at[codes[..., q]].get(out_sharding=spec) for q, table in enumerate(self.codebooks())
            )
            return sum(others, start=first)


def _reshape(x: Array, shape: tuple[int, ...]) -> Array:
    """Joins or cuts the leading axis (clips, frames), which stays split as it was: a clip lies on one device."""
    spec = jax.typeof(x).sharding.spec
    return x.reshape(shape, out_sharding=placement(PartitionSpec(spec[0], *[None] * (len(shape) - 1))))


class AudioEncoderBranch(nnx.Module):
    """Encodes windows of audio as codes: Whisper encoder, bridge, residual quantizer.

    Clips are split over the batch axes.     `AudioTokenizer` of `generation` wraps it for waveforms.

    >>> import jax
    >>> from baichuan_omni_jax.config import tiny
    >>> from baichuan_omni_jax.nn.param import initialize
    >>> branch = initialize(AudioEncoderBranch, jax.random.key(0), tiny().audio, ComputePolicy())
    >>> codes, valid = branch.encode(jnp.zeros((1, 64, 32)), jnp.array([64], jnp.int32))
    >>> codes.shape, int(valid.sum())
    ((1, 8, 8), 8)
    """

    def __init__(self, key: PRNGKeyArray, cfg: AudioConfig, compute: ComputePolicy):
        keys = jax.random.split(key, 3)
        self.encoder = AudioEncoder(keys[0], cfg, compute)
        self.bridge = AudioBridge(keys[1], cfg, compute)
        self.quantizer = ResidualQuantizer(keys[2], cfg, compute)
        self.cfg, self.compute = cfg, compute

    def features(
        self, mel: Float[Array, "m f mels"], mel_lengths: Int32[Array, " m"], *, padded: bool = False
    ) -> tuple[Float[Array, "m g d"], Bool[Array, "m g"]]:
        """Returns what the quantizer reads, (m, bridge frames, code_dim), and which of it is valid. Differentiable.

        `padded`: the released, batch dependent convolutions (see `AudioEncoder`).
        """
        with jax.named_scope("audio_encoder"):
            features = self.bridge(self.encoder(mel, mel_lengths, padded=padded))
        mel_lengths = split_as(mel_lengths, self.compute, CLIPS)
        lengths = encoder_lengths(mel_lengths, self.cfg.stride_size) // self.cfg.avg_pooler
        return features, length_mask(lengths, features.shape[1])

    def encode(
        self,
        mel: Float[Array, "m f mels"],
        mel_lengths: Int32[Array, " m"],
        *,
        padded: bool = False,
        codebooks: Codebooks | None = None,
    ) -> tuple[Int32[Array, "m g q"], Bool[Array, "m g"]]:
        """Encodes windows.

        Args:
            mel: log mel (m, f, mels), one window of at most 30 s a row.
            mel_lengths: its valid frames (m,), 0 for an unused slot.
            padded: see `AudioEncoder`.
            codebooks: see `ResidualQuantizer.quantize`.

        Returns:
            Codes (m, bridge frames, levels) and which frames are valid; codes of the others are 0.
        """
        features, valid = self.features(mel, mel_lengths, padded=padded)
        codes, _, _ = self.quantizer.quantize(features, codebooks)
        return jnp.where(valid[..., None], codes, 0), valid


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
