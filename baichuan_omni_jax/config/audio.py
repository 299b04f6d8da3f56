"""How the audio tokenizer and the flow-matching decoder are trained: the settings of their losses and schedules."""

from dataclasses import dataclass

from baichuan_omni_jax.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class QuantizerConfig:
    """How the residual quantizer trains, by step (counted from 0).

    `decay` of the running means of each code's vectors; `shrink`, the share of themselves that these lose in every step
    after the first ones, on which the next mean builds: codes come to rest at
    (1 - shrink) (1 - decay) / (1 - (1 - shrink) decay) of the mean of their vectors.
    Codes unused for `restart_after` steps (0: never) are placed anew. The first `init_steps` batches are one pass of
    k-means: the first seeds the codebooks, the running means forget nothing, unused codes are placed anew at once. With
    0, codebooks go on as they are: those of a trained tokenizer.
    `temperature` of the Gumbel noise on distances, in units of the mean squared residual, falls linearly from the first
    to the second number in `temperature_steps` (both 0: always the nearest code). `level_dropout` is the share of clips
    of which only the first few levels are kept, their number drawn evenly. The share of clips that see quantized
    features grows linearly from `quantized_share` to 1 in `quantized_steps`; the others see them as they were.
    """

    decay: float = 0.99
    shrink: float = 0.0
    restart_after: int = 200
    init_steps: int = 10
    temperature: tuple[float, float] = (0.0, 0.0)
    temperature_steps: int = 10000
    level_dropout: float = 0.1
    quantized_share: float = 0.1
    quantized_steps: int = 10000

    def __post_init__(self):
        for name in ("decay", "shrink", "level_dropout", "quantized_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"quantizer.{name} {getattr(self, name)} must lie between 0 and 1")
        for name in ("restart_after", "init_steps", "temperature_steps", "quantized_steps"):
            if getattr(self, name) < 0:
                raise ConfigError(f"quantizer.{name} {getattr(self, name)} must be at least 0")
        if min(self.temperature) < 0:
            raise ConfigError(f"quantizer.temperature {self.temperature} must be two numbers of at least 0")


@dataclass(frozen=True, kw_only=True)
class SpecAugmentConfig:
    """Spans of time and bands of mels that the encoder does not see in training, as the released processor masks them
    (arXiv:1904.08779). The names are those of Whisper's `config.json`; with both shares 0 nothing is masked.

    Of n valid frames, `mask_time_prob` x n / `mask_time_length` spans of that many frames are masked, at least
    `mask_time_min_masks`; the number is rounded up or down by chance, spans may overlap. Likewise of the mel bins.
    """

    mask_time_prob: float = 0.0
    mask_time_length: int = 10
    mask_time_min_masks: int = 2
    mask_feature_prob: float = 0.0
    mask_feature_length: int = 10
    mask_feature_min_masks: int = 0

    def __post_init__(self):
        for axis in ("time", "feature"):
            share, length, least = (getattr(self, f"mask_{axis}_{name}") for name in ("prob", "length", "min_masks"))
            if not 0 <= share <= 1:
                raise ConfigError(f"spec_augment.mask_{axis}_prob {share} must lie between 0 and 1")
            if length < 1 or least < 0:
                raise ConfigError(
                    f"spec_augment: mask_{axis}_length {length} must be at least 1, mask_{axis}_min_masks {least} at "
                    "least 0"
                )


@dataclass(frozen=True, kw_only=True)
class TokenizerTrainConfig:
    """The loss of the audio tokenizer: `reconstruction` x (L1 + L2 of coarse and refined mel at every scale) +
    `transcript` x cross-entropy of what was said, read by a frozen language model + `commitment` x squared distance
    of the features to their codes.

    The commitment's weight goes from `commitment_start` (None: no other than `commitment`) to `commitment` in the steps
    in which the quantized share grows (`quantizer.quantized_steps`).
    `mel_scales` are (n_fft, hop) of the target mels at 16 kHz. Without `llm` in the run's branches nothing is read.
    `spec_augment` masks what the encoder hears, never the targets nor held-out sound.
    """

    reconstruction: float = 1.0
    transcript: float = 1.0
    commitment: float = 0.25
    commitment_start: float | None = None
    mel_scales: tuple[tuple[int, int], ...] = ((1024, 256), (400, 160))
    quantizer: QuantizerConfig = QuantizerConfig()
    spec_augment: SpecAugmentConfig = SpecAugmentConfig()

    def __post_init__(self):
        for name in ("reconstruction", "transcript", "commitment", "commitment_start"):
            weight = getattr(self, name)
            if weight is not None and not 0 <= weight < float("inf"):
                raise ConfigError(f"tokenizer.{name} {weight} must be a finite number of at least 0")


@dataclass(frozen=True, kw_only=True)
class FlowTrainConfig:
    """The loss of the flow-matching decoder: flow matching + `prior` x L1 of the pre-net's mel.

    A share `condition_dropout` of the clips sees no condition. `ema` is the decay of the running mean of the weights,
    which sampling and checkpoints use (0: the weights themselves).
    """

    prior: float = 1.0
    condition_dropout: float = 0.2
    ema: float = 0.999

    def __post_init__(self):
        if not 0 <= self.condition_dropout <= 1:
            raise ConfigError(f"flow.condition_dropout {self.condition_dropout} must lie between 0 and 1")
