"""Sizes of the HiFT vocoder (`vocoder_config.json`, a file of its own): 24 kHz mel to waveform."""

import math
from dataclasses import dataclass
from typing import Any

from etils import epath

from baichuan_omni_jax.errors import ConfigError
from baichuan_omni_jax.storage import read_json_object


@dataclass(frozen=True, kw_only=True)
class VocoderConfig:
    """Harmonic source, upsampling body and inverse STFT. Rates in Hz; one mel frame makes `hop_length` samples."""

    in_channels: int = 80  # mel bins
    base_channels: int = 512  # width before the first upsampling, halved by each
    nb_harmonics: int = 8  # overtones of the source
    sampling_rate: int = 24000  # Hz
    nsf_alpha: float = 0.1  # amplitude of the source's sines, and three times that of its noise where unvoiced
    nsf_sigma: float = 0.003  # amplitude of its noise where voiced
    nsf_voiced_threshold: int | float = 10  # Hz of the fundamental, above which a frame is voiced
    upsample_rates: tuple[int, ...] = (8, 5, 3)  # of each stage
    upsample_kernel_sizes: tuple[int, ...] = (16, 11, 7)  # of each stage's transposed convolution
    istft_n_fft: int = 16  # samples of a window of the short-time spectrum that the body ends in
    istft_hop: int = 4  # samples between its frames
    resblock_kernel_sizes: tuple[int, ...] = (3, 7, 11)  # of a stage's residual blocks, whose results are averaged
    resblock_dilation_sizes: tuple[tuple[int, ...], ...] = ((1, 3, 5), (1, 3, 5), (1, 3, 5))
    source_resblock_kernel_sizes: tuple[int, ...] = (7, 7, 11)  # of the block that reads the source, by stage
    source_resblock_dilation_sizes: tuple[tuple[int, ...], ...] = ((1, 3, 5), (1, 3, 5), (1, 3, 5))
    lrelu_slope: float = 0.1  # before each upsampling; before the last convolution it is 0.01
    audio_limit: float = 0.99  # the largest amplitude
    f0_cond_channels: int = 512  # width of the pitch predictor

    def __post_init__(self):
        for rates, kernels in (
            ("upsample_rates", "upsample_kernel_sizes"),
            ("upsample_rates", "source_resblock_kernel_sizes"),
            ("source_resblock_kernel_sizes", "source_resblock_dilation_sizes"),
            ("resblock_kernel_sizes", "resblock_dilation_sizes"),
        ):
            if len(getattr(self, rates)) != len(getattr(self, kernels)):
                raise ConfigError(
                    f"{kernels} has {len(getattr(self, kernels))} entries, {rates} {len(getattr(self, rates))}"
                )
        for rate, kernel in zip(self.upsample_rates, self.upsample_kernel_sizes, strict=True):
            if kernel < rate or (kernel - rate) % 2:
                raise ConfigError(f"upsample_kernel_sizes {kernel} for rate {rate}: expected rate + an even number")
        if any(size % 2 == 0 for size in (*self.resblock_kernel_sizes, *self.source_resblock_kernel_sizes)):
            raise ConfigError("resblock_kernel_sizes and source_resblock_kernel_sizes must be odd")
        if self.base_channels % 2 ** len(self.upsample_rates):
            raise ConfigError(f"base_channels {self.base_channels} cannot be halved {len(self.upsample_rates)} times")
        if self.istft_n_fft % 2 or self.istft_n_fft % self.istft_hop:
            raise ConfigError(
                f"istft_params.n_fft {self.istft_n_fft} must be even and a multiple of hop_len {self.istft_hop}"
            )

    @property
    def hop_length(self) -> int:
        """Returns the samples of one mel frame: 8 * 5 * 3 * 4 = 480."""
        return math.prod(self.upsample_rates) * self.istft_hop

    @property
    def harmonics(self) -> int:
        """Returns the number of sines of the source: the fundamental and its overtones."""
        return self.nb_harmonics + 1

    @property
    def spectrum(self) -> int:
        """Returns the number of frequencies of the short-time spectrum."""
        return self.istft_n_fft // 2 + 1

    def channels(self, stage: int) -> int:
        """Returns the width after upsampling stage `stage`; -1 is the width before the first."""
        return self.base_channels // 2 ** (stage + 1)

    @property
    def source_strides(self) -> tuple[int, ...]:
        """Returns the frames of the source's STFT for one frame of each stage: 15, 3, 1."""
        return tuple(math.prod(self.upsample_rates[i + 1 :]) for i in range(len(self.upsample_rates)))


def tiny_vocoder() -> VocoderConfig:
    """Returns every part at the sizes of `tiny()`: 20 mels."""
    return VocoderConfig(in_channels=20, base_channels=32, f0_cond_channels=24)


_ISTFT = {"istft_n_fft": "n_fft", "istft_hop": "hop_len"}
_PLAIN = tuple(name for name in VocoderConfig.__dataclass_fields__ if name not in _ISTFT)


def read_vocoder_config(path: epath.PathLike) -> VocoderConfig:
    """Reads the JSON file at `path`. Raises ConfigError naming the file and the field."""
    values = read_json_object(path)
    try:
        return vocoder_from_json(values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def vocoder_from_json(values: dict[str, Any]) -> VocoderConfig:
    """Reads the released JSON's dict. Raises ConfigError on a key that is unknown, missing or mistyped."""
    _check_object(values, "the vocoder's configuration")
    istft = values.get("istft_params", {})
    _check_object(istft, "istft_params")
    _check_keys(set(values), {*_PLAIN, "istft_params"}, "")
    _check_keys(set(istft), set(_ISTFT.values()), "istft_params.")
    fields = {name: values[name] for name in _PLAIN} | {ours: istft[theirs] for ours, theirs in _ISTFT.items()}
    return VocoderConfig(**{name: _typed(name, value) for name, value in fields.items()})


def vocoder_to_json(config: VocoderConfig) -> dict[str, Any]:
    """Writes the released JSON's dict; `vocoder_from_json` of it gives `config` back."""
    values = {name: _listed(getattr(config, name)) for name in _PLAIN}
    return values | {"istft_params": {theirs: getattr(config, ours) for ours, theirs in _ISTFT.items()}}


def _check_object(values: Any, what: str) -> None:
    if not isinstance(values, dict):
        raise ConfigError(f"{what} is not a JSON object")


def _check_keys(found: set[str], known: set[str], prefix: str) -> None:
    if unknown := sorted(found - known):
        raise ConfigError(f"{prefix}{unknown[0]} is not a known field of the vocoder")
    if missing := sorted(known - found):
        raise ConfigError(f"{prefix}{missing[0]} is missing")


def _typed(name: str, value: Any) -> Any:
    """Returns the value as the field's type: lists as tuples. Raises ConfigError where it is of another kind."""
    default = getattr(VocoderConfig, name)
    if isinstance(default, tuple):
        nested = isinstance(default[0], tuple)
        rows = value if nested and isinstance(value, list) else [value]
        if not all(isinstance(row, list) and row and all(_positive(n, int) for n in row) for row in rows):
            raise ConfigError(
                f"{name} = {value!r}: expected {'lists' if nested else 'a list'} of whole numbers above 0"
            )
        return tuple(tuple(row) for row in rows) if nested else tuple(value)
    least = 0 if name == "nb_harmonics" else None
    kinds = int if type(default) is int and name != "nsf_voiced_threshold" else (int, float)
    if not (_positive(value, kinds) or (least == 0 and value == 0)):
        raise ConfigError(f"{name} = {value!r}: expected {'a whole' if kinds is int else 'a'} number above 0")
    return float(value) if isinstance(default, float) else value


def _positive(value: Any, kinds: type | tuple[type, ...]) -> bool:
    return isinstance(value, kinds) and not isinstance(value, bool) and value > 0


def _listed(value: Any) -> Any:
    return [_listed(part) for part in value] if isinstance(value, tuple) else value
