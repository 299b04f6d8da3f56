"""The language-model stages: vision, language model, audio embeddings and head over packed rows of all modalities."""

import jax
from jax.sharding import Mesh
from jaxtyping import PRNGKeyArray

from baichuan_omni_jax.errors import ConfigError
from baichuan_omni_jax.flops.batch_counts import count_batch
from baichuan_omni_jax.flops.terms import FlopTerm, omni_terms
from baichuan_omni_jax.omni.batch import BRANCH_FIELDS, Batch, abstract_batch
from baichuan_omni_jax.omni.model import OmniModel
from baichuan_omni_jax.train.input import check_batch
from baichuan_omni_jax.train.omni_loss import denominators, fill_metrics, omni_loss, share_metrics
from baichuan_omni_jax.train.tasks.task import NOTHING, Metrics, PlainTask


class OmniTask(PlainTask):
    """Computes the branches of `run.branches`."""

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
        data = self.run.data
        return abstract_batch(data.rows, data.budgets, self.omni, self.run.branches, mesh, self.compute.rules)

    def denominators(self, batch: Batch):
        return denominators(batch, self.run)

    def loss(self, model: OmniModel, batch: Batch, by, extra):
        loss, metrics = omni_loss(model, batch, self.run, by)
        return loss, (metrics, NOTHING)

    def batch_numbers(self, batch: Batch) -> Metrics:
        return fill_metrics(batch) | share_metrics(batch, self.run)

    def parts(self) -> tuple[FlopTerm, ...]:
        return omni_terms(self.omni)

    def counts(self, batch: Batch) -> Metrics:
        return count_batch(self.weigh(batch))
