"""Mels made audible and visible: waveforms by HiFT or Griffin-Lim, and small color images.

Images are drawn without a plotting library: training machines need none.
"""

from collections.abc import Sequence
from fractions import Fraction
from functools import partial
from pathlib import Path

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Float, Float32, UInt8

from baichuan_omni_jax.audio.mel_training import SAME_RATE, same_moments
from baichuan_omni_jax.checkpoint import abstract_branches, find_checkpoint, load_branches, with_shardings
from baichuan_omni_jax.checkpoint.branches import VOCODER_CONFIG, branch_folder
from baichuan_omni_jax.config import MeshConfig, OmniConfig
from baichuan_omni_jax.config.mel_targets import MelTargetSpec, flow_target
from baichuan_omni_jax.config.vocoder import VocoderConfig, read_vocoder_config
from baichuan_omni_jax.errors import ConfigError
from baichuan_omni_jax.nn.param import ComputePolicy
from baichuan_omni_jax.sharding import make_mesh
from baichuan_omni_jax.vocoder.stft import griffin_lim
from baichuan_omni_jax.vocoder.streaming import HiftWindow, window_wave

# Colors from the least to the greatest value: black, violet, red, orange, pale yellow.
_COLORS = np.array([[0, 0, 4], [81, 18, 124], [183, 55, 121], [252, 137, 97], [252, 253, 191]])
_PIXELS = 3  # of a mel filter and of a frame
_GAP = 6
_FRAMES = 250  # mels are padded to a multiple of it, so that few programs are compiled


class MelWaves:
    """Makes waveforms of mels at `target`, on this host's first device; `name` is `hift` or `griffin_lim`.

    `vocoder` is a checkpoint with the branch `vocoder` (see `check_vocoder`); empty: Griffin-Lim.
    """

    def __init__(self, target: MelTargetSpec, omni: OmniConfig, vocoder: str = "") -> None:
        self.name = "hift" if vocoder else "griffin_lim"
        self._target, self._mesh = target, make_mesh(MeshConfig(), jax.local_devices()[:1])
        if vocoder:
            self._load(vocoder, omni)

    def __call__(self, mel: Float[np.ndarray, "s mels"]) -> Float32[np.ndarray, " t"]:
        """`target.hop` samples for each frame, in ±1. Silence for a mel that is not finite."""
        if not np.isfinite(mel).all():
            return np.zeros(len(mel) * self._target.hop, np.float32)
        # Griffin-Lim takes any length.
        if self.name == "griffin_lim" or not len(mel):
            return griffin_lim(mel, self._target)
        with jax.set_mesh(self._mesh):
            # HiFT as one window, padded: a new length would compile again.
            frames = -(-len(mel) // _FRAMES) * _FRAMES
            return np.clip(HiftWindow(self._run, self._sizes, frames)(mel.astype(np.float32), 0, True), -1, 1)

    def _load(self, vocoder: str, omni: OmniConfig) -> None:
        home, self._sizes = check_vocoder(vocoder, omni)
        with jax.set_mesh(self._mesh):
            # One device, fp32: the vocoder is small, and other devices are at work on the run.
            compute = ComputePolicy()
            abstract = abstract_branches(omni, self._sizes, only=["vocoder"], compute=compute)["vocoder"]
            placed = with_shardings(abstract, self._mesh, compute.rules, name="vocoder")
            model = load_branches(f"vocoder={home}", {"vocoder": placed})["vocoder"]
            key = jax.device_put(jax.random.key(0), NamedSharding(self._mesh, P()))
            self._run = partial(jax.jit(window_wave), model, key)


def check_vocoder(vocoder: str, omni: OmniConfig) -> tuple[Path, VocoderConfig]:
    """The checkpoint and the sizes of its vocoder. Raises ConfigError when it has none, or one for other mels."""
    home = Path(find_checkpoint(vocoder))
    if not (home / branch_folder("vocoder")).exists() or not (home / VOCODER_CONFIG).exists():
        raise ConfigError(f"eval.vocoder {vocoder} has no branch vocoder with its {VOCODER_CONFIG}")
    # A vocoder of other mels would make noise of them.
    sizes, target = read_vocoder_config(home / VOCODER_CONFIG), flow_target(omni.flow)
    reads = sizes.sampling_rate, sizes.in_channels, sizes.hop_length
    makes = target.rate, target.mels, target.hop
    if reads != makes:
        raise ConfigError(f"eval.vocoder {vocoder} reads (rate, mels, hop) {reads}, the model makes {makes}")
    return home, sizes


def mel_image(
    mels: Sequence[Float[np.ndarray, "_ mels"]], ratios: Sequence[Fraction] = ()
) -> UInt8[np.ndarray, "h w 3"]:
    """Log mels (frames, mels) one above the other, on one scale of colors: time to the right, low filters below.

    `ratios` (default: 1 each) are frames of each mel for a frame of the first, at whose moments the others are drawn.
    Where one has ended, and where a value is not finite, the least is drawn.
    """
    # All mels at the moments of the first one's frames.
    width, ratios = max(len(mels[0]), 1), ratios or [SAME_RATE] * len(mels)
    drawn = [_at_moments(mel, same_moments(width, ratio)) for mel, ratio in zip(mels, ratios, strict=True)]
    # One scale for all panels, by what is finite.
    values = np.concatenate([mel.ravel() for mel in drawn])
    finite = values[np.isfinite(values)]
    low, high = (finite.min(), finite.max()) if len(finite) else (0.0, 1.0)
    panels = []
    # Panels one above the other, low filters at the bottom.
    for mel in drawn:
        share = np.nan_to_num((mel - low) / max(high - low, 1e-9), nan=0.0, posinf=0.0, neginf=0.0)
        panel = _colored(share.T[::-1]).repeat(_PIXELS, 0).repeat(_PIXELS, 1)
        panels += [panel, np.full((_GAP, panel.shape[1], 3), 255, np.uint8)]
    return np.concatenate(panels[:-1])


def _at_moments(mel: np.ndarray, frames: np.ndarray) -> np.ndarray:
    """The given frames of a mel, NaN where it has ended."""
    ended = np.full((max(frames[-1] + 1 - len(mel), 0), mel.shape[1]), np.nan)
    return np.concatenate([mel, ended])[frames]


def _colored(share: np.ndarray) -> UInt8[np.ndarray, "h w 3"]:
    """Colors of values in [0, 1]."""
    at = np.linspace(0, 1, len(_COLORS))
    return np.stack([np.interp(share, at, channel) for channel in _COLORS.T], -1).astype(np.uint8)
