"""The mels that decoders learn to make: natural logs of magnitudes at a rate, window and hop.

Reconstruction has two scales at 16 kHz; flow matching and vocoder one at 24 kHz, whose windows are four hops.
"""

from dataclasses import dataclass
from fractions import Fraction

from baichuan_omni_jax.config.architecture import FlowConfig, PostNetConfig
from baichuan_omni_jax.config.model import OmniConfig
from baichuan_omni_jax.config.run import RunConfig

HIGHEST = 8000.0  # Hz, of the highest filter


@dataclass(frozen=True)
class MelTargetSpec:
    """What a mel is: its filters are Slaney's, from 0 to 8 kHz."""

    rate: int  # Hz
    n_fft: int  # samples of a window
    hop: int  # samples between windows
    mels: int  # filters
    floor: float  # the least magnitude, below which the logarithm does not go

    def frames(self, samples: int) -> int:
        """Returns the frames of a clip of `samples` at the mel's rate."""
        return samples // self.hop

    @property
    def frame_rate(self) -> Fraction:
        """Returns the frames a second."""
        return Fraction(self.rate, self.hop)


def run_mel_targets(run: RunConfig, omni: OmniConfig) -> dict[str, MelTargetSpec]:
    """Returns what a run's batches hold beside mel slots, by name: `scale_0`, `scale_1`, … or `flow`."""
    if run.task == "audio_tokenizer":
        return reconstruction_targets(run.tokenizer.mel_scales, omni.post_net)
    return {"flow": flow_target(omni.flow)} if run.task == "flow_matching" else {}


def reconstruction_targets(scales: tuple[tuple[int, int], ...], post_net: PostNetConfig) -> dict[str, MelTargetSpec]:
    """Returns what the audio decoder learns to make, at every (n_fft, hop)."""
    rate, mels = post_net.sampling_rate, post_net.num_mel_bins
    return {f"scale_{i}": MelTargetSpec(rate, n_fft, hop, mels, 1e-6) for i, (n_fft, hop) in enumerate(scales)}


def reconstruction_ratios(scales: tuple[tuple[int, int], ...], post_net: PostNetConfig) -> tuple[Fraction, ...]:
    """Returns how many decoded frames there are for each frame of the target, at every (n_fft, hop)."""
    made = decoded_target(post_net).frame_rate
    return tuple(made / target.frame_rate for target in reconstruction_targets(scales, post_net).values())


def decoded_target(post_net: PostNetConfig) -> MelTargetSpec:
    """Returns what the audio decoder's refined mel is by itself: the post-net's own window and hop."""
    return reconstruction_targets(((post_net.n_fft, post_net.hop_length),), post_net)["scale_0"]


def flow_target(flow: FlowConfig) -> MelTargetSpec:
    """Returns what the flow-matching decoder makes and the vocoder reads: windows of four hops."""
    return MelTargetSpec(flow.sampling_rate, 4 * flow.hop_length, flow.hop_length, flow.in_channels, 1e-5)
