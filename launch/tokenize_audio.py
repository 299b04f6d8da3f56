"""Writes the store of audio codes for a run's data: every clip of its mixture through the audio tokenizer, once.

    python launch/tokenize_audio.py --config configs/tiny.py

The store lies under the data's `.cache`, named by the tokenizer's fingerprint; one that holds all clips is kept.
Without `data.audio_tokenizer` the tokenizer is a seeded random one: its codes carry no decodable sound.
"""

import sys

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


def ensure_codes(run: RunConfig, omni: OmniConfig, pipeline: Pipeline) -> CodeStore:
    """The code store of the run's data, written first where clips are missing. One device, one process."""
    mesh = make_mesh(MeshConfig(), jax.local_devices()[:1])
    with jax.set_mesh(mesh):
        tokenizer = load_tokenizer(run, omni, mesh)
        return open_or_write_codes(pipeline, fingerprint(tokenizer), lambda windows: encode_windows(tokenizer, windows))


def main(_) -> None:
    quiet_logs()

    def work():
        run = apply_overrides(load_run_config(CONFIG.value), SET.value)
        omni = resolve_model(run.model)
        prepare_sample(run.data)
        store = ensure_codes(run, omni, open_pipeline(run.data, omni))
        print(f"{store.path}: {store.meta['frames']} code frames of tokenizer {store.meta['fingerprint']}")

    sys.exit(exit_code(work))


if __name__ == "__main__":
    app.run(main)
