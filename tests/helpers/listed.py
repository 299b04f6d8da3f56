"""Sources that are lists of lengths, and plans over them: what is planned without a file."""

from data_pipelines.packing.mixture import Mixture
from data_pipelines.packing.packer import Packer, RowPlan
from data_pipelines.packing.row_limits import DocumentLengths, PatchLayout


class Listed:
    """A source whose document i needs `needs[i]` and has `pictures[i]`; `gives` replaces what a document gives.

    `gives` maps a document to (needs, pictures) of its pieces, which are numbered after all documents.
    """

    def __init__(self, name, needs, pictures=None, gives=None):
        self.name, self.total = name, len(needs)
        pictures = pictures or [[] for _ in needs]
        gives = gives or {}
        known = [*zip(needs, pictures, strict=True), *(piece for pieces in gives.values() for piece in pieces)]
        self._known = [DocumentLengths(n, tuple(map(int, need)), list(sizes)) for n, (need, sizes) in enumerate(known)]
        self._gives, first = {}, self.total
        for number, pieces in gives.items():
            self._gives[number] = range(first, first + len(pieces))
            first += len(pieces)
        self.usable = self.total - len(gives) + sum(len(pieces) for pieces in gives.values())

    def expand(self, numbers):
        return [[self._known[one] for one in self._gives.get(n, [n])] for n in numbers.tolist()]

    def document_lengths(self, number):
        return self._known[number]

    def why_unusable(self):
        return "it is empty"


def stream(mixture, count=None):
    """The keys of the next `count` documents, or of all."""
    keys = []
    while (count is None or len(keys) < count) and (item := mixture.next()) is not None:
        keys.append(item.key)
    return keys


def row_plan(sources, budgets, *, layout=None, open_bins=3, look_ahead=5, seed=0, weights=None, **options):
    """The rows of sources with equal weights, or `weights`."""
    mixture = Mixture(sources, weights or [1] * len(sources), seed, **options)
    layout = layout or PatchLayout(budgets[1] if len(budgets) > 1 else 0)
    return RowPlan(mixture, Packer(budgets, layout, open_bins, look_ahead))
