"""Model FLOPs of a training step and of a packed row, and what a chip can do of them a second. Needs no jax.

Counted is what the mathematics needs of what a batch really holds.

A matrix product of m multiply-adds is 2 m FLOPs; norms, activations, softmax, rotary angles and table look-ups are left
out. Padding costs nothing, attention costs what each document or image sees, and logits are counted where the loss
reads them. The backward pass adds 2 m for each trainable weight, 2 m where a gradient passes through to something
trainable before it (a stack of layers is taken as one: if any of it trains, gradients pass through all of it), and
8 h instead of 4 h FLOPs a pair of attention. Recomputation is not counted: this is what MFU divides by.

`RowCost` plans rows by the forward pass's formulas, but for the logits, of which the index does not know how many the
loss reads. The backward pass costs a multiple that hardly differs between rows. Integers, so that all hosts order rows
alike.

    document of 3 tokens: 3 tokens, 1 + 2 + 3 = 6 causal pairs; image of 4 patches: 4 patches, 16 pairs
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from fractions import Fraction
from typing import NamedTuple, Protocol, runtime_checkable

from baichuan_omni_jax.branches import BRANCHES
from baichuan_omni_jax.config import Budgets, OmniConfig


class FlopTerm(NamedTuple):
    """Matrix products that work on the same items.

    `weights`: multiply-adds an item of `items` (a count, times `per_item`), by the weight's path; `attention`:
    multiply-adds a pair of `pairs`. `upstream`: path prefixes of what lies before it in the forward pass, itself
    included: where any of that trains, gradients pass through these products.
    """

    branch: str
    name: str
    upstream: tuple[str, ...]
    items: str
    weights: dict[str, int]
    per_item: Fraction = Fraction(1)
    pairs: str = ""
    attention: int = 0


def flops_by_branch(
    terms: Iterable[FlopTerm], counts: Mapping[str, int | float], trainable: Collection[str]
) -> dict[str, float]:
    """Sums a step's FLOPs by the terms' branches: of a language-model step `vision` (tower, projector), `llm` and
    `audio` (depth transformer, its heads).

    `terms` and `counts` (of the whole global batch) are the task's; `trainable` names the parameters that train
    (`StepSpec.groups.trainable`); empty counts a forward pass alone.
    """
    total: dict[str, float] = {}
    for term, linear, attention in _flops(terms, counts, trainable):
        total[term.branch] = total.get(term.branch, 0.0) + linear + attention
    return total


def flops_by_term(
    terms: Iterable[FlopTerm], counts: Mapping[str, int | float], trainable: Collection[str]
) -> dict[str, float]:
    """Sums as `flops_by_branch`, split further: `llm layers linear`, `llm layers attention`, `llm logits`, ..."""
    found: dict[str, float] = {}
    for term, linear, attention in _flops(terms, counts, trainable):
        name = f"{term.branch} {term.name}"
        of_term = {f"{name} linear": linear, f"{name} attention": attention} if term.pairs else {name: linear}
        found |= {key: found.get(key, 0.0) + value for key, value in of_term.items()}
    return found


def forward_flops(terms: Iterable[FlopTerm]) -> dict[str, Fraction]:
    """Sums a forward pass's FLOPs for each item that is counted: `tokens`, `causal_pairs`, `patches`, ..."""
    found: dict[str, Fraction] = defaultdict(Fraction)
    for term in terms:
        found[term.items] += 2 * sum(term.weights.values()) * term.per_item
        if term.pairs:
            found[term.pairs] += 2 * term.attention
    return found


def _flops(
    terms: Iterable[FlopTerm], counts: Mapping[str, int | float], trainable: Collection[str]
) -> Iterator[tuple[FlopTerm, float, float]]:
    """Each term with the FLOPs of its weights and those of its attention."""
    for term in terms:
        # Forward, and backward as far as anything learns from it: through the product, and for the weight itself.
        passes = any(name.startswith(term.upstream) for name in trainable)
        products = sum(size * (1 + passes + (name in trainable)) for name, size in term.weights.items())
        linear = float(2 * products * term.per_item) * counts[term.items]
        attention = 2.0 * term.attention * (1 + 2 * passes) * counts[term.pairs] if term.pairs else 0.0
        yield term, linear, attention


def omni_terms(omni: OmniConfig) -> tuple[FlopTerm, ...]:
    """Lists every matrix product of a language-model step, in the order in which data flows."""
    return (*_vision(omni), *language_terms(omni), *_audio(omni))


def _vision(omni: OmniConfig) -> tuple[FlopTerm, ...]:
    cfg, g = omni.vision, omni.vision.merged_patches
    d, f = cfg.embed_dim, cfg.embed_dim * cfg.mlp_ratio
    # Widths: d of the tower, f of its MLP; g patches become one visual token.
    tower, projector = BRANCHES["vision"].path("tower"), BRANCHES["vision"].path("projector")
    attention = {f"attention.{x}_proj.weight": d * d for x in "qkvo"}
    layer = attention | {"mlp.fc1.weight": d * f, "mlp.fc2.weight": f * d}
    norm, fc1 = f"{projector}norm.", f"{projector}fc1."
    return (
        # Nothing trains before the pixels: the patch embedding gets no gradient to pass on.
        FlopTerm("vision", "patches", (), "patches", {f"{tower}patch_embedding.kernel": cfg.patch_values * d}),
        FlopTerm(
            "vision",
            "tower",
            # A stack of layers is one term: as soon as any of it trains, gradients pass all of it.
            (tower,),
            "patches",
            {f"{tower}layers.{name}": cfg.depth * size for name, size in layer.items()},
            pairs="patch_pairs",
            attention=cfg.depth * 2 * d,
        ),
        FlopTerm(
            "vision", "projector in", (tower, norm), "patches", {f"{fc1}weight": (g * d) ** 2}, per_item=Fraction(1, g)
        ),
        FlopTerm(
            "vision",
            "projector out",
            (tower, norm, fc1),
            "patches",
            {f"{projector}fc2.weight": g * d * cfg.out_dim},
            per_item=Fraction(1, g),
        ),
    )


# What writes into the language model's stream, and the stream up to its last norm.
_LLM = BRANCHES["llm"]
_MEDIA = tuple(branch.path() + branch.stream for branch in BRANCHES.values() if branch.stream is not None)
_STREAM = (*_MEDIA, "llm.embedding", _LLM.path("layers"))
_HIDDEN = (*_STREAM, _LLM.path("norm"))


def language_terms(omni: OmniConfig) -> tuple[FlopTerm, ...]:
    """Lists the language model's layers and logits."""
    cfg = omni.llm
    # Grouped-query attention: keys and values have fewer heads, scores and their use have all.
    d, wide, narrow = cfg.hidden_size, cfg.num_heads * cfg.head_dim, cfg.num_kv_heads * cfg.head_dim
    layer = {
        f"attention.{x}_proj.weight": d * size for x, size in zip("qkvo", (wide, narrow, narrow, wide), strict=True)
    }
    layer |= {f"mlp.{x}_proj.weight": d * cfg.intermediate_size for x in ("gate", "up", "down")}
    return (
        FlopTerm(
            "llm",
            "layers",
            _STREAM,
            "tokens",
            {f"{_LLM.path('layers')}{name}": cfg.num_layers * size for name, size in layer.items()},
            pairs="causal_pairs",
            # Scores and weighted values: two products of a query head's width for each pair.
            attention=cfg.num_layers * 2 * wide,
        ),
        FlopTerm("llm", "logits", _HIDDEN, "text_targets", {f"{_LLM.path()}head": d * cfg.vocab_size}),
    )


def _audio(omni: OmniConfig) -> tuple[FlopTerm, ...]:
    """Lists the depth transformer: a frame is a sequence of one position a level, with as many pairs for every frame.

    An end frame, of which the loss reads level 0 alone, counts as a whole one.
    """
    d, sizes, layers = omni.llm.hidden_size, omni.audio.codebook_sizes, omni.audio_head.num_layers
    # Each of a frame's levels is a position; position q sees q + 1 of them.
    levels = len(sizes)
    layer = {f"attention.{x}_proj.weight": d * d for x in "qkvo"}
    layer |= {f"linear{i}.weight": 2 * d * d for i in (1, 2)}
    head = BRANCHES["audio_head"].path("head")
    return (
        FlopTerm(
            "audio",
            "depth",
            (*_HIDDEN, f"{head}layers."),
            "audio_targets",
            {f"{head}layers.{name}": layers * levels * size for name, size in layer.items()},
            pairs="audio_targets",
            # Pairs of levels are the same for every frame, so they stand in the term and frames are counted.
            attention=layers * (levels * (levels + 1) // 2) * 2 * d,
        ),
        FlopTerm(
            "audio",
            "logits",
            (*_HIDDEN, f"{head}layers.", f"{head}norm."),
            "audio_targets",
            {f"{head}heads.{q}.weight": d * (size + 1) for q, size in enumerate(sizes)},
        ),
    )


# What a chip can do at most: matrix FLOP/s in bfloat16 and bytes of memory, of one JAX device (of a TPU7x chip that is
# one of its two chiplets), dense, without sparsity. FLOP/s, rates and GPU memory are the makers'
# (docs.cloud.google.com/tpu/docs/v4, v5e, v5p, v6e, tpu7x; NVIDIA's data sheets of A100, H100 and H200). TPU memory is
# what a program may use of it, as libtpu 0.0.52 says when it refuses one, to 0.01 GiB. What links send is half of what
# the makers call bidirectional (v5e 400, v5p 1200, v6e 800, TPU7x 1200 GB/s a chip); of v4, whose page has none, six
# links of 50 GB/s (arXiv:2304.01433). Kinds are JAX's `device_kind`.
GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """`name` as in a topology, `flops` bfloat16 FLOP/s, `hbm_bytes` of memory, `hbm_rate` bytes a second to and from
    it, `link_rate` bytes a second that its links to other chips send together; all of one JAX device.
    """

    name: str
    flops: float
    hbm_bytes: int
    hbm_rate: float
    link_rate: float


TPUS = {
    "TPU v4": Chip("v4", 275e12, int(30.75 * GIB), 1.2e12, 3e11),
    "TPU v5 lite": Chip("v5e", 197e12, int(15.75 * GIB), 8.19e11, 2e11),
    "TPU v5": Chip("v5p", 459e12, int(95.73 * GIB), 2.765e12, 6e11),
    "TPU v6 lite": Chip("v6e", 918e12, int(31.24 * GIB), 1.638e12, 4e11),
    "TPU7x": Chip("tpu7x", 2307e12 / 2, int(94.74 * GIB), 7.38e12 / 2, 3e11),
}
# Their kinds carry form factor and memory behind the name: the longest name that a kind starts with counts. Links are
# NVLink, of cards without it PCIe.
GPUS = {
    "NVIDIA A100": Chip("A100", 312e12, 80 * GIB, 2.039e12, 3e11),
    "NVIDIA A100 80GB PCIe": Chip("A100 80GB PCIe", 312e12, 80 * GIB, 1.935e12, 3.2e10),
    "NVIDIA A100-SXM4-40GB": Chip("A100 40GB", 312e12, 40 * GIB, 1.555e12, 3e11),
    "NVIDIA A100-PCIE-40GB": Chip("A100 40GB", 312e12, 40 * GIB, 1.555e12, 3.2e10),
    "NVIDIA H100": Chip("H100", 989e12, 80 * GIB, 3.35e12, 4.5e11),
    "NVIDIA H100 PCIe": Chip("H100 PCIe", 756e12, 80 * GIB, 2e12, 6.4e10),
    "NVIDIA H100 NVL": Chip("H100 NVL", 835e12, 94 * GIB, 3.9e12, 3e11),
    "NVIDIA H200": Chip("H200", 989e12, 141 * 10**9, 4.8e12, 4.5e11),
    "NVIDIA H200 NVL": Chip("H200 NVL", 835e12, 141 * 10**9, 4.8e12, 4.5e11),
}


def chip_of(device_kind: str) -> Chip | None:
    """Finds the chip that `jax.Device.device_kind` names; None for one that is not listed (a CPU).

    >>> chip_of("NVIDIA H100 80GB HBM3").name
    'H100'
    """
    # TPU kinds are exact.
    if device_kind in TPUS:
        return TPUS[device_kind]
    names = [name for name in GPUS if device_kind.startswith(name)]
    return GPUS[max(names, key=len)] if names else None


def peak_flops(device_kind: str) -> float | None:
    """Returns bfloat16 FLOP/s of one device; None for a kind that is not listed (a CPU)."""
    chip = chip_of(device_kind)
    return chip.flops if chip else None


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
    # Exact fractions, then whole numbers (rounded down, should a width not divide): sums of integers are alike on every
    # host, and the order of rows needs no more.
    per_item = forward_flops(omni_terms(omni))
    whole = {name: int(flops) for name, flops in per_item.items()}
    return RowCost(
        token=whole["tokens"],
        pair=whole["causal_pairs"],
        patch=whole["patches"],
        patch_pair=whole["patch_pairs"],
        audio_target=whole["audio_targets"],
    )
