"""Trains: the same command on a laptop's CPU, a GPU, a TPU VM or every host of a pod slice.

    baichuan-omni train --config configs/tiny.py --workdir runs/tiny [--set train.steps=20 ...]

Started again with the same workdir, it goes on where it stopped; SIGTERM saves and leaves. A second run in a workdir
where one is at work is refused. Numbers go to WORKDIR/metrics.jsonl and WORKDIR/tensorboard. Exit code 2: something
given cannot be used, the message says what. 3: the run ended itself, because too many steps in a row were not finite or
a checkpoint could not be written. 0 otherwise; `--stopped-code` tells a stop by SIGTERM from a run that has finished.
"""

import argparse
import shlex
import sys
from contextlib import ExitStack
from dataclasses import replace

import jax
from etils import epath

from baichuan_omni_jax.audio.encoder import AudioEncoderBranch
from baichuan_omni_jax.checkpoint import (
    Parent,
    TokenizerOrigin,
    Workdir,
    check_run_config,
    find_parent,
    find_tokenizer,
    keep_tokenizer,
    kept_steps,
    parent_data_state,
    record_parent,
)
from baichuan_omni_jax.cli.common import (
    add_host_arguments,
    add_run_arguments,
    join_hosts,
    start_logging,
)
from baichuan_omni_jax.config import OmniConfig, RunConfig, load_run_config, resolve_model
from baichuan_omni_jax.coordination import Hosts
from baichuan_omni_jax.errors import ConfigError, UnpreparedError
from baichuan_omni_jax.generation.loading import is_untrained
from baichuan_omni_jax.storage import local_path, parse_path
from baichuan_omni_jax.train.compile_cache import keep_compiled
from baichuan_omni_jax.train.hosts import (
    as_process_zero,
    check_agreement,
    on_all_hosts,
    process_zero_first,
    run_facts,
    version_facts,
    wait_for,
)
from baichuan_omni_jax.train.input import rows_by_host
from baichuan_omni_jax.train.metrics import load_wandb
from baichuan_omni_jax.train.profiling import parse_span, serve_profiler
from baichuan_omni_jax.train.run import set_up, train
from baichuan_omni_jax.train.run_data import MixtureData, open_run_data
from baichuan_omni_jax.train.stop import StopSignal
from baichuan_omni_jax.train.trainer import RunOptions
from data_pipelines.held_out import FEW_STEPS, HeldOutMixture
from data_pipelines.packing.rows import RowShard
from data_pipelines.packing.shared_rows import Agreement
from data_pipelines.pipeline import TrainingData

# What one host may prepare while the others wait, where the configuration does not say: minutes.
UNPREPARED_MB = 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `train`."""
    add_run_arguments(parser)
    add = parser.add_argument
    about = "where the run's checkpoints and numbers go; may be a URL: gs://BUCKET/RUN, s3://BUCKET/RUN"
    add("--workdir", required=True, metavar="DIR", help=about)
    add("--profile", default="", metavar="START:STOP", help="steps to trace into WORKDIR/profile")
    about = "where compiled programs are kept for the next start (default: in the workdir); off: nowhere"
    add("--compilation-cache", default="", metavar="DIR", help=about)
    add("--profiler-port", type=int, default=0, metavar="PORT", help="serve jax.profiler to XProf there, on every host")
    add("--wandb", default="", metavar="PROJECT", help="on Weights & Biases, to send the numbers to as well")
    about = "exit code where SIGTERM ended the run, on any of its hosts, before its last step (default 0)"
    add("--stopped-code", type=int, default=0, metavar="N", help=about)
    add_host_arguments(parser)


def run(options: argparse.Namespace) -> int:
    """Trains to the run's last step, or until it is stopped. Raises ConfigError and RunStoppedError.

    Returns the exit code: 0 where the last step is done, else `--stopped-code`.
    """
    start_logging()
    # Hosts join before JAX looks for devices, and agree on versions and configuration before anything is done.
    join_hosts(options)
    stop = StopSignal(leave=options.stopped_code)
    try:
        with ExitStack() as stack:
            return run_until_stopped(options, stop, stack)
    except KeyboardInterrupt:
        # SIGTERM before the first step, when nothing would be lost; else Ctrl-C.
        if not stop.received:
            raise
        print("stopped by SIGTERM before the first step of this start; nothing is lost", file=sys.stderr)
        return options.stopped_code
    finally:
        stop.close()


def run_until_stopped(options: argparse.Namespace, stop: StopSignal, stack: ExitStack) -> int:
    """Trains as `run`, with hosts joined and SIGTERM heard; what `stack` gets is undone when the run has ended."""
    run, omni, profile = on_all_hosts(lambda: read_options(options))
    if options.profiler_port:
        on_all_hosts(lambda: serve_profiler(options.profiler_port))
    check_agreement(version_facts() | run_facts(run))
    # What can refuse the run comes before it claims the workdir, but for what the weights and the media say.
    spec, compute = on_all_hosts(lambda: set_up(run, omni))
    workdir, parent = on_all_hosts(lambda: open_workdir(run, options.workdir))
    on_all_hosts(lambda: stack.enter_context(keep_compiled(workdir.path, options.compilation_cache)))
    begins = run.data.continue_sources and as_process_zero(workdir.latest_step) is None
    continue_from = on_all_hosts(lambda: parent_data_state(parent)) if begins else None

    # Data: process 0 indexes and encodes what is missing, the others find it done. Then each reads its own rows.
    home = on_all_hosts(lambda: find_tokenizer(run, workdir.path))
    data, tokenizer = process_zero_first(lambda: open_prepared(options, run, omni, workdir, home))
    check_agreement({name: value for mixture in data.values() for name, value in mixture.facts().items()})
    held = rows_by_host(spec.mesh, compute.rules, run.data.rows)
    agreement = Agreement(held, Hosts.joined())
    shard = RowShard(held[jax.process_index()], agreement.shared, agreement)
    context = spec.mesh.shape["context"]
    workers = 0 if run.eval.steps <= FEW_STEPS else None
    held_out = on_all_hosts(
        lambda: {name: HeldOutMixture(*mixture, shard, context, workers) for name, mixture in data.items() if name}
    )
    training = on_all_hosts(lambda: TrainingData(*data[""], shard, context, continue_from))

    try:
        # What the workdir says of the run, before its first step: a restart reads it.
        on_all_hosts(lambda: workdir.write_run_config(run))
        on_all_hosts(lambda: wait_for(workdir.path / "run_config.json"))
        on_all_hosts(lambda: record_parent(workdir.path, parent))
        if tokenizer is not None:
            keep_tokenizer(workdir.path, tokenizer, omni, origin_of(home))
        run_options = RunOptions(
            parent=parent, held_out=held_out, profile=profile, wandb=options.wandb, leave_when_hung=True, stop=stop
        )
        state = train(run, omni, workdir, training, run_options)
    except ConfigError:
        # Refused after all (weights of other sizes, documents that no step can read): the corrected command may begin.
        workdir.give_up()
        raise
    workdir.close()
    finished = int(state.step) >= run.train.steps and not stop.interrupted
    return 0 if finished else options.stopped_code


def open_prepared(
    options: argparse.Namespace, run: RunConfig, omni: OmniConfig, workdir: Workdir, home: epath.Path | None
) -> tuple[dict[str, MixtureData], AudioEncoderBranch | None]:
    """Opens the run's data (`open_run_data`). Raises ConfigError with the command that prepares what is too much."""
    if options.multihost and not run.data.max_unprepared_mb:
        run = replace(run, data=replace(run.data, max_unprepared_mb=UNPREPARED_MB))
    try:
        return open_run_data(run, omni, workdir.path, home)
    except UnpreparedError as error:
        words = ["tokenize"] if run.task == "omni" else ["data", "stats"]
        command = ["baichuan-omni", *words, "--config", options.config, *(f"--set={item}" for item in options.set)]
        raise ConfigError(f"{error}; run first, on one host: {shlex.join(command)}") from error


def read_options(options: argparse.Namespace) -> tuple[RunConfig, OmniConfig, range | None]:
    """The run, its architecture, and the steps to trace."""
    # Here, so that a missing package or login is refused before anything is built.
    if options.wandb:
        load_wandb()
    # A shell sees its last byte: 256 would be taken for a run that has finished.
    if not 0 <= options.stopped_code <= 255:
        raise ConfigError(f"--stopped-code {options.stopped_code} is no exit code: 0 to 255")
    run = load_run_config(options.config, options.set)
    for path in (options.workdir, run.data.root):
        parse_path(path)
    # Links of a file system lead there.
    for path in run.data.trusted_roots:
        local_path(path, "data.trusted_roots")
    return run, resolve_model(run.model), parse_span(options.profile)


def open_workdir(run: RunConfig, path: str) -> tuple[Workdir, Parent]:
    """The workdir, which holds no other run and is held for this one, and the checkpoints that the run starts from."""
    # First whether it is this run's, then the lock: a refusal leaves a workdir as it was.
    local = run.checkpoint.local_dir if run.checkpoint.local_every else None
    workdir = Workdir(path, keep=run.checkpoint.keep, local=local)
    check_run_config(workdir.path, run)
    # A file that people edit, and the first look at it would be when the run diverges.
    kept_steps(workdir.path)
    workdir.hold()
    return workdir, find_parent(workdir.path, run.checkpoint.init_from, run.branches)


def origin_of(home: epath.Path | None) -> TokenizerOrigin:
    """Where the run's tokenizer came from, for its workdir."""
    if home is None:
        return TokenizerOrigin("", untrained=True)
    return TokenizerOrigin(str(home), untrained=is_untrained("audio_encoder", home))
