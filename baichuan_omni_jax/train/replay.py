"""A step computed twice and compared bit for bit: a chip that computes wrongly now and then raises no error."""

import jax
import jax.numpy as jnp

from baichuan_omni_jax.omni.batch import Batch
from baichuan_omni_jax.train.state import Arrays, StepSpec, TrainState
from baichuan_omni_jax.train.step import Gradients, compute_gradients, train_step


class StepReplay:
    """Says which arrays of a step's result differ between two calls of one program on the same state and batch.

    Of the result only sums of its bits leave the program, so that it needs little more memory than the step, and the
    state is not donated. Two programs may round differently: the step of the run itself is not compared.
    """

    def __init__(self, spec: StepSpec) -> None:
        def gradients(state: TrainState, batch: Batch) -> Gradients:
            return compute_gradients(state, batch, spec)

        def sums(state: TrainState, batch: Batch, computed: Gradients | None = None) -> Arrays:
            new, metrics = train_step(state, batch, spec, computed)
            results = {
                "parameter": new.trainable,
                "optimizer": new.opt_state,
                "state": new.aux_state,
                "number": metrics,
            }
            leaves = jax.tree_util.tree_leaves_with_path(results)
            return {jax.tree_util.keystr(path, simple=True, separator=" "): bit_sum(leaf) for path, leaf in leaves}

        # On CPU as the step itself (`CompiledStep`): in two programs.
        self._two_programs = spec.mesh.devices.flat[0].platform == "cpu"
        self._gradients, self._sums = jax.jit(gradients), jax.jit(sums)

    def __call__(self, state: TrainState, batch: Batch) -> list[str]:
        """Computes the next step twice; returns the names of what differs, none where all is well. Waits for both."""
        first, second = (jax.device_get(self._compute(state, batch)) for _ in range(2))
        return [name for name in first if first[name] != second[name]]

    def _compute(self, state: TrainState, batch: Batch) -> Arrays:
        if self._two_programs:
            return self._sums(state, {}, self._gradients(state, batch))
        return self._sums(state, batch)


def bit_sum(value: jax.Array) -> jax.Array:
    """Sums an array's bits as unsigned integers modulo 2^32: one flipped bit changes it, the order does not."""
    kind = jnp.dtype(f"uint{8 * value.dtype.itemsize}")
    bits = value if value.dtype == jnp.bool_ else jax.lax.bitcast_convert_type(value, kind)
    return bits.astype(jnp.uint32).sum(dtype=jnp.uint32)
