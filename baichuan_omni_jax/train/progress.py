"""What a person sees of a run: the tables at start-up and the progress line."""

from collections import defaultdict
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from baichuan_omni_jax.config import RunConfig
from baichuan_omni_jax.config.loss_shares import shares_table
from baichuan_omni_jax.train.input import TrainingData
from baichuan_omni_jax.train.state import StepSpec

# Parts of the loss, of all tasks, in the order they are shown.
_LOSS_PARTS = ("text", "audio", "reconstruction", "transcript", "commitment", "flow", "prior")


def print_start_table(console: Console, run: RunConfig, spec: StepSpec, data: TrainingData) -> None:
    """Prints groups with their parameters, learning rates and what is frozen; the sources' shares of the loss; then
    mesh, budgets and data.
    """
    console.print(groups_table(run, spec))
    if run.task == "omni":
        title = f"expected shares of the loss (documents weigh by {run.train.document_weighting})"
        console.print(shares_table(data.loss_shares(run.train), title))
    mesh = ", ".join(f"{axis} {size}" for axis, size in spec.mesh.shape.items())
    budgets = ", ".join(f"{size} {name}" for name, size in run.data.budgets.limits().items())
    console.print(f"mesh: {mesh}; {run.data.rows} rows a step, each at most {budgets}")
    documents = f"{data.documents} documents, {data.skipped.total()} skipped"
    console.print(f"data: {documents}; {run.train.steps} steps in {run.compute.dtype}")


def groups_table(run: RunConfig, spec: StepSpec) -> Table:
    """Lists a group and branch a line: its parameters, how many of them are frozen, and the rate of the others."""
    table = Table(title=f"{run.name}: parameters by group")
    for column in ("group", "branch", "parameters", "frozen", "peak learning rate"):
        table.add_column(column, justify="right" if column == "parameters" else "left")
    rates = {group.name: group.learning_rate for group in run.optimizer.groups}
    # A line for each group and branch.
    for (group, branch), (trainable, frozen) in sorted(_count(spec).items()):
        # A group with a rate may train nothing: rows of special tokens that are turned off.
        peak = f"{rates[group]:g}" if trainable else "frozen"
        table.add_row(group, branch, f"{trainable + frozen:,}", f"{frozen:,}", peak)
    return table


def _count(spec: StepSpec) -> dict[tuple[str, str], tuple[int, int]]:
    """Counts (trainable, frozen) parameters by (group, branch)."""
    counts: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])
    sizes = {name: value.size for name, value in spec.shapes().items()}
    for place, names in enumerate((spec.groups.trainable, spec.groups.frozen)):
        for name, group in names.items():
            counts[group, name.split(".")[0]][place] += sizes[name]
    return {key: (trainable, frozen) for key, (trainable, frozen) in counts.items()}


class ProgressLine:
    """Shows step, ETA, loss, tokens/s and fill on one line; on a terminal that cannot redraw, a line now and then."""

    def __init__(self, console: Console, steps: int, done: int, every: int = 10):
        self._console, self._steps, self._every = console, steps, every
        # Drawn only on a terminal; elsewhere lines are printed now and then.
        self._bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=24),
            TimeRemainingColumn(),
            TextColumn("{task.fields[numbers]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("train", total=steps, completed=done, numbers="")
        self._bar.start()

    def show(self, record: dict[str, Any]) -> None:
        """Shows a step: `record` is a line of metrics.jsonl."""
        speed = record["tokens"] / max(record["step_time_s"], 1e-9)
        parts = ", ".join(f"{name} {record[f'loss_{name}']:.3f}" for name in _LOSS_PARTS if f"loss_{name}" in record)
        numbers = f"loss {record['loss']:.3f} ({parts}) {speed:,.0f} tokens/s, fill {record['fill_tokens']:.2f}"
        if "mfu" in record:
            numbers += f", MFU {record['mfu']:.2f}"
        self._bar.update(self._task, completed=record["step"], numbers=numbers)
        if not self._console.is_terminal and (record["step"] % self._every == 0 or record["step"] == self._steps):
            left = (self._steps - record["step"]) * record["step_time_s"]
            self._console.print(
                f"step {record['step']}/{self._steps} {numbers}, {left / 60:.1f} min left", soft_wrap=True
            )

    def close(self) -> None:
        """Leaves the line as it is."""
        self._bar.stop()
