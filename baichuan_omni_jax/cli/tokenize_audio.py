"""Fills the store of audio codes for a run's data: every window of sound of its mixtures through the tokenizer, once.

    baichuan-omni tokenize --config configs/tiny.py
    baichuan-omni tokenize --config CONFIG --multihost        # on every host of a slice

The store lies under the data's `.cache`, named by the tokenizer's fingerprint; codes that it has already are kept, and
after a kill the same command does what is left. Hosts must see the same data root; each works alone, on all its own
devices, and reads sound in `data.workers` processes. `--verify` reads a store back and compares every checksum.
Without `data.audio_tokenizer` the tokenizer is the one that the codes of `checkpoint.init_from` were made by, else a
seeded random one: its codes carry no decodable sound.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace

import jax
from etils import epath

from baichuan_omni_jax.audio.encoder import AudioEncoderBranch
from baichuan_omni_jax.audio.tokenize import WindowEncoder, fingerprint
from baichuan_omni_jax.checkpoint import find_tokenizer, read_tree, with_shardings, with_text_tokenizer
from baichuan_omni_jax.checkpoint.branches import branch_folder
from baichuan_omni_jax.cli.common import add_host_arguments, add_run_arguments, join_hosts, start_logging
from baichuan_omni_jax.config import MeshConfig, OmniConfig, RunConfig, apply_overrides, load_run_config, resolve_model
from baichuan_omni_jax.config.mel_targets import run_mel_targets
from baichuan_omni_jax.nn.param import ComputePolicy, named_values, with_values
from baichuan_omni_jax.sharding import make_mesh
from baichuan_omni_jax.train.groups import untrained_targets
from baichuan_omni_jax.train.hosts import (
    check_agreement,
    is_process_zero,
    on_all_hosts,
    process_zero_first,
    run_facts,
    version_facts,
)
from data_pipelines.audio_codes import CodeStore
from data_pipelines.audio_codes.build import (
    SINGLE_HOST,
    CodeBuildOptions,
    CodeEncoder,
    Hosts,
    open_or_build,
    store_path,
)
from data_pipelines.audio_codes.writer import PART_FRAMES
from data_pipelines.pipeline import Pipeline, open_pipeline, prepare_sample
from data_pipelines.tools.commands import RUNNERS, make_runner


def add_arguments(parser: argparse.ArgumentParser) -> None:
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


def tokenizer_mesh(config: MeshConfig) -> jax.sharding.Mesh:
    """This host's devices, all along `data` (as many as the run has, where that fits) and `fsdp`.

    Every device has windows of its own and whole sums, so that codes do not depend on the mesh.
    """
    devices = jax.local_devices()
    data = config.data if config.data > 0 and len(devices) % config.data == 0 else 1
    return make_mesh(MeshConfig(data=data, fsdp=-1), devices)


def load_tokenizer(
    run: RunConfig, omni: OmniConfig, mesh: jax.sharding.Mesh, home: epath.Path | None
) -> AudioEncoderBranch:
    """The run's audio tokenizer, from the checkpoint `home` or seeded random, split over `mesh` by its rules."""
    compute = ComputePolicy()
    make = lambda: AudioEncoderBranch(jax.random.key(run.train.seed), omni.audio, compute)  # noqa: E731
    abstract = with_shardings(jax.eval_shape(make), mesh, compute.rules, name="audio_encoder")
    if home is not None:
        return read_tree(home / branch_folder("audio_encoder"), abstract, "branch audio_encoder")
    # Drawn whole on every device: the same numbers on any mesh.
    drawn, places = named_values(jax.jit(make)()), named_values(abstract)
    return with_values(abstract, {name: jax.device_put(drawn[name], place.sharding) for name, place in places.items()})


def ensure_codes(
    run: RunConfig,
    omni: OmniConfig,
    pipelines: Sequence[Pipeline],
    settings: CodeBuildOptions,
    home: epath.Path | None,
    *,
    hosts: Hosts = SINGLE_HOST,
    relist: bool = False,
) -> tuple[CodeStore, AudioEncoderBranch]:
    """The store with the codes of all sound of these mixtures of one data root, filled where it lacks any; and the
    tokenizer that made them. `home` is where `find_tokenizer` found that.
    """
    mesh = tokenizer_mesh(run.mesh)
    with jax.set_mesh(mesh):
        model = load_tokenizer(run, omni, mesh, home)
        tokenizer = CodeEncoder(fingerprint(model), WindowEncoder(model, mesh))
        if hosts is not SINGLE_HOST:
            check_agreement({"the audio tokenizer": tokenizer.fingerprint})
        path = store_path(pipelines[0], tokenizer)
        return open_or_build(path, pipelines, tokenizer, settings, hosts, relist), model


def open_pipelines(run: RunConfig, omni: OmniConfig) -> dict[str, Pipeline]:
    """The pipeline of the run's mixture under "", and those of its held-out mixtures by name."""
    prepare_sample(run.data)
    targets = run_mel_targets(run, omni)
    # Known here already, since what a document weighs is shared out among the targets that count.
    untrained = untrained_targets(run, omni) if run.task == "omni" else ()
    weighting = run.train.document_weighting
    training = open_pipeline(run.data, omni, targets=targets, weighting=weighting, untrained=untrained)
    held_out = {
        mixture.name: open_pipeline(replace(run.data, mixture=mixture.sources), omni, training.processor, targets)
        for mixture in (run.eval.mixtures if run.eval.every or run.eval.audio_every else ())
    }
    return {"": training} | held_out


def run(options: argparse.Namespace) -> None:
    """Fills the store, and says where it lies and what it holds. Raises ConfigError naming what cannot be used."""
    start_logging()
    join_hosts(options)
    tokenize(options)


def tokenize(options: argparse.Namespace) -> None:
    """Does the work of this host, which has joined the others."""
    # By the text tokenizer of the run: the index is the run's own, and the same documents fit its rows.
    run = on_all_hosts(lambda: with_text_tokenizer(apply_overrides(load_run_config(options.config), options.set)))
    omni = on_all_hosts(lambda: resolve_model(run.model))
    check_agreement(version_facts() | run_facts(run))
    pipelines = list(process_zero_first(lambda: open_pipelines(run, omni)).values())
    settings = on_all_hosts(lambda: make_settings(options, run.data.workers))
    alone = jax.process_count() == 1
    hosts = SINGLE_HOST if alone else Hosts(jax.process_count(), jax.process_index(), process_zero_first, on_all_hosts)
    home = on_all_hosts(lambda: find_tokenizer(run))
    store, _ = ensure_codes(run, omni, pipelines, settings, home, hosts=hosts, relist=True)
    if options.verify:
        process_zero_first(lambda: store.verify() if is_process_zero() else None)
    if is_process_zero():
        print(f"{store.path}: {len(store)} windows, {store.meta['frames']} code frames", end=" ")
        print(f"of tokenizer {store.meta['fingerprint']}" + (", all as written" if options.verify else ""))


def make_settings(options: argparse.Namespace, workers: int) -> CodeBuildOptions:
    """What the command line says of the work. Only host 0 talks."""
    report = print if is_process_zero() else lambda _: None
    beam = make_runner("beam", workers) if options.runner == "beam" else None
    return CodeBuildOptions(workers, beam, options.part_frames, report)
