"""The branches joined: media embeddings merged into the language model's row, audio predicted from its hidden states.

A packed batch (docs/batch.md) in, hidden states and audio logits out. Text logits are left to the caller: training
computes them in chunks inside the loss, generation for one position.
"""

import jax
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray, Shaped

from baichuan_omni_jax.config import OmniConfig
from baichuan_omni_jax.llm.audio_head import AudioHeadBranch
from baichuan_omni_jax.llm.model import LanguageModel
from baichuan_omni_jax.nn.param import Compute
from baichuan_omni_jax.omni.merge import merge_media, pick_slots
from baichuan_omni_jax.vision.model import VisionModel

BRANCHES = ("vision", "llm", "audio_head")

# Logical axes of every field of a packed batch.
_TOKEN, _MEDIA = ("batch", "length"), ("batch", "media")
BATCH_AXES = {
    **dict.fromkeys(
        ("tokens", "positions", "segment_ids", "document_ids", "source_ids", "text_targets", "text_weights"), _TOKEN
    ),
    **dict.fromkeys(("audio_codes", "audio_targets", "audio_weights", "patches", "patch_grid"), (*_MEDIA, None)),
    **dict.fromkeys(("audio_index", "audio_target_index", "patch_segments", "visual_index"), _MEDIA),
}

Batch = dict[str, Shaped[Array, "b ..."]]


class OmniModel(nnx.Module):
    """Vision, language model, audio embeddings and head: everything that a language-model step computes."""

    def __init__(self, key: PRNGKeyArray, cfg: OmniConfig, compute: Compute):
        keys = jax.random.split(key, len(BRANCHES))
        self.vision = VisionModel(keys[0], cfg.vision, compute)
        self.llm = LanguageModel(keys[1], cfg.llm, compute)
        self.audio_head = AudioHeadBranch(
            keys[2], cfg.audio_head, cfg.audio.codebook_sizes, cfg.llm.hidden_size, compute
        )
        self.compute = compute

    def embed(self, batch: Batch) -> Float[Array, "b t d"]:
        """Token embeddings with every pad slot replaced by its picture's or sound's embedding."""
        rules = self.compute.rules
        x = self.llm.embed(batch["tokens"])
        visual = self.vision(batch["patches"], batch["patch_grid"], batch["patch_segments"])
        x = merge_media(x, visual, batch["visual_index"], rules)
        with jax.named_scope("audio_embedding"):
            heard = self.audio_head.embed(batch["audio_codes"])
        return merge_media(x, heard, batch["audio_index"], rules)

    def __call__(self, batch: Batch) -> tuple[Float[Array, "b t d"], tuple[Float[Array, "b c _"], ...]]:
        """Hidden states after the final norm, and per level the logits (b, c, size + 1) of the audio to predict."""
        with jax.named_scope("llm"):
            hidden = self.llm(self.embed(batch), batch["positions"], batch["segment_ids"])
        with jax.named_scope("audio_head"):
            start = pick_slots(hidden, batch["audio_target_index"], self.compute.rules)
            return hidden, self.audio_head(start, batch["audio_targets"])


def branches_of(model: OmniModel) -> dict[str, nnx.Module]:
    """The model's branches under the names that checkpoints use."""
    return {name: getattr(model, name) for name in BRANCHES}
