"""A run from its configuration to its last step: what is checked, restored and told before the steps begin."""

import json
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import jax
from rich.console import Console
from rich.table import Table

from baichuan_omni_jax.checkpoint import Workdir
from baichuan_omni_jax.config import OmniConfig, RunConfig
from baichuan_omni_jax.config.loss_shares import shares_table
from baichuan_omni_jax.kernels.flash_attention.block_choice import DEFAULT, USUAL, choose_blocks
from baichuan_omni_jax.nn.param import ComputePolicy
from baichuan_omni_jax.sharding import make_mesh
from baichuan_omni_jax.storage import discard_scratch, write_json
from baichuan_omni_jax.train.ability_hook import check_answers
from baichuan_omni_jax.train.audio_samples import check_samples
from baichuan_omni_jax.train.hooks import RunProgress
from baichuan_omni_jax.train.hosts import as_process_zero, host_name, is_process_zero, on_all_hosts, warm_up_collectives
from baichuan_omni_jax.train.input import BatchPlacer, TrainingData
from baichuan_omni_jax.train.metrics import CompileCounter, evaluation_owed
from baichuan_omni_jax.train.preflight.compile import compile_for_devices, usable_bytes
from baichuan_omni_jax.train.preflight.fit import fit_remat, with_remat
from baichuan_omni_jax.train.preflight.render import fit_sentence
from baichuan_omni_jax.train.state import (
    FIT,
    Arrays,
    StepSpec,
    TrainState,
    abstract_state,
    branches_of,
    from_checkpoint,
    init_state,
    make_compute,
    make_step_spec,
    saved_opt_state,
)
from baichuan_omni_jax.train.suite_hook import check_suites
from baichuan_omni_jax.train.trainer import RunOptions, Trainer

DEFAULT_OPTIONS = RunOptions()
FIRST_ROWS = 64  # by whose documents blocks of attention are chosen
# What `compute.remat=fit` chose, where, and what was compiled for it.
REMAT = "remat.json"


def set_up(run: RunConfig, omni: OmniConfig) -> tuple[StepSpec, ComputePolicy]:
    """Checks that mesh, budgets, groups and model fit, on shapes alone: before anything is read or written.

    Raises ConfigError naming what does not fit.
    """
    mesh, compute = make_mesh(run.mesh), make_compute(run)
    with jax.set_mesh(mesh):
        spec = make_step_spec(run, omni, mesh, compute)
        spec.task.check(mesh)
        check_samples(run, omni)
        check_answers(run)
        check_suites(run)
        return spec, compute


def train(
    run: RunConfig,
    omni: OmniConfig,
    workdir: Workdir,
    data: TrainingData,
    options: RunOptions = DEFAULT_OPTIONS,
    console: Console | None = None,
) -> TrainState:
    """Trains until `train.steps` or SIGTERM, from the workdir's newest good step on.

    Args:
        run: the run's configuration.
        omni: the model's sizes.
        workdir: where steps are saved; other runs are kept out of it until it is closed.
        data: the training mixture.
        options: what this start adds.
        console: where tables and progress go; None: the terminal, of process zero.

    Returns:
        The last state, which has been saved.

    Raises:
        ConfigError: as `set_up`, for a step that cannot be read, and while another run works in the workdir.
        RunStoppedError: when a step could not be saved, and, with everything saved, when `train.nonfinite_limit` steps
            in a row were not finite.
    """
    # One host talks; the others train.
    console = console or Console(quiet=not is_process_zero())
    on_all_hosts(workdir.hold)
    # Counted from here on, so that a late compilation is noticed.
    compiles = CompileCounter()
    run = settle_blocks(run, data.first_rows, jax.devices()[0].platform, console)
    run = settle_remat(run, omni, workdir, console)
    spec, compute = set_up(run, omni)
    with jax.set_mesh(spec.mesh):
        start, originals = restore_or_init(run, spec, workdir)
        if start.step:
            changes = f"; since the start before: {workdir.changes}" if workdir.changes else ""
            console.print(f"{workdir.path}: resumed from step {start.step}{changes}")
        print_start_table(console, run, spec, data)
        owed = start.step > 0 and as_process_zero(lambda: evaluation_owed(workdir.path, start.step))
        # A finished run is no error: the same command again says so.
        if start.step >= run.train.steps and not owed:
            discard_scratch(workdir.path, host_name())
            console.print(f"{workdir.path} is finished: step {start.step} of train.steps {run.train.steps}")
            return start.state
        # All hosts are at the same place now; later one may be minutes behind, compiling.
        warm_up_collectives(spec.mesh)
        place = BatchPlacer(run.data.rows, spec.task.batch_axes(), spec.mesh, compute.rules)
        trainer = Trainer(spec, omni, workdir, data, options, console, compiles, place, start.step, originals)
        return trainer.fit(start, owed=owed).state


def settle_blocks(
    run: RunConfig, first_rows: Callable[[int], list[list[int]]], platform: str, console: Console
) -> RunConfig:
    """Puts blocks of attention in place of `compute.attention_block=auto`.

    They follow from the first rows of the run's plan, which all hosts and all starts have alike.

    Args:
        run: the run's configuration.
        first_rows: the tokens of the documents of so many rows.
        platform: of the devices; on others than TPUs it has its usual blocks.
        console: told what was chosen.

    Returns:
        The configuration with numbers.
    """
    if run.compute.attention_block != "auto":
        return run
    blocks = {"attention_block": USUAL.get(platform, DEFAULT[0])}
    if platform == "tpu" and run.task == "omni":
        block_q, block_kv, visited = choose_blocks(first_rows(FIRST_ROWS), run.data.budgets.tokens)
        told = f"{block_q} x {block_kv} tokens, which visit {visited:.2f} times what is visible"
        console.print(f"compute.attention_block=auto: {told}")
        blocks |= {"attention_q_block": block_q, "attention_kv_block": block_kv}
    return replace(run, compute=replace(run.compute, **blocks))


def settle_remat(run: RunConfig, omni: OmniConfig, workdir: Workdir, console: Console) -> RunConfig:
    """Puts what fits in place of `compute.remat=fit`: as `remat.json` of the workdir says, which is written here.

    Found once for a kind of device and a mesh, so that a run that goes on computes what it computed before.
    """
    if run.compute.remat != FIT:
        return run
    # Memory and file are process zero's: hosts must compile the same programs.
    device, path = jax.local_devices()[0], workdir.path / REMAT
    where = {"device_kind": device.device_kind, "mesh": dict(make_mesh(run.mesh).shape)}
    known = as_process_zero(lambda: json.loads(path.read_text()) if path.exists() else {})
    available = as_process_zero(lambda: usable_bytes(device))
    if known and all(known[key] == value for key, value in where.items()):
        console.print(f"compute.remat=fit: {known['remat']}, as {REMAT} of the workdir says")
        return with_remat(run, known["remat"])
    if available is None:
        console.print(f"compute.remat=fit: full, as {device.device_kind} does not say how much memory it has")
        return with_remat(run, "full")
    found, _ = fit_remat(run, omni, list(jax.devices()), available, partial(compile_for_devices, read=False))
    console.print(fit_sentence(found))
    if is_process_zero():
        write_json(path, {**where, **vars(found)})
    return with_remat(run, found.remat)


def restore_or_init(run: RunConfig, spec: StepSpec, workdir: Workdir) -> tuple[RunProgress, Arrays]:
    """Reads the workdir's newest good step, or makes step 0; with the originals (`from_checkpoint`)."""
    if as_process_zero(workdir.latest_step) is None:
        state, originals = init_state(run, spec)
        return RunProgress(0, state, None), originals
    found = workdir.restore(None, branches_of(spec.stored), saved_opt_state(abstract_state(spec)))
    state, originals = from_checkpoint(spec, found.branches, found.opt_state, found.step)
    return RunProgress(found.step, state, found.data_state), originals


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
