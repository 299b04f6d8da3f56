"""The commands on the data of a run: `tokenize` fills its store of audio codes, `data stats` counts what it holds."""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import jax
from rich.console import Console

from baichuan_omni_jax.checkpoint import find_tokenizer, with_text_tokenizer
from baichuan_omni_jax.cli.common import (
    add_host_arguments,
    add_run_arguments,
    add_set_argument,
    join_hosts,
    start_logging,
)
from baichuan_omni_jax.config import RunConfig, load_run_config, resolve_model
from baichuan_omni_jax.config.loss_shares import shares_table
from baichuan_omni_jax.errors import ConfigError
from baichuan_omni_jax.train.hosts import (
    check_agreement,
    is_process_zero,
    on_all_hosts,
    process_zero_first,
    run_facts,
    version_facts,
)
from baichuan_omni_jax.train.run_data import ensure_codes, open_pipelines
from data_pipelines.audio_codes.build import SINGLE_HOST, CodeBuildOptions, Hosts
from data_pipelines.audio_codes.writer import PART_FRAMES
from data_pipelines.packing.rows import worker_count
from data_pipelines.pipeline import open_pipeline, prepare_sample
from data_pipelines.tools import stats
from data_pipelines.tools.commands import RUNNERS, make_runner


def add_tokenize_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `tokenize`."""
    add_run_arguments(parser)
    add = parser.add_argument
    add(
        "--runner",
        choices=RUNNERS,
        default="local",
        help="what lists the documents: processes of this machine, or Apache Beam (default %(default)s)",
    )
    add(
        "--part-frames",
        "--part_frames",
        type=int,
        default=PART_FRAMES,
        metavar="N",
        help="code frames of a file of a new store: what a kill costs at most (default %(default)s)",
    )
    add("--verify", action="store_true", help="read the store back and compare its checksums")
    add_host_arguments(parser)


def run_tokenize(options: argparse.Namespace) -> None:
    """Fills the store of audio codes for a run's data: every window of its clips through the audio tokenizer, once.

        baichuan-omni tokenize --config configs/tiny.py
        baichuan-omni tokenize --config CONFIG --multihost        # on every host of a slice

    The store lies under the data's `.cache`, named by the tokenizer's fingerprint; codes that it has already are kept,
    and after a kill the same command does what is left. Hosts must see the same data root; each works alone, on all its
    own devices, and reads audio in `data.workers` processes. `--verify` reads a store back and compares every checksum.
    Without `data.audio_tokenizer` the tokenizer is the one that the codes of `checkpoint.init_from` were made by, else
    a seeded random one: its codes carry no decodable audio.
    """
    start_logging()
    join_hosts(options)
    # By the text tokenizer of the run: the index is the run's own, and the same documents fit its rows.
    run = on_all_hosts(lambda: load_to_prepare(options.config, options.set))
    omni = on_all_hosts(lambda: resolve_model(run.model))
    check_agreement(version_facts() | run_facts(run))
    # Process 0 builds the index and writes it, the others read it.
    pipelines = list(process_zero_first(lambda: open_pipelines(run, omni)).values())
    build = on_all_hosts(lambda: make_build_options(options, worker_count(run.data)))
    alone = jax.process_count() == 1
    hosts = SINGLE_HOST if alone else Hosts(jax.process_count(), jax.process_index(), process_zero_first, on_all_hosts)
    # Each host encodes its share of the clips on its own devices; nothing is exchanged but what is done.
    home = on_all_hosts(lambda: find_tokenizer(run))
    store, _ = ensure_codes(run, omni, pipelines, build, home, hosts=hosts, relist=True)
    if options.verify:
        # One host reads everything back; the others wait, for their codes are among it.
        process_zero_first(lambda: store.verify() if is_process_zero() else None)
    if is_process_zero():
        print(f"{store.path}: {len(store)} windows, {store.meta['frames']} code frames", end=" ")
        print(f"of tokenizer {store.meta['fingerprint']}" + (", all as written" if options.verify else ""))


def load_to_prepare(config: str | Path, overrides: Sequence[str]) -> RunConfig:
    """Reads a run whose data are to be prepared, however many: by the tokenizer of the weights that it starts from."""
    run = with_text_tokenizer(load_run_config(config, overrides))
    return replace(run, data=replace(run.data, max_unprepared_mb=0))


def make_build_options(options: argparse.Namespace, workers: int) -> CodeBuildOptions:
    """How the store is filled, by the command line. Only process 0 reports."""
    # Beam only lists the documents; encoding is the devices' work, here.
    report = print if is_process_zero() else lambda _: None
    beam = make_runner("beam", workers) if options.runner == "beam" else None
    return CodeBuildOptions(workers, beam, options.part_frames, report)


def add_stats_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the statistics, and those that name a run instead."""
    stats.add_arguments(parser)
    group = parser.add_argument_group("a run's shares of the loss")
    group.add_argument("--config", metavar="FILE", type=Path, help="tells the shares of the loss in this run instead")
    add_set_argument(group, "with --config: overrides one of its keys")


def run_stats(options: argparse.Namespace) -> int:
    """Counts documents and media by type and size; or, with `--config`, tells the shares of the loss in a run.

    A built data set tells what its builder measured; of a manifest every media file's header is read. `--plot` draws
    the distributions, which needs matplotlib (extra `show`). `--config FILE` tells instead which share of the loss each
    source of a run's mixture will have, text and audio, from the run's index (made where it is missing).
    """
    if bool(options.config) == bool(options.sources):
        raise ConfigError("give data sets and manifests to look at, or --config with a run's configuration")
    if not options.config:
        return stats.run(options)
    print_loss_shares(options.config, options.set)
    return 0


def print_loss_shares(config: Path, overrides: Sequence[str]) -> None:
    """Prints the share of the loss that each source of a run will have, text and audio. Raises ConfigError."""
    # Counted by the tokenizer of the weights that the run starts from, as the run itself does.
    run_config = load_to_prepare(config, overrides)
    data = run_config.data
    prepare_sample(data)
    weighting = run_config.train.document_weighting
    pipeline = open_pipeline(data, resolve_model(run_config.model), weighting=weighting)
    title = f"{run_config.name}: expected shares, {data.weights_by} by weight, documents weighing by {weighting}"
    Console(highlight=False).print(shares_table(pipeline.loss_shares(run_config.train), title))
