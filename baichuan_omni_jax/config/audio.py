"""How the audio tokenizer and the flow-matching decoder are trained: their losses and schedules."""

from dataclasses import dataclass

from baichuan_omni_jax.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class QuantizerConfig:
    """How the residual quantizer trains (arXiv:2502.17239, section 3.1). Steps count from 0."""

    # Decay of the running means of each code's vectors: a mean is of about the last 1 / (1 - decay) steps.
    decay: float = 0.99
    # The share of themselves that the means lose in every step after the first ones. The next mean builds on what is
    # left, so codes come to rest at (1 - shrink) (1 - decay) / (1 - (1 - shrink) decay) of their vectors' mean. Off
    # unless a run sets it: what pays depends on `decay`.
    shrink: float = 0.0
    # Steps without use after which a code is placed anew, on a vector of the batch; 0: never.
    restart_after: int = 200
    # The first so many batches are one pass of k-means: the first seeds the codebooks, the running means forget
    # nothing, unused codes are placed anew at once. 0: codebooks go on as they are, those of a trained tokenizer.
    init_steps: int = 10
    # Of the Gumbel noise on distances, in units of the mean squared residual: falls linearly from the first number to
    # the second in `temperature_steps`. Both 0: always the nearest code.
    temperature: tuple[float, float] = (0.0, 0.0)
    temperature_steps: int = 10000
    # The share of clips of which only the first few levels are kept, their number drawn evenly, so that the first
    # levels alone mean something.
    level_dropout: float = 0.1
    # The share of clips that see quantized features grows linearly from this to 1 in `quantized_steps`; the others see
    # them as they were. 10 % as in the paper.
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

    mask_time_prob: float = 0.0  # the share of frames; off, as in Whisper
    mask_time_length: int = 10  # mel frames of a span: 100 ms
    mask_time_min_masks: int = 2  # spans of a clip, however short
    mask_feature_prob: float = 0.0  # the share of mel bins; off, as in Whisper
    mask_feature_length: int = 10  # mel bins of a band
    mask_feature_min_masks: int = 0  # bands of a clip

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
    """The loss of the audio tokenizer (arXiv:2502.17239, section 3.1): weights of its three terms, and its quantizer.

    Held-out audio is never masked and always quantized.
    """

    reconstruction: float = 1.0  # of L1 + L2 of coarse and refined mel at every scale
    # Of the cross-entropy of the transcript, by a frozen language model. Without `llm` in the run's branches there is
    # no such term.
    transcript: float = 1.0
    commitment: float = 0.25  # of the squared distance of the features to their codes; VQ-VAE's usual weight
    # From which the commitment's weight goes to `commitment` while the quantized share grows
    # (`quantizer.quantized_steps`); None: `commitment` from the start.
    commitment_start: float | None = None
    # (n_fft, hop) in samples of the target mels at 16 kHz: the released post-net's own, and the encoder's.
    mel_scales: tuple[tuple[int, int], ...] = ((1024, 256), (400, 160))
    quantizer: QuantizerConfig = QuantizerConfig()
    spec_augment: SpecAugmentConfig = SpecAugmentConfig()  # of the encoder's input, never of the targets

    def __post_init__(self):
        for name in ("reconstruction", "transcript", "commitment", "commitment_start"):
            weight = getattr(self, name)
            if weight is not None and not 0 <= weight < float("inf"):
                raise ConfigError(f"tokenizer.{name} {weight} must be a finite number of at least 0")


@dataclass(frozen=True, kw_only=True)
class FlowTrainConfig:
    """The loss of the flow-matching decoder: flow matching + `prior` x L1 of the pre-net's mel."""

    prior: float = 1.0  # as the released `prenet_loss_weight`
    # The share of clips that see no condition, which guidance needs: as the released `training_cfg_rate`.
    condition_dropout: float = 0.2
    # Decay of the running mean of the weights, which sampling and checkpoints use; 0: the weights themselves.
    ema: float = 0.999

    def __post_init__(self):
        if not 0 <= self.condition_dropout <= 1:
            raise ConfigError(f"flow.condition_dropout {self.condition_dropout} must lie between 0 and 1")
