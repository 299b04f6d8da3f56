"""A mixture as the training loop reads it: counts for the report, and steps of packed rows from a state on."""

from collections import Counter
from collections.abc import Iterator

from baichuan_omni_jax.config import TrainConfig
from baichuan_omni_jax.config.loss_shares import LossShare
from data_pipelines.audio_codes import CodeStore
from data_pipelines.packing.context_plan import check
from data_pipelines.packing.mixture import epochs_read
from data_pipelines.packing.rows import RowShard, Step
from data_pipelines.pipeline import Pipeline, check_bad_fraction


class TrainingData:
    """Endless steps of a pipeline's mixture: `shard` is this host's part, tokens come dealt to `context_shards`.

    With `resume_state`, the last state of another run's data, each source continues where that run left it.
    `handled` counts the documents beyond a budget that a policy made fit. Raises ConfigError when rows cannot be dealt
    to so many shards.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        codes: CodeStore | None,
        shard: RowShard,
        context_shards: int = 1,
        resume_state: dict | None = None,
    ):
        check(pipeline.config, context_shards)
        self._pipeline, self._codes, self._shard, self._context_shards = pipeline, codes, shard, context_shards
        self._resume_state = resume_state
        self.documents = pipeline.documents
        self.skipped = pipeline.causes()
        self.handled = pipeline.handled()
        self.tokenizer_json = pipeline.processor.tokenizer.to_str()
        self.sources = tuple(source.name for source in pipeline.config.mixture)

    def location(self, source: int, number: int) -> str:
        """The manifest line of a document."""
        return self._pipeline.indexes[source].location(number)

    def loss_shares(self, train: TrainConfig) -> list[LossShare]:
        """Which share of the loss each source has, as foreseen from the index."""
        return self._pipeline.loss_shares(train)

    def steps(self, state: dict | None) -> Iterator[Step]:
        """Steps from the plan's `state` on (None: from the start)."""
        options = {"shard": self._shard, "context_shards": self._context_shards, "resume_state": self._resume_state}
        return self._pipeline.steps(self._codes, state=state, **options)

    def epochs(self, state: dict) -> dict[str, float]:
        """How often each source has been read when the plan's state is this one."""
        return epochs_read(state["sources"])

    def check_failed(self, causes: Counter) -> None:
        """Raises ConfigError when documents skipped by the index and lost at decode exceed `max_bad_fraction`."""
        bad = self.skipped + causes
        check_bad_fraction(bad.total(), self.documents, self._pipeline.config.max_bad_fraction, bad)
