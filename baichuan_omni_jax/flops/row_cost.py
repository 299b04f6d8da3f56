"""What a packed row costs: FLOPs of a forward pass over it, from lengths and the architecture alone.

Counted by the formulas of `terms`, but for the logits, of which the index does not know how many the loss reads. The
backward pass costs a multiple that hardly differs between rows. Integers, so that all hosts order rows alike.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from fractions import Fraction
from typing import Protocol, runtime_checkable

from baichuan_omni_jax.config import Budgets, OmniConfig
from baichuan_omni_jax.flops.terms import forward_flops, omni_terms

_BUDGETED = [field.name for field in fields(Budgets)]
_TOKENS, _PATCHES, _TARGETS = (_BUDGETED.index(name) for name in ("tokens", "patches", "audio_targets"))


@runtime_checkable
class DocumentLengths(Protocol):
    """A document as rows are planned with it: what it takes of each budget, in the order of `Budgets`' fields, and the
    patches of each of its images.
    """

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
        """Sums the FLOPs of a row of these documents."""
        return sum(map(self.document_cost, row))

    def document_cost(self, document: DocumentLengths) -> int:
        """Counts the FLOPs of one document: n tokens see n (n + 1) / 2 pairs, an image of p patches p^2."""
        tokens, patches = document.lengths[_TOKENS], document.lengths[_PATCHES]
        # Linear in tokens, patches and frames; quadratic in a document's tokens and an image's patches.
        flops = tokens * self.token + tokens * (tokens + 1) // 2 * self.pair
        flops += document.lengths[_TARGETS] * self.audio_target
        return flops + patches * self.patch + self.patch_pair * sum(size * size for size in document.image_patches)


def row_cost(omni: OmniConfig) -> RowCost:
    """Makes the costs of this architecture.

    >>> from baichuan_omni_jax.config import baichuan_omni_7b
    >>> cost = row_cost(baichuan_omni_7b())
    >>> cost.token // 10**9, cost.patch // 10**9  # GFLOPs of a token's products, of a patch's
    (13, 1)
    """
    # Exact fractions, then whole numbers: sums of integers are alike on every host.
    per_item = forward_flops(omni_terms(omni))
    whole = {name: _integer(flops) for name, flops in per_item.items()}
    return RowCost(
        token=whole["tokens"],
        pair=whole["causal_pairs"],
        patch=whole["patches"],
        patch_pair=whole["patch_pairs"],
        audio_target=whole["audio_targets"],
    )


def _integer(flops: Fraction) -> int:
    """Rounds down, should a width not divide: the order of rows needs no more."""
    return int(flops)
