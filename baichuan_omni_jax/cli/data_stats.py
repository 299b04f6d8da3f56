"""Counts documents and media by type and size; or, with `--config`, tells the shares of the loss in a run.

A built data set tells what its builder measured; of a manifest every media file's header is read. `--plot` draws the
distributions, which needs matplotlib (extra `show`). `--config FILE` tells instead which share of the loss each source
of a run's mixture will have, text and audio, from the run's index (made where it is missing).
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from baichuan_omni_jax.checkpoint import with_text_tokenizer
from baichuan_omni_jax.cli.common import add_set_argument
from baichuan_omni_jax.config import apply_overrides, load_run_config, resolve_model
from baichuan_omni_jax.config.loss_shares import shares_table
from baichuan_omni_jax.errors import ConfigError
from data_pipelines.pipeline import open_pipeline, prepare_sample
from data_pipelines.tools import stats


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the statistics, and those that name a run instead."""
    stats.add_arguments(parser)
    group = parser.add_argument_group("a run's shares of the loss")
    group.add_argument("--config", metavar="FILE", type=Path, help="tells the shares of the loss in this run instead")
    add_set_argument(group, "with --config: overrides one of its keys")


def run(options: argparse.Namespace) -> int:
    """Returns the exit code. Raises ConfigError for neither or both of sources and `--config`."""
    if bool(options.config) == bool(options.sources):
        raise ConfigError("give data sets and manifests to look at, or --config with a run's configuration")
    if not options.config:
        return stats.run(options)
    print_loss_shares(options.config, options.set)
    return 0


def print_loss_shares(config: Path, overrides: Sequence[str]) -> None:
    """Prints the share of the loss that each source of a run will have, text and audio. Raises ConfigError."""
    # Counted by the tokenizer of the weights that the run starts from, as the run itself does.
    run_config = with_text_tokenizer(apply_overrides(load_run_config(config), overrides))
    data = run_config.data
    prepare_sample(data)
    weighting = run_config.train.document_weighting
    pipeline = open_pipeline(data, resolve_model(run_config.model), weighting=weighting)
    title = f"{run_config.name}: expected shares, {data.weights_by} by weight, documents weighing by {weighting}"
    Console(highlight=False).print(shares_table(pipeline.loss_shares(run_config.train), title))
