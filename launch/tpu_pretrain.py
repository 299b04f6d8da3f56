"""Trains: the same command on a laptop's CPU, a GPU, a TPU VM or every host of a pod slice.

    python launch/tpu_pretrain.py --config configs/tiny.py --workdir runs/tiny [--set train.steps=20 ...]

Started again with the same workdir, it goes on where it stopped; SIGTERM saves and leaves. Numbers go to
WORKDIR/metrics.jsonl and WORKDIR/tensorboard. Exit code 2: something given cannot be used, the message says what.
"""

import sys
from dataclasses import replace
from pathlib import Path

from absl import app, flags
from tokenize_audio import CONFIG, SET, ensure_codes, quiet_logs

from baichuan_omni_jax.checkpoint import (
    Workdir,
    check_run_config,
    find_parent,
    initial_tokenizer,
    record_parent,
    stored_tokenizer,
)
from baichuan_omni_jax.config import OmniConfig, RunConfig, apply_overrides, load_run_config, resolve_model
from baichuan_omni_jax.config.errors import exit_code
from baichuan_omni_jax.train.hosts import join, leader_first, rows_of_host
from baichuan_omni_jax.train.loop import set_up, train
from data_pipelines.codes import CodeStore
from data_pipelines.pipeline import Pipeline, open_pipeline, prepare_sample
from data_pipelines.rows import Shard
from data_pipelines.training import TrainingData

WORKDIR = flags.DEFINE_string("workdir", None, "where the run's checkpoints and numbers go", required=True)
MULTIHOST = flags.DEFINE_bool("multihost", False, "join the other hosts of the slice (jax.distributed) first")


def pretrain() -> None:
    if MULTIHOST.value:
        join()
    run = apply_overrides(load_run_config(CONFIG.value), SET.value)
    omni = resolve_model(run.model)
    # Everything that can refuse the run comes before it claims the workdir.
    setup, compute = set_up(run, omni)
    workdir = Workdir(Path(WORKDIR.value), keep=run.checkpoint.keep)
    check_run_config(workdir.path, run)
    parent = find_parent(workdir.path, run.checkpoint.init_from, run.branches)
    pipeline, codes = leader_first(lambda: prepare(run, omni, workdir))
    workdir.write_run_config(run)
    record_parent(workdir.path, parent)
    shard = Shard(rows_of_host(setup.mesh, compute.rules, run.data.rows))
    train(run, omni, workdir, TrainingData(pipeline, codes, shard), parent)
    workdir.close()


def prepare(run: RunConfig, omni: OmniConfig, workdir: Workdir) -> tuple[Pipeline, CodeStore]:
    """The run's indexed data and audio codes, built where they are not there yet.

    Without `data.tokenizer` the weights' own is used: the workdir's, then that of `checkpoint.init_from`.
    """
    own = stored_tokenizer(workdir.path) or initial_tokenizer(run.checkpoint.init_from, run.branches) or ""
    run = replace(run, data=replace(run.data, tokenizer=run.data.tokenizer or str(own)))
    prepare_sample(run.data)
    pipeline = open_pipeline(run.data, omni)
    return pipeline, ensure_codes(run, omni, pipeline)


def main(_) -> None:
    quiet_logs()
    sys.exit(exit_code(pretrain))


if __name__ == "__main__":
    app.run(main)
