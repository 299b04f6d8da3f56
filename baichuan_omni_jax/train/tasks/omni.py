"""The language-model stages: vision, language model, audio embeddings and head over packed rows of all modalities."""

from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, PRNGKeyArray

from baichuan_omni_jax.errors import ConfigError
from baichuan_omni_jax.evaluation.held_out import mean_losses, sum_losses
from baichuan_omni_jax.flops.terms import FlopTerm, omni_terms
from baichuan_omni_jax.omni.batch import BRANCH_FIELDS, Batch, abstract_batch
from baichuan_omni_jax.omni.model import OmniModel
from baichuan_omni_jax.train.input import check_batch
from baichuan_omni_jax.train.losses import (
    Denominators,
    loss_share_metrics,
    omni_denominators,
    omni_entropies,
    omni_loss,
)
from baichuan_omni_jax.train.tasks.task import NO_UPDATES, Metrics, NonGradientUpdates, Sums, Task, fill_metrics


class OmniTask(Task):
    """Computes the branches of `run.branches`; it has no state beside parameters and optimizer."""

    weight_decay = 0.1

    def make_model(self, key: PRNGKeyArray) -> OmniModel:
        return OmniModel(key, self.omni, self.compute, self.run.branches)

    def check(self, mesh: Mesh) -> None:
        check_batch(self.run, self.omni, mesh, self.compute.rules)
        if not self.run.train.audio_full_ratio >= 0:
            raise ConfigError(f"train.audio_full_ratio {self.run.train.audio_full_ratio} must be at least 0")

    def batch_axes(self) -> dict[str, tuple[str | None, ...]]:
        return {name: axes for branch in self.run.branches for name, axes in BRANCH_FIELDS[branch].items()}

    def abstract_batch(self, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
        # Fields of the run's branches alone: a model without vision reads no patches.
        data = self.run.data
        return abstract_batch(data.rows, data.budgets, self.omni, self.run.branches, mesh, self.compute.rules)

    def denominators(self, batch: Batch) -> Denominators:
        return omni_denominators(batch, self.run)

    def loss(
        self, model: OmniModel, batch: Batch, denominators: Denominators, aux_state: tuple
    ) -> tuple[Float[Array, ""], tuple[Metrics, NonGradientUpdates]]:
        loss, metrics = omni_loss(model, batch, self.run, denominators)
        return loss, (metrics, NO_UPDATES)

    def batch_metrics(self, batch: Batch) -> Metrics:
        return fill_metrics(batch) | loss_share_metrics(batch, self.run)

    def flop_terms(self) -> tuple[FlopTerm, ...]:
        return omni_terms(self.omni)

    def held_out_sums(self, model: OmniModel, batch: Batch, sources: int) -> Sums:
        # As in training, but by source and not weighed against each other.
        text, audio = omni_entropies(model, batch, self.run)
        return sum_losses(text, audio, batch, sources, self.compute.rules)

    def held_out_means(self, sums: Mapping[str, np.ndarray], sources: tuple[str, ...]) -> dict[str, float]:
        return mean_losses(sums, sources, self.run.train)
