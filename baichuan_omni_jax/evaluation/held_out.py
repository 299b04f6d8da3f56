"""Held-out scores during training: the same first steps of every mixture each time, on the mesh of the run.

eval/NAME/loss  loss_text  loss_audio  loss_audio_q0 ..     of mixture NAME, as in a training step
eval/NAME/loss_text_only                                    of its documents without any image or audio
eval/NAME/SOURCE/loss_text  loss_audio                      of one source
eval/NAME/SOURCE/loss_text_swapped   media_gain             with another document's media (`EvalMixture.swapped`), and
                                                            what the own ones save: nats per text target
eval/NAME/SOURCE/loss_audio_swapped  text_gain              speech with another document's text, and what its own saves

Gains are of documents that have something to swap, each once, of the same steps. A model that ignores what it is shown
gains 0.

The tasks that train on audio have scores of their own: `audio_scores.py`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from baichuan_omni_jax.config import EvalConfig, TrainConfig
from baichuan_omni_jax.config.loss_shares import audio_scale
from baichuan_omni_jax.omni.batch import Batch
from baichuan_omni_jax.omni.merge import segments_with_media
from baichuan_omni_jax.sharding import ShardingRules

Sums = dict[str, Float[Array, "..."]]
TotalSums = Mapping[str, Float[np.ndarray, "..."]]


@runtime_checkable
class ExchangedMedia(Protocol):
    """The same documents as they are and with another's media; each call reads their steps from the start.

    Source 2 n of a batch has documents of the mixture's source n with exchanged media, 2 n + 1 with exchanged text.
    """

    @property
    def own(self) -> Callable[[], Iterator[Any]]: ...

    @property
    def exchanged(self) -> Callable[[], Iterator[Any]]: ...


@runtime_checkable
class SwappableData(Protocol):
    """A held-out mixture whose documents can be scored with others' media."""

    def exchanged_media(self, steps: int) -> ExchangedMedia:
        """Returns the documents of the first `steps` steps with and without exchanged media."""
        ...


@runtime_checkable
class HeldOutData(Protocol):
    """A held-out mixture: its sources' names, and steps whose `batch` has this host's rows."""

    sources: tuple[str, ...]

    def steps(self, state: dict | None) -> Iterator[Any]:
        """Yields steps from `state` on (None: from the start)."""
        ...


class HeldOutEvaluation:
    """Scores parameters on the first `eval.steps` steps of every mixture's data.

    They are read from the start every time and the training data's place is not touched, so an evaluation changes
    nothing of what follows.
    """

    def __init__(
        self,
        config: EvalConfig,
        mixtures: Mapping[str, HeldOutData],
        place: Callable[[Mapping[str, np.ndarray]], Batch],
        sums_of: Callable[[dict[str, Any], Batch], Sums],
        means_of: Callable[[TotalSums, tuple[str, ...]], dict[str, float]],
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """Opens nothing yet.

        Args:
            config: how often, and on how many steps.
            mixtures: the data by the names of `eval.mixtures`.
            place: puts a host's rows on the mesh.
            sums_of: the compiled (parameters, batch) -> sums of the task.
            means_of: the task's scores from sums over all steps, and the sources' names.
            check: called before every batch; what it raises breaks the evaluation off.
        """
        self._config, self._mixtures, self._place = config, mixtures, place
        self._sums_of, self._means_of, self._check = sums_of, means_of, check
        self._swapped = {mixture.name for mixture in config.mixtures if mixture.swapped}

    def is_due(self, step: int) -> bool:
        """Whether to evaluate: before the first step, and after every `eval.every`."""
        return bool(self._mixtures) and self._config.every > 0 and step % self._config.every == 0

    def __call__(self, parameters: dict[str, Any]) -> dict[str, float]:
        """Returns the scores, by the names above; one that nothing was summed for is left out."""
        # One mixture after the other: their batches have one shape, so one program serves all.
        scores = {}
        for name, data in self._mixtures.items():
            steps = islice_closing(data.steps(None), self._config.steps)
            means = self._means_of(self._sum(parameters, steps), data.sources)
            if name in self._swapped and isinstance(data, SwappableData):
                means |= self._gains(parameters, data.exchanged_media(self._config.steps), data.sources)
            scores |= {f"eval/{name}/{key}": value for key, value in means.items()}
        return scores

    def _gains(self, parameters: dict[str, Any], media: ExchangedMedia, sources: tuple[str, ...]) -> dict[str, float]:
        """Scores the same documents as they are and with exchanged media."""
        names = tuple(f"{source}/{kind}" for source in sources for kind in ("media", "text"))
        own, other = (self._means_of(self._sum(parameters, steps()), names) for steps in (media.own, media.exchanged))
        gains = {}
        for source in sources:
            # What is shown is for the text, the text that is spoken for its speech.
            for kind, loss in (("media", "loss_text"), ("text", "loss_audio")):
                key = f"{source}/{kind}/{loss}"
                if key in own and key in other:
                    gains |= {f"{source}/{loss}_swapped": other[key], f"{source}/{kind}_gain": other[key] - own[key]}
        return gains

    def _sum(self, parameters: dict[str, Any], steps: Iterator[Any]) -> TotalSums:
        total: dict[str, Any] = {}
        try:
            for step in steps:
                self._check()
                sums = self._sums_of(parameters, self._place(step.batch))
                for name, value in sums.items():
                    # fp64 on the host: a mean over many steps should not round.
                    total[name] = total.get(name, 0.0) + np.asarray(value, np.float64)
        finally:
            close_steps(steps)
        return total


def islice_closing(steps: Iterator[Any], count: int) -> Iterator[Any]:
    """Yields the first `count` steps, and ends the workers of the iterator."""
    try:
        yield from islice(steps, count)
    finally:
        close_steps(steps)


def close_steps(steps: object) -> None:
    """Ends the workers of an iterator over steps, where it has any."""
    close = getattr(steps, "close", None)
    if close is not None:
        close()


def sum_losses(
    text: Float[Array, "b t"],
    audio: Sequence[Float[Array, "b c"]],
    batch: Batch,
    sources: int,
    rules: ShardingRules,
) -> Sums:
    """Sums the cross-entropies of one packed batch by source, each with the weights to divide it by.

    Args:
        text: cross-entropy of every text slot, not weighted.
        audio: of every frame to predict, for each audio level; empty for models without an audio head.
        batch: the packed batch; its `source_ids` are 0 .. `sources` - 1.
        sources: how many there are.
        rules: how the batch is split.

    Returns:
        `text`, `text_weight` (sources,); the same of documents without any image or audio, `text_only`,
        `text_only_weight` (sources,); with an audio head `audio`, `audio_weight` (sources, levels).
    """
    weights, source = batch["text_weights"], batch["source_ids"]
    sums = {"text": _by_source(text * weights, source, sources), "text_weight": _by_source(weights, source, sources)}

    # Text alone says what the language model kept while it learned to see and hear.
    indexes = [batch[name] for name in ("visual_index", "audio_index") if name in batch]
    alone = jnp.where(segments_with_media(batch["segment_ids"], indexes, rules), 0.0, weights)
    sums |= {"text_only": _by_source(text * alone, source, sources)}
    sums |= {"text_only_weight": _by_source(alone, source, sources)}
    if not audio:
        return sums
    source = batch["audio_target_sources"]
    weights = [batch["audio_weights"][:, :, q] for q in range(len(audio))]
    # Audio: each level has weights of its own, since the end frame counts in level 0 alone.
    levels = [_by_source(entropy * weight, source, sources) for entropy, weight in zip(audio, weights, strict=True)]
    level_weights = [_by_source(weight, source, sources) for weight in weights]
    return sums | {"audio": jnp.stack(levels, 1), "audio_weight": jnp.stack(level_weights, 1)}


def _by_source(values: Float[Array, "b m"], source: Int32[Array, "b m"], sources: int) -> Float[Array, "sources"]:
    return jnp.where(source == jnp.arange(sources)[:, None, None], values, 0.0).sum((1, 2))


def mean_losses(sums: TotalSums, sources: tuple[str, ...], train: TrainConfig) -> dict[str, float]:
    """Divides the sums of `sum_losses`: losses over all sources and for each, by the names above."""
    # Weights of 0 mean that there was nothing to predict: no loss, rather than a loss of 0.
    mean = lambda value, weight: float(value.sum() / weight.sum()) if weight.sum() else None  # noqa: E731
    text = mean(sums["text"], sums["text_weight"])
    losses = {"loss": text, "loss_text": text, "loss_text_only": mean(sums["text_only"], sums["text_only_weight"])}
    for number, source in enumerate(sources):
        losses[f"{source}/loss_text"] = mean(sums["text"][number], sums["text_weight"][number])
    if "audio" in sums:
        audio, weight = sums["audio"], sums["audio_weight"]
        levels = audio.shape[1]
        alphas = np.asarray(train.audio_level_weights or (1.0 / levels,) * levels)
        losses["loss_audio"] = _weighted(audio.sum(0), weight.sum(0), alphas)
        # As in a training step, but of the sums over all steps: few frames do not outweigh the text here either.
        scale = audio_scale(sums["text_weight"].sum(), weight[:, 0].sum(), train.audio_full_ratio)
        losses["loss"] = (text or 0.0) + train.audio_loss_weight * scale * (losses["loss_audio"] or 0.0)
        losses |= {f"loss_audio_q{q}": mean(audio[:, q], weight[:, q]) for q in range(levels)}
        for number, source in enumerate(sources):
            losses[f"{source}/loss_audio"] = _weighted(audio[number], weight[number], alphas)
    return {name: value for name, value in losses.items() if value is not None}


def _weighted(
    sums: Float[np.ndarray, "levels"], weights: Float[np.ndarray, "levels"], alphas: Float[np.ndarray, "levels"]
) -> float | None:
    """The audio loss: each level's mean, by its weight; None where there is nothing to predict."""
    return float((alphas * sums / np.where(weights > 0, weights, 1.0)).sum()) if weights.any() else None
