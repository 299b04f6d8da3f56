"""How well does preflight's model of time predict steps that others measured? No device is needed.

    python benchmarks/published_steps.py

The runs are MaxText's published ones (its configs' README files for v5e and v5p, and its table of optimized models),
with the settings of the scripts beside them: sequences of 2048 or 8192, all of a layer's products made again or none
(or all but what is kept in the hosts' memory), weights split over all chips or those that `tensor` leaves. Shares of
peak in `step_time` were chosen on the rows marked `calibration`, one a chip; the others are predictions. MFU as
published: attention counted without the causal mask. What offloading to hosts costs is not in the model.
"""

import argparse
import statistics
import sys
from dataclasses import dataclass

from rows import emit, row

from baichuan_omni_jax.flops.terms import TPUS
from baichuan_omni_jax.train.preflight.step_time import TORUS, Exchange, Work, predict

CHIPS = {chip.name: chip for chip in TPUS.values()}


@dataclass(frozen=True)
class Model:
    """A decoder of gated MLPs: widths, layers and heads of 128; fewer heads for keys and values where they share."""

    width: int
    mlp: int
    heads: int
    layers: int
    kv_heads: int = 0
    vocabulary: int = 32000

    @property
    def layer(self) -> int:
        """Parameters of a layer."""
        return self.width * (128 * (2 * self.heads + 2 * (self.kv_heads or self.heads)) + 3 * self.mlp)

    @property
    def parameters(self) -> int:
        return self.layers * self.layer + 2 * self.width * self.vocabulary


@dataclass(frozen=True)
class Published:
    """A published run: sequences a chip and their length, chips of a slice, slices, how it is split, and its MFU."""

    name: str
    model: Model
    chip: str
    chips: int
    batch: float
    mfu: float
    again: float = 1.0  # how much of a layer's products is made again in the backward pass
    tensor: int = 1
    slices: int = 1
    length: int = 2048
    calibration: bool = False


M16 = Model(4096, 28672, 64, 32)
M32 = Model(8192, 28672, 64, 32)
M64 = Model(8192, 28672, 64, 64)
M128 = Model(8192, 57344, 128, 64)
LLAMA_8B = Model(4096, 14336, 32, 32, kv_heads=8, vocabulary=128256)
RUNS = (
    Published("16B", M16, "v5e", 256, 6, 61.10),
    Published("32B", M32, "v5e", 256, 4, 66.86, calibration=True),
    Published("64B", M64, "v5e", 256, 2, 59.90),
    Published("128B", M128, "v5e", 256, 1, 56.06, again=0.0, tensor=16),
    Published("16B", M16, "v5e", 256, 6, 59.37, slices=2),
    Published("32B", M32, "v5e", 256, 4, 64.81, slices=2),
    Published("64B", M64, "v5e", 256, 2, 56.66, slices=2),
    Published("Llama 3.1 8B", LLAMA_8B, "v6e", 256, 4, 45.46, again=0.54, length=8192, calibration=True),
    Published("32B", M32, "v5p", 64, 7, 71.47, again=0.0, tensor=4, calibration=True),
    Published("64B", M64, "v5p", 64, 3, 70.31, again=0.0, tensor=4),
    Published("128B", M128, "v5p", 128, 1, 68.68, again=0.0, tensor=8),
    Published("128B", M128, "v5p", 256, 1, 68.53, again=0.0, tensor=8),
)


def work_of(run: Published) -> tuple[Work, float]:
    """What a chip does in a step of the run, and the model's FLOPs of it."""
    model, tokens = run.model, run.batch * run.length
    # Products: forward and twice backward; recomputed ones again. Attention without the mask, as flash kernels skip it
    # in half of their blocks.
    pairs = tokens * run.length * 4 * 128 * model.heads * model.layers
    linear = 2 * tokens * (model.layers * model.layer + model.width * model.vocabulary)
    products = linear * 3 + run.again * 2 * tokens * model.layers * model.layer
    # The stream and the MLP's hidden values of a layer, read and written by norms, activations and sums.
    widths = (8 * model.width + 3 * model.mlp + 4 * 128 * model.heads) / run.tensor
    memory = 2 * tokens * run.tensor * model.layers * widths * (3 + run.again)
    state = model.parameters / run.chips * 28
    return (
        Work(
            product_flops=products,
            forward_flops=pairs / 2 * (1 + (run.again == 1)),
            backward_flops=pairs / 2 * 2.5,
            memory_bytes=memory + state,
            exchanges=exchanges_of(run),
        ),
        3 * (linear + pairs),
    )


def exchanges_of(run: Published) -> list[Exchange]:
    """Weights gathered forward and backward and their gradients scattered, beside products; with `tensor`, activations
    gathered and scattered twice a layer and pass, between them; gradients summed over slices, beside products.
    """
    dims = TORUS[run.chip]
    inner = run.chips // run.tensor
    own = run.model.parameters / run.tensor * 2  # bytes of bfloat16 that a group along `fsdp` gathers
    over = dims if run.tensor == 1 else dims - 1
    found = [Exchange("all-gather", own * 2, inner, over, hidden=True)]
    found.append(Exchange("reduce-scatter", own, inner, over, hidden=True))
    if run.tensor > 1:
        stream = run.batch * run.length * run.tensor * run.model.width * 2
        # Into attention and MLP a gather, out of them a scatter; forward, and backward the reverse.
        found.append(Exchange("all-gather", stream * run.model.layers * 8, run.tensor, 1))
    if run.slices > 1:
        found.append(Exchange("all-reduce", own / inner * 2, run.slices, 0, hidden=True))
    return found


def measure(run: Published) -> dict:
    work, model_flops = work_of(run)
    time = predict(work, CHIPS[run.chip], model_flops)
    slices = f"{run.slices} x " if run.slices > 1 else ""
    calibration = "calibration; " if run.calibration else ""
    return row(
        f"published_steps: {run.name} on {slices}{run.chip}, {run.chips} chips",
        100 * time.mfu,
        "% MFU predicted",
        peer="MaxText, published",
        peer_value=run.mfu,
        ratio=100 * time.mfu / run.mfu,
        note=f"{calibration}exposed {time.exposed_s / time.total_s:.1%}, then {time.binds}",
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    as_json = parser.parse_args().json
    rows = [measure(run) for run in RUNS]
    errors = [100 * abs(each["ratio"] - 1) for run, each in zip(RUNS, rows, strict=True) if not run.calibration]
    found = statistics.median(errors)
    unit = f"% median error of {len(errors)} predictions"
    rows.append(row("published_steps", found, unit, goal="<= 15", ok=found <= 15))
    return emit(rows, as_json)


if __name__ == "__main__":
    sys.exit(main())
