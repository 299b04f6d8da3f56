"""One training step: losses over a packed global batch, gradients, update, metrics."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool

from baichuan_omni_jax.config import RunConfig
from baichuan_omni_jax.nn.remat import split_parts
from baichuan_omni_jax.omni.batch import Batch
from baichuan_omni_jax.train.state import Arrays, OptState, StepSpec
from baichuan_omni_jax.train.tasks import Moved
from baichuan_omni_jax.train.tasks.task import Metrics

Gradients = tuple[Arrays, Metrics, Moved]


def make_gradients(spec: StepSpec, run: RunConfig) -> Callable[..., Gradients]:
    """(trainable, frozen, batch, extra) -> (gradients, losses, what moved).

    The batch goes in `train.accumulate` parts, one after the other, summed in fp32. `extra` is the task's own state.
    """
    task = spec.task

    def of_part(trainable, frozen, batch, by, extra):
        def loss(trainable):
            return task.loss(spec.assemble(trainable, frozen), batch, by, extra)

        gradients, (metrics, moved) = jax.grad(loss, has_aux=True)(trainable)
        return gradients, metrics, moved

    def of_batch(trainable, frozen, batch, extra=()):
        batch = task.weigh(batch)
        by, count = task.denominators(batch), run.train.accumulate
        if count == 1:
            return of_part(trainable, frozen, batch, by, extra)
        parts = {name: split_parts(field, count) for name, field in batch.items()}

        def add(total, part):
            found = of_part(trainable, frozen, part, by, extra)
            return jax.tree.map(lambda total, one: total + one.astype(jnp.float32), total, found), None

        zeros = jax.tree.map(
            lambda x: jnp.zeros_like(x, jnp.float32),
            jax.eval_shape(of_part, trainable, frozen, jax.tree.map(lambda x: x[0], parts), by, extra),
        )
        return jax.lax.scan(add, zeros, parts)[0]

    return of_batch


def make_step(
    spec: StepSpec, run: RunConfig
) -> Callable[[Arrays, Arrays, Any, Batch], tuple[Arrays, Arrays, Any, Metrics]]:
    """The compiled step: (trainable, frozen, opt_state, batch) -> (trainable, moved, opt_state, metrics).

    `moved` are those of the frozen parameters that the task changes without a gradient. Where the loss or the
    gradient's norm is not finite, parameters and state come back as they were, bit for bit, and `nonfinite` is 1
    (else 0).
    The first and third argument are donated, but not on CPU. There the gradients and the update are two programs:
    in one, XLA's concurrent CPU runtime was seen to get the gradients right but their global norm wrong in some calls
    (jax 0.10.2; https://github.com/jax-ml/jax/issues/39741 looks like it), and a resumed run must repeat the
    uninterrupted one exactly.
    """
    gradients_of_batch = make_gradients(spec, run)

    def gradients_of(trainable, frozen, extra, batch):
        gradients, metrics, moved = gradients_of_batch(trainable, frozen, batch, extra)
        before = {name: frozen[name] for name in moved.values}, extra
        return gradients, metrics | spec.task.batch_numbers(spec.task.weigh(batch)), moved, before

    def update(gradients, trainable, opt_state, loss, moved, before):
        with jax.named_scope("optimizer"):
            norm = optax.global_norm(gradients)
            finite = jnp.isfinite(norm) & jnp.isfinite(loss)
            updates, new_state = spec.optimizer.update(gradients, opt_state, trainable)
            after = optax.apply_updates(trainable, updates)
            values, extra = moved.values, spec.task.finish(moved.extra, after)
            new, old = (after, new_state, values, extra), (trainable, opt_state, *before)
            return *_where(finite, new, old), {"gradient_norm": norm, "nonfinite": 1.0 - finite}

    on_cpu = spec.mesh.devices.flat[0].platform == "cpu"
    if on_cpu:
        gradients_of, update = jax.jit(gradients_of), jax.jit(update)

    def step(trainable, frozen, opt_state, batch):
        optimizer, extra = opt_state if isinstance(opt_state, OptState) else (opt_state, ())
        gradients, metrics, moved, before = gradients_of(trainable, frozen, extra, batch)
        trainable, optimizer, values, extra, numbers = update(
            gradients, trainable, optimizer, metrics["loss"], moved, before
        )
        opt_state = OptState(optimizer, extra) if isinstance(opt_state, OptState) else optimizer
        return trainable, values, opt_state, metrics | numbers

    return step if on_cpu else jax.jit(step, donate_argnums=(0, 2))


def _where(condition: Bool[Array, ""], new, old):
    return jax.tree.map(lambda new, old: jnp.where(condition, new, old), new, old)
