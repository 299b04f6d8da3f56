"""What a packed row costs: FLOPs of a forward pass over it, from lengths and the architecture alone.

Counted as `baichuan_omni_jax.flops.omni` does, but for the logits, of which the index does not know how many the loss
reads: 2 FLOPs a multiply-add, padding free, attention by what each document or picture sees. The backward pass costs
a multiple that hardly differs between rows. Integers, so that all hosts order rows alike.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Protocol, runtime_checkable

from baichuan_omni_jax.config import Budgets, OmniConfig

_TOKENS, _PATCHES, _TARGETS = (
    [field.name for field in fields(Budgets)].index(name) for name in ("tokens", "patches", "audio_targets")
)


@runtime_checkable
class DocumentLengths(Protocol):
    """A document of a row: what it takes of each budget (in the order of `Budgets`), the patches of its images."""

    @property
    def lengths(self) -> Sequence[int]: ...

    @property
    def image_patches(self) -> Sequence[int]: ...


@dataclass(frozen=True)
class RowCost:
    """FLOPs by what is counted: `token` and `pair` of the language model, the like of the vision tower with its
    projector, and `audio_target`, a frame that the depth transformer predicts.
    """

    token: int
    pair: int
    patch: int
    patch_pair: int
    audio_target: int

    def __call__(self, row: Sequence[DocumentLengths]) -> int:
        """FLOPs of a row of these documents."""
        return sum(map(self.document_cost, row))

    def document_cost(self, item: DocumentLengths) -> int:
        """FLOPs of one document: n tokens see n (n + 1) / 2 pairs, a picture of p patches p^2."""
        tokens = item.lengths[_TOKENS]
        flops = tokens * self.token + tokens * (tokens + 1) // 2 * self.pair
        flops += item.lengths[_TARGETS] * self.audio_target
        flops += item.lengths[_PATCHES] * self.patch + self.patch_pair * sum(size * size for size in item.image_patches)
        return flops


def row_cost(omni: OmniConfig) -> RowCost:
    """The costs of this architecture."""
    llm, vision = omni.llm, omni.vision
    wide, narrow = llm.num_heads * llm.head_dim, llm.num_kv_heads * llm.head_dim
    layer = llm.hidden_size * (2 * wide + 2 * narrow + 3 * llm.intermediate_size)
    d, merged = vision.embed_dim, vision.merged_patches
    tower = vision.depth * (4 * d * d + 2 * d * d * vision.mlp_ratio)
    projector = merged * d * (merged * d + vision.out_dim)
    return RowCost(
        token=2 * llm.num_layers * layer,
        pair=2 * llm.num_layers * 2 * wide,
        patch=2 * (vision.patch_values * d + tower + projector // merged),
        patch_pair=2 * vision.depth * 2 * d,
        audio_target=2 * _depth(omni),
    )


def _depth(omni: OmniConfig) -> int:
    """Multiply-adds of the depth transformer and its heads a frame: a sequence of one position a level."""
    d, sizes, layers = omni.llm.hidden_size, omni.audio.codebook_sizes, omni.audio_head.num_layers
    levels = len(sizes)
    positions = levels * (4 * d * d + 2 * 2 * d * d)
    pairs = levels * (levels + 1) // 2 * 2 * d
    return layers * (positions + pairs) + sum(d * (size + 1) for size in sizes)
