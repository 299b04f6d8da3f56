"""Held-out loss during training: the same first steps of every mixture each time, on the mesh of the run.

eval/NAME/loss  loss_text  loss_audio  loss_audio_q0 ..     of mixture NAME, as in a training step
eval/NAME/loss_text_only                                    of its documents without any picture or sound
eval/NAME/SOURCE/loss_text  loss_audio                      of one source

The tasks that train on sound have numbers of their own: `train/sound_scores.py`.
"""

from collections.abc import Callable, Mapping
from contextlib import closing
from itertools import islice

import numpy as np
from jaxtyping import Float

from baichuan_omni_jax.config import RunConfig
from baichuan_omni_jax.config.loss_shares import audio_scale
from baichuan_omni_jax.evaluation.audio_scores import flow_means, flow_sums, tokenizer_means, tokenizer_sums
from baichuan_omni_jax.evaluation.omni_losses import make_eval_step
from baichuan_omni_jax.train.input import TrainingData
from baichuan_omni_jax.train.state import StepSpec, TrainState, saved_values

Sums = dict[str, Float[np.ndarray, "..."]]


class Evaluation:
    """Evaluates a state on the first `eval.steps` steps of every mixture's data.

    They are read from the start every time and the training data's place is not touched, so an evaluation changes
    nothing of what follows. `place` puts a batch on the mesh.
    """

    def __init__(self, run: RunConfig, spec: StepSpec, place: Callable, mixtures: Mapping[str, TrainingData]) -> None:
        self._run, self._place, self._mixtures = run, place, mixtures
        sources = max((len(data.sources) for data in mixtures.values()), default=1)
        self._setup, self._sums_of = spec, make_sums(spec, run, sources)

    def is_due(self, step: int) -> bool:
        """Before the first step, and after every `eval.every`."""
        return bool(self._mixtures) and self._run.eval.every > 0 and step % self._run.eval.every == 0

    def __call__(self, state: TrainState) -> dict[str, float]:
        """The losses, by the names above; one that nothing was summed for is left out."""
        losses = {}
        for name, data in self._mixtures.items():
            sums = self._sums(state, data)
            means = make_means(self._setup, self._run, sums, data.sources)
            losses |= {f"eval/{name}/{key}": value for key, value in means.items()}
        return losses

    def _sums(self, state: TrainState, data: TrainingData) -> Sums:
        total: Sums = {}
        parameters = saved_values(self._setup, state)
        with closing(data.steps(None)) as steps:
            for step in islice(steps, self._run.eval.steps):
                sums = self._sums_of(parameters, self._place(step.batch))
                for name, value in sums.items():
                    total[name] = total.get(name, 0.0) + np.asarray(value, np.float64)
        return total


def make_sums(spec: StepSpec, run: RunConfig, sources: int) -> Callable[..., Sums]:
    """The task's compiled (parameters, batch) -> sums."""
    if run.task == "audio_tokenizer":
        return tokenizer_sums(spec, run)
    return flow_sums(spec, run) if run.task == "flow_matching" else make_eval_step(spec, run, sources)


def make_means(spec: StepSpec, run: RunConfig, sums: Sums, sources: tuple[str, ...]) -> dict[str, float]:
    """The task's numbers from its sums."""
    if run.task == "audio_tokenizer":
        return tokenizer_means(sums, spec.task.omni.audio.code_rate)
    return flow_means(sums) if run.task == "flow_matching" else mean_losses(sums, sources, run)


def mean_losses(sums: Mapping[str, np.ndarray], sources: tuple[str, ...], run: RunConfig) -> dict[str, float]:
    """Means from the sums of `make_eval_step`, over all sources and for each."""
    mean = lambda value, weight: float(value.sum() / weight.sum()) if weight.sum() else None  # noqa: E731
    text = mean(sums["text"], sums["text_weight"])
    losses = {"loss": text, "loss_text": text, "loss_text_only": mean(sums["text_only"], sums["text_only_weight"])}
    for number, source in enumerate(sources):
        losses[f"{source}/loss_text"] = mean(sums["text"][number], sums["text_weight"][number])
    if "audio" in sums:
        alphas = _level_weights(run, sums["audio"].shape[1])
        audio, weight = sums["audio"], sums["audio_weight"]
        losses["loss_audio"] = _weighted(audio.sum(0), weight.sum(0), alphas)
        # As in a training step, but of the sums over all steps: a mixture with few frames does not shout here either.
        scale = audio_scale(sums["text_weight"].sum(), weight[:, 0].sum(), run.train.audio_full_ratio)
        losses["loss"] = (text or 0.0) + run.train.audio_loss_weight * scale * (losses["loss_audio"] or 0.0)
        losses |= {f"loss_audio_q{q}": mean(audio[:, q], weight[:, q]) for q in range(len(alphas))}
        for number, source in enumerate(sources):
            losses[f"{source}/loss_audio"] = _weighted(audio[number], weight[number], alphas)
    return {name: value for name, value in losses.items() if value is not None}


def _weighted(sums: Float[np.ndarray, "levels"], weights: Float[np.ndarray, "levels"], alphas) -> float | None:
    """The audio loss: each level's mean, by its weight; None where there is nothing to predict."""
    return float((alphas * sums / np.where(weights > 0, weights, 1.0)).sum()) if weights.any() else None


def _level_weights(run: RunConfig, levels: int) -> Float[np.ndarray, "levels"]:
    return np.asarray(run.train.audio_level_weights or (1.0 / levels,) * levels)
