"""Trains: the same command on a laptop's CPU, a GPU, a TPU VM or every host of a pod slice.

    baichuan-omni train --config configs/tiny.py --workdir runs/tiny [--set train.steps=20 ...]

Started again with the same workdir, it goes on where it stopped; SIGTERM saves and leaves. A second run in a workdir
where one is at work is refused. Numbers go to WORKDIR/metrics.jsonl and WORKDIR/tensorboard. Exit code 2: something
given cannot be used, the message says what.
3: the run ended itself, because too many steps in a row were not finite or a checkpoint could not be written.
"""

import argparse
from pathlib import Path

import numpy as np
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
    parent_data_state,
    record_parent,
    with_text_tokenizer,
)
from baichuan_omni_jax.checkpoint.branches import KEPT
from baichuan_omni_jax.cli.common import add_host_arguments, add_run_arguments, join_hosts, start_logging
from baichuan_omni_jax.cli.tokenize_audio import ensure_codes, open_pipelines
from baichuan_omni_jax.config import OmniConfig, RunConfig, apply_overrides, load_run_config, resolve_model
from baichuan_omni_jax.generation.loading import is_untrained
from baichuan_omni_jax.nn.param import named_values, with_values
from baichuan_omni_jax.train.hosts import (
    check_agreement,
    on_all_hosts,
    process_zero_first,
    run_facts,
    version_facts,
    wait_for,
)
from baichuan_omni_jax.train.input import rows_of_host
from baichuan_omni_jax.train.profiling import parse_span
from baichuan_omni_jax.train.trainer import RunOptions, set_up, train
from baichuan_omni_jax.train.wandb import load_wandb
from data_pipelines.audio_codes import CodeStore
from data_pipelines.audio_codes.build import CodeBuildOptions
from data_pipelines.packing.rows import RowShard
from data_pipelines.pipeline import Pipeline, TrainingData


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_arguments(parser)
    add = parser.add_argument
    add("--workdir", required=True, metavar="DIR", help="where the run's checkpoints and numbers go")
    add("--profile", default="", metavar="START:STOP", help="steps to trace into WORKDIR/profile")
    add("--wandb", default="", metavar="PROJECT", help="on Weights & Biases, to send the numbers to as well")
    add_host_arguments(parser)


def run(options: argparse.Namespace) -> None:
    """Trains to the run's last step, or until it is stopped. Raises ConfigError and RunStoppedError."""
    start_logging()
    join_hosts(options)
    pretrain(options)


def pretrain(options: argparse.Namespace) -> None:
    """Trains as one of the hosts, which have joined each other."""
    run, omni, profile = on_all_hosts(lambda: read_options(options))
    check_agreement(version_facts() | run_facts(run))
    # Everything that can refuse the run comes before it claims the workdir.
    spec, compute = on_all_hosts(lambda: set_up(run, omni))
    workdir, parent = on_all_hosts(lambda: open_workdir(run, Path(options.workdir)))
    begins = run.data.continue_sources and workdir.latest_step() is None
    left = on_all_hosts(lambda: parent_data_state(parent)) if begins else None
    home = on_all_hosts(lambda: find_tokenizer(run, workdir.path))
    pipelines, tokenizer = process_zero_first(lambda: prepare(run, omni, workdir, home))
    check_agreement({name: value for parts in pipelines.values() for name, value in data_facts(*parts).items()})
    shard = RowShard(rows_of_host(spec.mesh, compute.rules, run.data.rows))
    context = spec.mesh.shape["context"]
    held_out = on_all_hosts(
        lambda: {name: TrainingData(*parts, shard, context) for name, parts in pipelines.items() if name}
    )
    training = on_all_hosts(lambda: TrainingData(*pipelines[""], shard, context, left))
    workdir.write_run_config(run)
    on_all_hosts(lambda: wait_for(workdir.path / "run_config.json"))
    record_parent(workdir.path, parent)
    if tokenizer is not None:
        keep_tokenizer(workdir.path, tokenizer, omni, origin_of(home))
    extras = RunOptions(parent=parent, held_out=held_out, profile=profile, wandb=options.wandb)
    train(run, omni, workdir, training, extras)
    workdir.close()


def read_options(options: argparse.Namespace) -> tuple[RunConfig, OmniConfig, range | None]:
    """The run, its architecture, and the steps to trace."""
    if options.wandb:
        load_wandb()
    run = apply_overrides(load_run_config(options.config), options.set)
    return run, resolve_model(run.model), parse_span(options.profile)


def open_workdir(run: RunConfig, path: Path) -> tuple[Workdir, Parent]:
    """The workdir, which holds no other run and is held for this one, and the checkpoints that the run starts from."""
    workdir = Workdir(path, keep=run.checkpoint.keep)
    check_run_config(workdir.path, run)
    workdir.hold()
    return workdir, find_parent(workdir.path, run.checkpoint.init_from, run.branches)


def prepare(
    run: RunConfig, omni: OmniConfig, workdir: Workdir, home: epath.Path | None
) -> tuple[dict[str, tuple[Pipeline, CodeStore | None]], AudioEncoderBranch | None]:
    """The run's data ("") and held-out data by name, indexed and with audio codes, built where they are not there yet.
    With it comes the tokenizer of these codes, in numpy, where the workdir does not keep it yet.

    Tasks that train on sound itself need no codes. `home` is where `find_tokenizer` found the tokenizer.

    Without `data.tokenizer` the weights' own is used: the workdir's, then that of `checkpoint.init_from`.
    """
    run = with_text_tokenizer(run, workdir.path)
    pipelines = open_pipelines(run, omni)
    store = kept = None
    if run.task == "omni":
        store, tokenizer = ensure_codes(run, omni, list(pipelines.values()), CodeBuildOptions(run.data.workers), home)
        if "audio_head" in run.branches and home != workdir.path / KEPT:
            values = {name: np.asarray(value) for name, value in named_values(tokenizer).items()}
            kept = with_values(tokenizer, values)
    return {name: (pipeline, store) for name, pipeline in pipelines.items()}, kept


def origin_of(home: epath.Path | None) -> TokenizerOrigin:
    """Where the run's tokenizer came from, for its workdir."""
    if home is None:
        return TokenizerOrigin("", untrained=True)
    return TokenizerOrigin(str(home), untrained=is_untrained("audio_encoder", Path(home)))


def data_facts(pipeline: Pipeline, codes: CodeStore | None) -> dict[str, str]:
    """What hosts that read rows of one global order must have alike."""
    if codes is None:
        return pipeline.fingerprint()
    codes_of = f"{codes.meta['frames']} frames of tokenizer {codes.meta['fingerprint']}"
    return pipeline.fingerprint() | {f"the audio codes {codes.path.name}": codes_of}
