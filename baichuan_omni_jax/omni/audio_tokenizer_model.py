"""The audio tokenizer with the two heads that teach it: codes back to mel, and speech to a frozen language model.

Trained as in arXiv:2502.17239, section 3.1: reconstruction of mels, and transcripts by a language model of which only
the adapter learns. A packed batch with mel slots (docs/reference/batch.md) in; per clip the quantized features, the
decoded mel, and per row the language model's hidden states, where the slots of audio hold quantized features instead of
token embeddings.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int32, PRNGKeyArray

from baichuan_omni_jax.audio.decoder import AudioDecoder, DecodedAudio
from baichuan_omni_jax.audio.encoder import AudioEncoderBranch
from baichuan_omni_jax.audio.mel_training import MelTarget
from baichuan_omni_jax.audio.quantizer_training import CodebookState, Quantized, quantize_in_training
from baichuan_omni_jax.branches import AUDIO_TOKENIZER_BRANCHES, build_branch
from baichuan_omni_jax.config import OmniConfig
from baichuan_omni_jax.config.audio import QuantizerConfig
from baichuan_omni_jax.llm.model import LanguageModel
from baichuan_omni_jax.nn.layers import RMSNorm
from baichuan_omni_jax.nn.linear import Linear
from baichuan_omni_jax.nn.param import CLIPS, ComputePolicy, split_as
from baichuan_omni_jax.omni.batch import Batch
from baichuan_omni_jax.omni.merge import merge_media


class Clips(NamedTuple):
    """The mel slots of a batch's rows as clips, c = b x m: `lengths` are 0 for unused slots."""

    mel: Float[Array, "c f mels"]
    lengths: Int32[Array, " c"]


class TranscriptAdapter(nnx.Module):
    """Quantized features (code_dim) into the language model's stream: RMSNorm, then a linear map. Only for training."""

    def __init__(self, key: PRNGKeyArray, width_in: int, width: int, eps: float, compute: ComputePolicy):
        self.norm = RMSNorm(width_in, eps=eps, compute=compute)
        self.proj = Linear(
            key, "cgf,fd->cgd", (width_in, width), ("small", "embed"), out=(CLIPS, None, None), compute=compute
        )

    def __call__(self, features: Float[Array, "c g f"]) -> Float[Array, "c g d"]:
        return self.proj(self.norm(features))


class AudioTokenizerModel(nnx.Module):
    """`audio_encoder`, `audio_decoder` and, with `with_llm`, the frozen `llm` behind a `transcript_adapter`."""

    audio_encoder: AudioEncoderBranch
    audio_decoder: AudioDecoder
    transcript_adapter: TranscriptAdapter
    llm: LanguageModel

    def __init__(self, key: PRNGKeyArray, cfg: OmniConfig, compute: ComputePolicy, with_llm: bool = True):
        keys = jax.random.split(key, 4)
        # The optional branches come last in the list, so that the keys of the others do not depend on them.
        self.branches = AUDIO_TOKENIZER_BRANCHES if with_llm else AUDIO_TOKENIZER_BRANCHES[:2]
        for name, own in zip(self.branches, keys, strict=False):
            setattr(self, name, build_branch(name, own, cfg, compute))
        self.compute = compute

    def quantize(
        self,
        key: PRNGKeyArray,
        clips: Clips,
        states: Sequence[CodebookState],
        step: Int32[Array, ""],
        config: QuantizerConfig,
    ) -> tuple[Quantized, Bool[Array, "c g"]]:
        """Quantizes the clips' features as in training.

        Args:
            key: of the noise that picks codes.
            clips: mel slots, each a window or a crop of a clip.
            states: of each level's codebook.
            step: of the run, on which the share of quantized frames depends.
            config: how it quantizes.

        Returns:
            The features, quantized, with their losses and codes; and which frames are valid.
        """
        features, valid = self.audio_encoder.features(clips.mel, clips.lengths)
        return quantize_in_training(key, features, valid, states, step, config, self.compute), valid

    def decode(self, features: Float[Array, "c g f"], valid: Bool[Array, "c g"]) -> DecodedAudio:
        """Decodes quantized features to a coarse and a refined mel."""
        return self.audio_decoder(features, valid.sum(-1, dtype=jnp.int32))

    def transcript_states(
        self, features: Float[Array, "c g f"], valid: Bool[Array, "c g"], batch: Batch
    ) -> Float[Array, "b t d"]:
        """Computes the language model's hidden states over the rows, the clips' features in their slots."""
        # The row as tokens alone: slots of audio hold the pad's embedding until the merge replaces it.
        x, rules = self.llm.embed(batch["tokens"]), self.compute.rules
        slots = feature_slots(valid, batch, self.compute)
        media = self.transcript_adapter(features)
        # Clips back into rows (c = b x m): both are split by rows alone, so nothing moves between devices.
        media = media.reshape(*slots.shape, -1, out_sharding=rules.spec(CLIPS, None, None))
        # The merge takes media split over the media axes, as the full model's vision and audio come.
        parts = [(split_as(media, self.compute, CLIPS, "media"), split_as(slots, self.compute, CLIPS, "media"))]
        with jax.named_scope("transcript_llm"):
            return self.llm(merge_media(x, parts, rules), batch["positions"], batch["segment_ids"])


def mel_targets_of(batch: Batch, names: Sequence[str], compute: ComputePolicy) -> list[MelTarget]:
    """Returns the batch's targets of these names, clip by clip as `clips_of`."""
    targets = []
    for name in names:
        mel, lengths = (split_as(batch[f"target_{name}{end}"], compute, CLIPS) for end in ("", "_lengths"))
        targets.append(MelTarget(*_side_by_side(mel, lengths, compute)))
    return targets


def clips_of(batch: Batch, compute: ComputePolicy) -> Clips:
    """Returns the batch's mel slots side by side, split over the batch axes with their rows."""
    mel, lengths = split_as(batch["mel"], compute, CLIPS), split_as(batch["mel_lengths"], compute, CLIPS)
    return Clips(*_side_by_side(mel, lengths, compute))


def _side_by_side(x: Array, lengths: Array, compute: ComputePolicy) -> tuple[Array, Array]:
    """Slots (b, m, ...) of rows as items (b m, ...), each on the device of its row."""
    count, rules = lengths.shape[0] * lengths.shape[1], compute.rules
    x = x.reshape(count, *x.shape[2:], out_sharding=rules.spec(CLIPS, None, None))
    return x, lengths.reshape(count, out_sharding=rules.spec(CLIPS))


def feature_slots(valid: Bool[Array, "c g"], batch: Batch, compute: ComputePolicy) -> Int32[Array, "b n"]:
    """Finds the row's slot of every frame of its clips (n = clips a row x g), t where a frame is not valid.

    `mel_audio` says which of the row's audio places a clip's first frame has, `audio_index` that place's slot.
    """
    first, index = (split_as(batch[name], compute, CLIPS) for name in ("mel_audio", "audio_index"))
    unused, (rows, clips) = batch["tokens"].shape[1], first.shape
    spec = compute.rules.spec(CLIPS, None)
    # A clip's frames fill consecutive places; a place beyond the row's gives t, which the merge drops.
    places = (first[..., None] + jnp.arange(valid.shape[1], dtype=jnp.int32)).reshape(rows, -1, out_sharding=spec)
    pick = lambda row, places: row.at[places].get(mode="fill", fill_value=unused)  # noqa: E731
    found = jax.vmap(pick)(index, places)
    return jnp.where(valid.reshape(rows, clips * valid.shape[1], out_sharding=spec), found, unused)
