"""Writes the store of audio codes for a run's data: every clip of its mixtures through the audio tokenizer, once.

    python launch/tokenize_audio.py --config configs/tiny.py

The store lies under the data's `.cache`, named by the tokenizer's fingerprint; one that holds all clips is kept.
Without `data.audio_tokenizer` the tokenizer is a seeded random one: its codes carry no decodable sound.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace

import jax
from absl import app, flags, logging

from baichuan_omni_jax.audio.model import AudioTokenizer
from baichuan_omni_jax.audio.tokenize import encode_windows, fingerprint
from baichuan_omni_jax.checkpoint import load_branches, with_shardings
from baichuan_omni_jax.config import MeshConfig, OmniConfig, RunConfig, apply_overrides, load_run_config, resolve_model
from baichuan_omni_jax.config.errors import exit_code
from baichuan_omni_jax.nn.param import Compute
from baichuan_omni_jax.sharding import make_mesh
from data_pipelines.codes import CodeStore
from data_pipelines.pipeline import Pipeline, open_pipeline, prepare_sample
from data_pipelines.stores import open_or_write_codes

CONFIG = flags.DEFINE_string("config", None, "run configuration file", required=True)
SET = flags.DEFINE_multi_string("set", [], "override of one key, as in data.root=DIR; may be repeated")


def quiet_logs() -> None:
    """Warnings from everybody; Orbax and Grain tell every file they touch otherwise."""
    logging.set_verbosity(logging.WARNING)


def load_tokenizer(run: RunConfig, omni: OmniConfig, mesh: jax.sharding.Mesh) -> AudioTokenizer:
    """The run's audio tokenizer: from its checkpoint, or seeded random."""
    compute = Compute()
    make = lambda: AudioTokenizer(jax.random.key(run.train.seed), omni.audio, compute)  # noqa: E731
    if not run.data.audio_tokenizer:
        return jax.jit(make)()
    abstract = with_shardings(jax.eval_shape(make), mesh, compute.rules, name="audio_encoder")
    return load_branches(run.data.audio_tokenizer, {"audio_encoder": abstract})["audio_encoder"]


def ensure_codes(run: RunConfig, omni: OmniConfig, pipelines: Sequence[Pipeline]) -> list[CodeStore]:
    """Each pipeline's code store, written first where clips are missing. One device, one process."""
    mesh = make_mesh(MeshConfig(), jax.local_devices()[:1])
    with jax.set_mesh(mesh):
        tokenizer = load_tokenizer(run, omni, mesh)
        written_by, encode = fingerprint(tokenizer), lambda windows: encode_windows(tokenizer, windows)
        return [open_or_write_codes(pipeline, written_by, encode) for pipeline in pipelines]


def open_pipelines(run: RunConfig, omni: OmniConfig) -> dict[str, Pipeline]:
    """The pipeline of the run's mixture under "", and those of its held-out mixtures by name."""
    prepare_sample(run.data)
    training = open_pipeline(run.data, omni)
    held_out = {
        mixture.name: open_pipeline(replace(run.data, mixture=mixture.sources), omni, training.processor)
        for mixture in (run.eval.mixtures if run.eval.every else ())
    }
    return {"": training} | held_out


def main(_) -> None:
    quiet_logs()

    def work():
        run = apply_overrides(load_run_config(CONFIG.value), SET.value)
        omni = resolve_model(run.model)
        for store in ensure_codes(run, omni, list(open_pipelines(run, omni).values())):
            print(f"{store.path}: {store.meta['frames']} code frames of tokenizer {store.meta['fingerprint']}")

    sys.exit(exit_code(work))


if __name__ == "__main__":
    app.run(main)
