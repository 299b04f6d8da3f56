"""What makes a mel audible while a model trains: HiFT from a checkpoint, where one is given, else Griffin-Lim."""

from functools import partial
from pathlib import Path

import jax
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Float, Float32

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

_FRAMES = 250  # mels are padded to a multiple of it, so that few programs are compiled


class MelWaves:
    """Waveforms of mels at `settings`, on this host's first device; `name` is `hift` or `griffin_lim`.

    `vocoder` is a checkpoint with the branch `vocoder` (see `check_vocoder`); empty: Griffin-Lim.
    """

    def __init__(self, settings: MelTargetSpec, omni: OmniConfig, vocoder: str = "") -> None:
        self.name = "hift" if vocoder else "griffin_lim"
        self._settings, self._mesh = settings, make_mesh(MeshConfig(), jax.local_devices()[:1])
        if vocoder:
            self._load(vocoder, omni)

    def __call__(self, mel: Float[np.ndarray, "s mels"]) -> Float32[np.ndarray, " t"]:
        """`settings.hop` samples for each frame, in ±1. Silence for a mel that is not finite."""
        if not np.isfinite(mel).all():
            return np.zeros(len(mel) * self._settings.hop, np.float32)
        if self.name == "griffin_lim" or not len(mel):
            return griffin_lim(mel, self._settings)
        with jax.set_mesh(self._mesh):
            frames = -(-len(mel) // _FRAMES) * _FRAMES
            return np.clip(HiftWindow(self._run, self._sizes, frames)(mel.astype(np.float32), 0, True), -1, 1)

    def _load(self, vocoder: str, omni: OmniConfig) -> None:
        home, self._sizes = check_vocoder(vocoder, omni)
        with jax.set_mesh(self._mesh):
            compute = ComputePolicy()
            abstract = abstract_branches(omni, self._sizes, only=["vocoder"], compute=compute)["vocoder"]
            placed = with_shardings(abstract, self._mesh, compute.rules, name="vocoder")
            model = load_branches(f"vocoder={home}", {"vocoder": placed})["vocoder"]
            key = jax.device_put(jax.random.key(0), jax.sharding.NamedSharding(self._mesh, P()))
            self._run = partial(jax.jit(window_wave), model, key)


def check_vocoder(vocoder: str, omni: OmniConfig) -> tuple[Path, VocoderConfig]:
    """The checkpoint and the sizes of its vocoder. Raises ConfigError when it has none, or one for other mels."""
    home = Path(find_checkpoint(vocoder))
    if not (home / branch_folder("vocoder")).exists() or not (home / VOCODER_CONFIG).exists():
        raise ConfigError(f"eval.vocoder {vocoder} has no branch vocoder with its {VOCODER_CONFIG}")
    sizes, target = read_vocoder_config(home / VOCODER_CONFIG), flow_target(omni.flow)
    reads = sizes.sampling_rate, sizes.in_channels, sizes.hop_length
    makes = target.rate, target.mels, target.hop
    if reads != makes:
        raise ConfigError(f"eval.vocoder {vocoder} reads (rate, mels, hop) {reads}, the model makes {makes}")
    return home, sizes
