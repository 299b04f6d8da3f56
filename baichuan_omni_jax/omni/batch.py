"""The fields of a packed batch (docs/reference/batch.md): logical axes, shapes, and which branch reads them."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Shaped

from baichuan_omni_jax.branches import BRANCHES
from baichuan_omni_jax.config import Budgets, OmniConfig
from baichuan_omni_jax.errors import ConfigError
from baichuan_omni_jax.sharding import ShardingRules, axis_product, check_divisible

Batch = dict[str, Shaped[Array, "b ..."]]

_TOKEN, _MEDIA = ("batch", "length"), ("batch", "media")
_LLM = BRANCHES["llm"].batch_fields

# Logical axes of every field. Only rows with `budgets.mel_windows` have the audio encoder's.
BATCH_AXES: dict[str, tuple[str | None, ...]] = {
    **dict.fromkeys(_LLM, _TOKEN),
    **dict.fromkeys(("audio_codes", "audio_targets", "audio_weights", "patches", "patch_grid"), (*_MEDIA, None)),
    **dict.fromkeys(("audio_index", "audio_target_index", "audio_target_sources"), _MEDIA),
    **dict.fromkeys(("patch_segments", "visual_index"), _MEDIA),
    "mel": (*_MEDIA, None, None),
    **dict.fromkeys(("mel_lengths", "mel_owner", "mel_audio"), _MEDIA),
}
# The same by the branch that reads the field.
BRANCH_FIELDS = {branch.name: {name: BATCH_AXES[name] for name in branch.batch_fields} for branch in BRANCHES.values()}


def abstract_batch(
    rows: int,
    budgets: Budgets,
    omni: OmniConfig,
    branches: Sequence[str],
    mesh: Mesh,
    rules: ShardingRules,
    mel_frames: int = 0,
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes, dtypes and shardings of the batch that these branches read: what a step is compiled for.

    `mel_frames` is the size of the mel slots (0: whole windows of 30 s).

    Raises ConfigError naming the field and the dimension that the mesh does not divide.
    """
    t, p, a, c = budgets.tokens, budgets.patches, budgets.audio_frames, budgets.audio_targets
    levels, merged = omni.audio.levels, omni.vision.merged_patches
    if p % (merged * axis_product(mesh, rules.axes("media"))):
        raise ConfigError(
            f"data.budgets.patches {p} is not divisible by {merged} patches a token x "
            f"{axis_product(mesh, rules.axes('media'))}, the mesh axes {' x '.join(rules.axes('media'))}"
        )
    shapes = (
        dict.fromkeys(_LLM, (t,))
        | {
            "audio_codes": (a, levels),
            "audio_index": (a,),
            "audio_targets": (c, levels),
            "audio_weights": (c, levels),
            "audio_target_index": (c,),
            "audio_target_sources": (c,),
            "patches": (p, omni.vision.patch_values),
            "patch_grid": (p, 2),
            "patch_segments": (p,),
            "visual_index": (p // merged,),
            "mel": (budgets.mel_windows, mel_frames or omni.audio.max_mel_frames, omni.audio.num_mel_bins),
        }
        | dict.fromkeys(("mel_lengths", "mel_owner", "mel_audio"), (budgets.mel_windows,))
    )
    floats = dict.fromkeys(("text_weights", "audio_weights", "mel"), jnp.float32)
    dtypes = floats | {"patches": jnp.uint8}

    def field(name: str) -> jax.ShapeDtypeStruct:
        shape, axes = (rows, *shapes[name]), BATCH_AXES[name]
        check_divisible(mesh, rules, shape[:2], axes[:2], f"batch field {name}")
        sharding = NamedSharding(mesh, rules.spec(*axes))
        return jax.ShapeDtypeStruct(shape, dtypes.get(name, jnp.int32), sharding=sharding)

    return {name: field(name) for branch in branches for name in BRANCH_FIELDS[branch]}
