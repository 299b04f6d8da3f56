"""One tiny training step, twice from the same state on all devices: it runs, its loss is finite, its bits repeat.

The step is that of a run (the same code, the same kernels), of a model with every branch, on made-up rows: random text
with a picture and audio codes in it. On a CPU it is compiled with few optimizations, to be done in seconds.
"""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from baichuan_omni_jax.config import (
    Budgets,
    ComputeConfig,
    DataConfig,
    MeshConfig,
    OmniConfig,
    OptimizerConfig,
    RunConfig,
    SourceConfig,
    TrainConfig,
    resolve_model,
)
from baichuan_omni_jax.config.run import Dtype
from baichuan_omni_jax.doctor.report import Line, Setting, Verdict
from baichuan_omni_jax.omni.batch import Batch
from baichuan_omni_jax.sharding import make_mesh
from baichuan_omni_jax.train.hosts import warm_up_collectives
from baichuan_omni_jax.train.state import init_state, make_compute, make_step_spec
from baichuan_omni_jax.train.step import compile_step

TOKENS, PATCHES, FRAMES, TARGETS = 128, 64, 16, 16
# Of the tiny model's widths: parameters are split over at most so many devices, the rest share out rows.
_MOST_FSDP = 8


def tiny_run(devices: int, dtype: Dtype) -> RunConfig:
    """Makes the run of a step on so many devices: a row each, parameters split over up to eight of them."""
    fsdp = math.gcd(devices, _MOST_FSDP)
    return RunConfig(
        name="doctor",
        model="tiny",
        mesh=MeshConfig(data=devices // fsdp, fsdp=fsdp),
        data=DataConfig(
            # Rows are made here; a run needs a source by name.
            mixture=(SourceConfig(name="made-up", manifest="none.jsonl"),),
            rows=devices,
            budgets=Budgets(tokens=TOKENS, patches=PATCHES, audio_frames=FRAMES, audio_targets=TARGETS),
        ),
        optimizer=OptimizerConfig(warmup_steps=0, decay_steps=10),
        compute=ComputeConfig(dtype=dtype, remat="none", loss_chunk=TOKENS, attention_block=TOKENS),
        train=TrainConfig(steps=1, frozen_dtype="float32"),
    )


def check_step(setting: Setting) -> Iterator[Line]:
    """Runs the step twice and compares every number of both results."""
    on_cpu = jax.default_backend() == "cpu"
    run = tiny_run(len(jax.devices()), "float32" if on_cpu else "bfloat16")
    omni, mesh, compute = resolve_model(run.model), make_mesh(run.mesh), make_compute(run)
    warm_up_collectives(mesh)
    with jax.set_mesh(mesh), _few_optimizations(on_cpu):
        spec = make_step_spec(run, omni, mesh, compute)
        state, _ = init_state(run, spec)
        batch = place_rows(made_up_rows(run.data.rows, omni), spec.task.abstract_batch(mesh))
        step = compile_step(spec)

        # A step reuses its state's memory, but on a CPU, so each gets a copy.
        copy = (lambda state: state) if on_cpu else jax.jit(lambda state: jax.tree.map(jnp.copy, state))
        start = time.perf_counter()
        first, metrics = jax.block_until_ready(step(copy(state), batch))
        compiled = time.perf_counter() - start
        start = time.perf_counter()
        second, again = jax.block_until_ready(step(copy(state), batch))
        seconds = time.perf_counter() - start
        differing = list_differing((first, metrics), (second, again))
        moved = list_differing(state.trainable, first.trainable)
    yield from _step_lines(float(metrics["loss"]), differing, moved, compiled, seconds)


@contextmanager
def _few_optimizations(wanted: bool) -> Iterator[None]:
    """Compiles with few optimizations meanwhile, where that is wanted: on a CPU compiling is most of the time."""
    if not wanted:
        yield
        return
    # Not readable as an attribute, and off by default.
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", False)


def _step_lines(loss: float, differing: list[str], moved: list[str], compiled: float, seconds: float) -> Iterator[Line]:
    text = f"compiled and run in {compiled:.1f} s, run again in {1e3 * seconds:.0f} ms, loss {loss:.3f}"
    values = {"loss": loss, "first_s": compiled, "second_s": seconds}
    if not math.isfinite(loss):
        advice = "a part of the model computes no numbers here: see the lines of kernels"
        yield Line("step", Verdict.FAIL, text, advice, values)
    elif not moved:
        yield Line("step", Verdict.FAIL, f"{text}, but no parameter was updated", "report chip and versions", values)
    else:
        yield Line("step", Verdict.OK, text, values=values)
    if not differing:
        yield Line("step", Verdict.OK, "the same step twice gives the same bits")
        return
    named = f"the same step twice differs in {len(differing)} arrays, {differing[0]} among them"
    if jax.default_backend() == "gpu":
        advice = "runs are not resumed bit for bit: XLA_FLAGS=--xla_gpu_deterministic_ops=true makes them, slower"
        yield Line("step", Verdict.WARN, named, advice)
    else:
        advice = "on this kind of device nothing is left to chance: a chip, its memory or a link is broken"
        yield Line("step", Verdict.FAIL, named, advice)


def list_differing(one: Any, other: Any) -> list[str]:
    """Names the arrays of two alike trees of which this host's parts are not equal bit for bit."""

    def parts(array: jax.Array) -> list[bytes]:
        return [np.asarray(shard.data).tobytes() for shard in array.addressable_shards]

    pairs = zip(jax.tree_util.tree_leaves_with_path(one), jax.tree.leaves(other), strict=True)
    return [jax.tree_util.keystr(path) for (path, a), b in pairs if parts(a) != parts(b)]


def made_up_rows(rows: int, omni: OmniConfig, seed: int = 0) -> Batch:
    """Makes packed rows of two documents: random text, a picture and audio that is read, and audio to predict."""
    rng = np.random.default_rng(seed)
    levels, visual = omni.audio.levels, PATCHES // omni.vision.merged_patches
    half = TOKENS // 2

    def everywhere(values: np.ndarray, dtype: str = "int32") -> np.ndarray:
        return np.broadcast_to(values, (rows, *values.shape)).astype(dtype)

    def codes(count: int) -> np.ndarray:
        return rng.integers(0, omni.audio.codebook_sizes, (rows, count, levels)).astype(np.int32)

    # The first document has the media, from its start on; the second is text alone, and padding ends the row.
    ids = np.repeat([1, 2, 0], [half, half - 8, 8])
    tokens = rng.integers(0, omni.llm.vocab_size, (rows, TOKENS + 1)).astype(np.int32)
    spoken = half - TARGETS - 1 + np.arange(TARGETS)  # the slots whose states predict a frame
    # A square picture: rows and columns of its patches.
    side = math.isqrt(PATCHES)
    grid = np.stack(np.divmod(np.arange(PATCHES), side), -1)
    return {
        "tokens": tokens[:, :-1],
        "text_targets": tokens[:, 1:],
        "positions": everywhere(np.arange(TOKENS) % half),
        "segment_ids": everywhere(ids),
        "document_ids": everywhere(ids - 1),
        "source_ids": everywhere(np.where(ids > 0, 0, -1)),
        "text_weights": everywhere(ids > 0, "float32"),
        "text_target_index": np.zeros((rows, 0), np.int32),
        "patches": rng.integers(0, 256, (rows, PATCHES, omni.vision.patch_values)).astype(np.uint8),
        "patch_grid": everywhere(grid),
        "patch_segments": everywhere(np.ones(PATCHES)),
        "visual_index": everywhere(np.arange(visual)),
        "audio_codes": codes(FRAMES),
        "audio_index": everywhere(visual + np.arange(FRAMES)),
        "audio_targets": codes(TARGETS),
        "audio_weights": np.ones((rows, TARGETS, levels), np.float32),
        "audio_target_index": everywhere(spoken),
        "audio_target_sources": everywhere(np.zeros(TARGETS)),
    }


def place_rows(rows: Batch, shapes: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """Places rows that every host made alike: each device takes its part."""
    return {
        name: jax.make_array_from_callback(shape.shape, shape.sharding, lambda place, name=name: rows[name][place])
        for name, shape in shapes.items()
    }
