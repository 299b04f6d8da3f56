"""The losses of the tiny model, and documents of every kind to try them on."""

import jax
import jax.numpy as jnp
import numpy as np

from baichuan_omni_jax.config import Budgets
from baichuan_omni_jax.nn.param import named_values, with_values
from baichuan_omni_jax.omni.model import OmniModel
from baichuan_omni_jax.train.losses import (
    omni_denominators,
    omni_loss,
)
from baichuan_omni_jax.train.state import make_compute
from data_pipelines.packing.batch import RowWriter, empty_rows
from tests.helpers.micro import one_device, open_micro, place

# Of max|difference| / max|reference| per tensor, fp32.
TOLERANCE = 1e-5
LEVELS = 8
BUDGETS = Budgets(tokens=512, patches=512, audio_frames=256, audio_targets=160)


class Losses:
    """A tiny model and the gradient of `sum(weights * losses)`, losses being the text's and each audio level's."""

    def __init__(self, run, omni):
        self.run, self.omni, self.mesh = run, omni, one_device()
        with jax.set_mesh(self.mesh):
            self.compute = make_compute(run)
            self.model = jax.jit(lambda: OmniModel(jax.random.key(0), omni, self.compute))()
            self._gradient = jax.jit(jax.grad(self._weighted, has_aux=True))

    def _weighted(self, values, batch, weights):
        denominators = omni_denominators(batch, self.run)
        _, metrics = omni_loss(with_values(self.model, values), batch, self.run, denominators)
        losses = [metrics["loss_text"], *(metrics[f"loss_audio_q{level}"] for level in range(LEVELS))]
        return (jnp.stack(losses) * weights).sum(), metrics

    def __call__(self, batch, weights):
        """(metrics, gradient by parameter name) as numpy arrays."""
        with jax.set_mesh(self.mesh), jax.default_matmul_precision("highest"):
            gradient, metrics = self._gradient(
                named_values(self.model), place(batch, self.mesh, self.compute.rules), jnp.asarray(weights, jnp.float32)
            )
        return jax.tree.map(np.asarray, metrics), jax.tree.map(np.asarray, gradient)


def rows_of(documents, budgets, omni):
    """One row holding all of `documents`."""
    batch = empty_rows(1, budgets, omni)
    writer = RowWriter(batch, 0)
    for number, document in enumerate(documents):
        writer.add(document, source=0, number=number)
    return batch


def sample_documents(run, folder):
    """An image, a video, speech to read, speech to predict, text, and an image with audio, from the sample data."""
    pipeline, codes = open_micro(run, folder / "store")
    encode = lambda index, number: pipeline.processor.encode(index.document(number), codes)  # noqa: E731
    found = {index.name: [encode(index, number) for number in index.numbers()] for index in pipeline.indexes}
    heard = next(d for d in found["audio"] if len(d.audio_codes) and not len(d.audio_targets))
    spoken = next(d for d in found["audio"] if len(d.audio_targets))
    both = next(d for d in found["omni"] if len(d.patches) and len(d.audio_codes))
    return [found["image"][0], heard, found["video"][0], spoken, found["text"][0], both]
