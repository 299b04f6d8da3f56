"""What to change when a step does not fit, most promising first."""

from baichuan_omni_jax.config import RunConfig
from baichuan_omni_jax.train.preflight.build import Memory

# Positions of a row a chip has wide intermediates of at a time.
CHUNK = 1024
GIB = 2**30


def suggestions(run: RunConfig, mesh: dict[str, int], memory: Memory, available: int) -> list[str]:
    """Sentences with the `--set` that does it, for a step that needs more than `available` bytes."""
    found = [*_compute(run, mesh), *_rows(run, mesh), *_arguments(run, memory, available), *_mesh(run, mesh)]
    missing = (memory.peak - available) / GIB
    return [f"{missing:.1f} GiB too much a chip", *found, "more chips: a larger --topology"]


def _compute(run: RunConfig, mesh: dict[str, int]) -> list[str]:
    """Settings that trade time for memory and leave the numbers as they are."""
    compute, part, found = run.compute, run.data.budgets.tokens // mesh["context"], []
    if compute.remat != "full":
        found.append(f"recompute whole layers: --set compute.remat=full (now {compute.remat})")
    for name, value in (("mlp_chunk", compute.mlp_chunk), ("loss_chunk", compute.loss_chunk)):
        if min(value or part, part) > CHUNK:
            found.append(f"smaller pieces of a row: --set compute.{name}={CHUNK} (now {value or 'the whole row'})")
    return found


def _rows(run: RunConfig, mesh: dict[str, int]) -> list[str]:
    groups = mesh["data"] * mesh["fsdp"]
    at_once = run.data.rows // run.train.accumulate // groups
    if at_once < 2:
        return []
    return [
        f"one row at a time: --set train.accumulate={run.data.rows // groups} (now {at_once} rows a chip at a time; "
        "accumulated gradients are fp32, split like the parameters)"
    ]


def _arguments(run: RunConfig, memory: Memory, available: int) -> list[str]:
    found = []
    frozen = any(group.learning_rate is None for group in run.optimizer.groups)
    if frozen and run.train.frozen_dtype != "bfloat16":
        found.append(
            f"frozen parameters in half the bytes: --set train.frozen_dtype=bfloat16 (now {run.train.frozen_dtype})"
        )
    if memory.args > available / 2:
        found.append("parameters and optimizer take most: freeze a group, or use more chips along fsdp or context")
    return found


def _mesh(run: RunConfig, mesh: dict[str, int]) -> list[str]:
    """Rows over more chips, at the same number of chips; smaller budgets."""
    found, budgets = [], run.data.budgets
    if mesh["fsdp"] % 2 == 0 and budgets.tokens % (2 * mesh["context"] * run.data.context_block) == 0:
        half, twice = mesh["fsdp"] // 2, mesh["context"] * 2
        accumulate = run.data.rows // (mesh["data"] * half)
        found.append(
            f"shorter parts of a row a chip: --set mesh.fsdp={half} --set mesh.context={twice} "
            f"--set train.accumulate={accumulate} (data.media_shards a multiple of {twice * mesh['tensor']})"
        )
    if "vision" in run.branches and budgets.patches > budgets.tokens:
        found.append(f"fewer patches a row: --set data.budgets.patches={budgets.patches // 2}")
    return found
