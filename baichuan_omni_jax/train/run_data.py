"""Opens the data of a run: the pipelines of its mixtures, their audio codes, the tokenizer that makes the codes."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import jax
import numpy as np
from etils import epath

from baichuan_omni_jax.audio.encoder import AudioEncoderBranch, WindowEncoder, fingerprint
from baichuan_omni_jax.checkpoint import read_tree, with_shardings, with_text_tokenizer
from baichuan_omni_jax.checkpoint.branches import KEPT, branch_folder
from baichuan_omni_jax.config import MeshConfig, OmniConfig, RunConfig
from baichuan_omni_jax.config.mel_targets import run_mel_targets
from baichuan_omni_jax.nn.param import ComputePolicy, named_values, with_values
from baichuan_omni_jax.sharding import make_mesh
from baichuan_omni_jax.train.groups import untrained_targets
from baichuan_omni_jax.train.hosts import check_agreement
from data_pipelines.audio_codes.build import (
    SINGLE_HOST,
    CodeBuildOptions,
    CodeEncoder,
    Hosts,
    open_or_build_shared,
)
from data_pipelines.audio_codes.store import CodeStore
from data_pipelines.packing.rows import worker_count
from data_pipelines.pipeline import Pipeline, open_pipeline, prepare_sample


class MixtureData(NamedTuple):
    """One mixture of a run; `codes` is None in tasks that train on audio itself."""

    pipeline: Pipeline
    codes: CodeStore | None

    def facts(self) -> dict[str, str]:
        """What hosts that read rows of one global order must have alike, by name."""
        if self.codes is None:
            return self.pipeline.fingerprint()
        told = f"{self.codes.meta['frames']} frames of tokenizer {self.codes.meta['fingerprint']}"
        return self.pipeline.fingerprint() | {f"the audio codes {self.codes.path.name}": told}


def open_run_data(
    run: RunConfig, omni: OmniConfig, workdir: epath.Path, home: epath.Path | None
) -> tuple[dict[str, MixtureData], AudioEncoderBranch | None]:
    """Opens all data of a run, which are indexed and get their audio codes where they lack them.

    Args:
        run: its configuration. Without `data.tokenizer` the text tokenizer of the weights is used: the workdir's, then
            that of `checkpoint.init_from`.
        omni: its architecture.
        workdir: its folder.
        home: the checkpoint that `find_tokenizer` found the audio tokenizer in; None: it is drawn from `train.seed`.

    Returns:
        The run's mixture under "" and the held-out mixtures by name; and the audio tokenizer in numpy where the run
        needs one that the workdir does not keep yet, else None.

    Raises:
        ConfigError: documents, folders or the tokenizer cannot be used.
    """
    run = with_text_tokenizer(run, workdir)
    pipelines = open_pipelines(run, omni)
    store = kept = None
    if run.task == "omni":
        build = CodeBuildOptions(worker_count(run.data))
        store, tokenizer = ensure_codes(run, omni, list(pipelines.values()), build, home)
        if "audio_head" in run.branches and home != workdir / KEPT:
            # In the host's memory: the devices are for the training state.
            values = {name: np.asarray(value) for name, value in named_values(tokenizer).items()}
            kept = with_values(tokenizer, values)
    return {name: MixtureData(pipeline, store) for name, pipeline in pipelines.items()}, kept


def open_pipelines(run: RunConfig, omni: OmniConfig) -> dict[str, Pipeline]:
    """The pipeline of the run's mixture under "", and those of its held-out mixtures by name."""
    prepare_sample(run.data)
    targets = run_mel_targets(run, omni)
    # Known here already, since what a document weighs is shared out among the targets that count.
    untrained = untrained_targets(run, omni) if run.task == "omni" else ()
    weighting = run.train.document_weighting
    training = open_pipeline(run.data, omni, targets=targets, weighting=weighting, untrained_targets=untrained)
    held_out = {
        mixture.name: open_pipeline(replace(run.data, mixture=mixture.sources), omni, training.processor, targets)
        for mixture in run.eval.mixtures
        if run.eval.every or run.eval.audio_every or mixture.name in run.eval.abilities
    }
    return {"": training} | held_out


def ensure_codes(
    run: RunConfig,
    omni: OmniConfig,
    pipelines: Sequence[Pipeline],
    build: CodeBuildOptions,
    home: epath.Path | None,
    *,
    hosts: Hosts = SINGLE_HOST,
    relist: bool = False,
) -> tuple[CodeStore, AudioEncoderBranch]:
    """Opens the store of audio codes, and encodes what it lacks.

    Args:
        run: its mesh and seed.
        omni: its architecture.
        pipelines: mixtures of one data root, whose clips the store must hold.
        build: how the store is filled.
        home: as in `open_run_data`.
        hosts: those that share the work; each encodes on its own devices.
        relist: whether to look through all documents again, where the store counts as complete.

    Returns:
        The store, and the tokenizer that made its codes, on this host's devices.
    """
    mesh = _tokenizer_mesh(run.mesh)
    with jax.set_mesh(mesh):
        model = load_audio_tokenizer(run, omni, mesh, home)
        encoder = CodeEncoder(fingerprint(model), WindowEncoder(model, mesh))
        if hosts is not SINGLE_HOST:
            check_agreement({"the audio tokenizer": encoder.fingerprint})
        return open_or_build_shared(pipelines, encoder, build, hosts, relist), model


def _tokenizer_mesh(config: MeshConfig) -> jax.sharding.Mesh:
    """This host's devices, all along `data` (as many as the run has, where that fits) and `fsdp`.

    Every device has windows of its own and whole sums, so that codes do not depend on the mesh.
    """
    devices = jax.local_devices()
    data = config.data if config.data > 0 and len(devices) % config.data == 0 else 1
    return make_mesh(MeshConfig(data=data, fsdp=-1), devices)


def load_audio_tokenizer(
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
