"""Which share of the loss each source of a mixture has, predicted from what its documents hold.

The loss of a step is text + `audio_loss_weight` x s x audio, each a mean by weights, with s = `audio_scale`. So a
source that has the shares p of all text weights and q of all audio weights has of the loss

    (p + audio_loss_weight x s x q) / (1 + audio_loss_weight x s)

In training `omni_loss` measures the same in every step. Audio is predicted by its first level; levels above it differ
by the end frames alone.
"""

from collections.abc import Sequence
from typing import NamedTuple

from rich.table import Table

from baichuan_omni_jax.config.run import TrainConfig

# A document's weight in a modality is the number of its targets there, to the power of 1 - this.
POWERS = {"token": 0.0, "sqrt": 0.5, "document": 1.0}


class SourceMeans(NamedTuple):
    """A source, and what one of its documents has on average."""

    name: str
    weight: float  # in the mixture
    tokens: float
    trainable: float  # text targets and audio frames to predict
    text: float  # loss weights of its text targets, after `document_weighting` and `loss_weight`
    audio: float  # the same of its audio frames


class LossShare(NamedTuple):
    """A source's shares."""

    name: str
    documents: float  # of all documents
    text: float  # of the loss weights of all text
    audio: float  # of those of all audio
    loss: float  # of the loss


def audio_scale(text: float, audio: float, full_ratio: float) -> float:
    """Returns what the audio loss is multiplied by in a step with these sums of weights."""
    return min(1.0, audio / (full_ratio * text)) if full_ratio * text else 1.0


def predict_shares(sources: Sequence[SourceMeans], weights_by: str, train: TrainConfig) -> list[LossShare]:
    """Predicts the shares that a mixture's steps have on average."""
    # Documents of each source drawn for one unit of what the mixture weighs by, then their loss weights.
    sizes = [{"documents": 1.0, "tokens": each.tokens, "trainable": each.trainable}[weights_by] for each in sources]
    rates = [each.weight / size for each, size in zip(sources, sizes, strict=True)]
    text = [rate * each.text for rate, each in zip(rates, sources, strict=True)]
    audio = [rate * each.audio for rate, each in zip(rates, sources, strict=True)]
    scale = train.audio_loss_weight * audio_scale(sum(text), sum(audio), train.audio_full_ratio)
    scale *= sum(train.audio_level_weights) if train.audio_level_weights else 1.0
    parts = [_shares(rates), _shares(text), _shares(audio)]
    loss = _shares([p + scale * q for p, q in zip(*parts[1:], strict=True)])
    return [LossShare(each.name, *shares) for each, *shares in zip(sources, *parts, loss, strict=True)]


def _shares(values: Sequence[float]) -> list[float]:
    whole = sum(values)
    return [value / whole if whole else 0.0 for value in values]


def shares_table(shares: Sequence[LossShare], title: str) -> Table:
    """Makes a table of shares in percent, a source a line."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("source")
    for column in ("documents", "text loss", "audio loss", "loss"):
        table.add_column(column, justify="right")
    for share in shares:
        table.add_row(share.name, *(f"{100 * value:.1f} %" for value in share[1:]))
    return table
