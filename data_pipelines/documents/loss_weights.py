"""Where loss weights are made: what each position of a document must predict, and what that counts in the loss.

First 1 for every target and 0 elsewhere, from the document's layout (`text_targets`, `audio_targets`), then what the
document counts by `train.document_weighting` and its source's `loss_weight` (`weigh`). Weights are made where a
document is decoded, from that document alone, so they are the same whatever shares its row, step or host. A piece of a
document that was too long is a document of its own. The loss divides by the sum of the weights of the whole step.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from jaxtyping import Float32, Int32

from baichuan_omni_jax.config.loss_shares import POWERS
from data_pipelines.documents.document import EncodedDocument
from data_pipelines.documents.sequence import Layout


def text_targets(layout: Layout) -> tuple[Int32[np.ndarray, "n"], Float32[np.ndarray, "n"]]:
    """Returns (targets, weights), shifted: target i is token i + 1 where that token is predicted, else 0 with weight 0.

    Tokens [7, 8, 9] of which 8 and 9 are predicted give targets [8, 9, 0] and weights [1, 1, 0]. Of a part of a
    document the last position has the target that it has in the whole.
    """
    # Shifted once, here: position i predicts token i + 1.
    after, predicted = layout.following
    weights = np.array([*layout.predicted, predicted][1:], np.float32)
    following = np.array([*layout.tokens, after][1:], np.int32)
    return np.where(weights > 0, following, 0).astype(np.int32), weights


def audio_targets(
    layout: Layout, codes: Int32[np.ndarray, "a q"], end_class: int
) -> tuple[Int32[np.ndarray, "c q"], Float32[np.ndarray, "c q"], Int32[np.ndarray, "c"]]:
    """Returns (frames, weights, slots) to be predicted; `codes` are all code frames of the document.

    A clip of frames A B after its start mark at slot 4 (frames at 5 and 6) gives: A at slot 4, B at 5, and the end
    frame (`end_class` at level 0, the only level with weight) at 6.
    """
    levels = codes.shape[1]
    frames = np.zeros((layout.audio_targets, levels), np.int32)
    weights = np.ones((layout.audio_targets, levels), np.float32)
    slots = np.zeros(layout.audio_targets, np.int32)
    place = 0
    for start, first, count in layout.spoken:
        end = place + count
        # The start mark predicts the first frame, each frame the next, the last one the end.
        frames[place:end] = codes[first : first + count]
        # The end frame is a class of level 0 alone, so upper levels have no weight there.
        frames[end, 0] = end_class
        weights[end, 1:] = 0.0
        slots[place : end + 1] = np.arange(start, start + count + 1)
        place = end + 1
    return frames, weights, slots


def weigh(
    document: EncodedDocument, weighting: str, loss_weight: float, untrained: Sequence[int] = ()
) -> EncodedDocument:
    """Gives a document the weights that make it count as `train.document_weighting` and its source say.

    A modality's own count decides: text targets for the text, and for each audio level the frames that have a weight
    there (end frames at the first level alone). 4 text targets weigh 1 each by `token`, 1/2 by `sqrt`, 1/4 by
    `document`, all times `loss_weight`.

    Args:
        document: with weights of 1 and 0.
        weighting: `token`, `sqrt` or `document`.
        loss_weight: the source's own factor.
        untrained: special tokens whose rows of the head do not train: as text targets they weigh nothing and are not
            counted.

    Returns:
        The document with its weights, or itself where nothing changes.
    """
    if len(untrained) and (refused := np.isin(document.text_targets, untrained) & (document.text_weights > 0)).any():
        document = replace(document, text_weights=np.where(refused, 0, document.text_weights).astype(np.float32))
    if (power := POWERS[weighting]) == 0 and loss_weight == 1:
        return document
    text, audio = (_scaled(part, power, loss_weight) for part in (document.text_weights, document.audio_weights))
    return replace(document, text_weights=text, audio_weights=audio)


def _scaled(weights: Float32[np.ndarray, "n ..."], power: float, loss_weight: float) -> Float32[np.ndarray, "n ..."]:
    counts = np.maximum((weights > 0).sum(0), 1)
    return (weights * (loss_weight / counts**power)).astype(np.float32)
