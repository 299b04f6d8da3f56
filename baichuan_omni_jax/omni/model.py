"""The branches joined: media embeddings merged into the language model's row, audio predicted from its hidden states.

A packed batch (docs/reference/batch.md) in, hidden states and audio logits out. Text logits are left to the caller:
training computes them in chunks inside the loss, generation for one position.
"""

from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
from etils import epath
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from baichuan_omni_jax.branches import OMNI_BRANCHES, build_branch
from baichuan_omni_jax.checkpoint import branch_home, find_checkpoint, read_tree, with_shardings
from baichuan_omni_jax.checkpoint.branches import CONFIG, branch_folder
from baichuan_omni_jax.config import OmniConfig, read_hf
from baichuan_omni_jax.errors import ConfigError
from baichuan_omni_jax.llm.audio_head import AudioHeadBranch
from baichuan_omni_jax.llm.model import LanguageModel
from baichuan_omni_jax.nn.param import ComputePolicy
from baichuan_omni_jax.omni.batch import Batch
from baichuan_omni_jax.omni.merge import merge_media, pick_slots
from baichuan_omni_jax.vision.model import VisionModel


class OmniModel(nnx.Module):
    """Vision, language model, audio embeddings and head: everything that a language-model step computes.

    `branches` leaves out the others: the module lacks them and reads none of their fields. Raises ConfigError on a
    branch that there is not, or without `llm`.
    """

    vision: VisionModel
    llm: LanguageModel
    audio_head: AudioHeadBranch

    def __init__(
        self, key: PRNGKeyArray, cfg: OmniConfig, compute: ComputePolicy, branches: Sequence[str] = OMNI_BRANCHES
    ):
        unknown = [name for name in branches if name not in OMNI_BRANCHES]
        if unknown or "llm" not in branches:
            raise ConfigError(f"branches {', '.join(branches)}: llm and any of {', '.join(OMNI_BRANCHES)} are a model")
        # A key for each branch there is: its weights do not depend on which others are left out.
        split = jax.random.split(key, len(OMNI_BRANCHES))
        keys: dict[str, PRNGKeyArray] = dict(zip(OMNI_BRANCHES, split, strict=True))
        present = tuple(name for name in OMNI_BRANCHES if name in branches)
        self.branches = present
        for name in present:
            setattr(self, name, build_branch(name, keys[name], cfg, compute))
        self.compute = compute

    @classmethod
    def from_checkpoint(
        cls, checkpoint: str | Path | epath.Path, *, dtype: DTypeLike = "float32", mesh: Mesh | None = None
    ) -> "OmniModel":
        """Loads a model from a checkpoint, without drawing or compiling anything.

            model = OmniModel.from_checkpoint("runs/omni")
            hidden, audio_logits = model(batch)  # a packed batch (docs/reference/batch.md), of one row or more
            logits = model.llm.logits(hidden)

        Without a mesh the model lies on the default device and is called as it stands. With one its parameters are
        split as they are in training, and it is called under `jax.set_mesh(mesh)`.

        Args:
            checkpoint: a checkpoint or a run's workdir (its newest good step), as converted or trained; may be a URL.
            dtype: that of weights and activations.
            mesh: of `baichuan_omni_jax.sharding.make_mesh`.

        Returns:
            The model, with those of the branches vision, llm and audio_head that the checkpoint has.

        Raises:
            ConfigError: no checkpoint there, none with the branch llm, or a damaged file.
        """
        folder = find_checkpoint(checkpoint)
        homes = {name: home for name in OMNI_BRANCHES if (home := branch_home(folder, name))}
        if "llm" not in homes:
            raise ConfigError(f"checkpoint {folder} has no branch llm; it has {', '.join(homes) or 'none of a model'}")
        cfg, kind = read_hf(folder / CONFIG), jnp.dtype(dtype)
        compute = ComputePolicy(dtype=kind, remat="none")
        # Shapes first: a constructor that is run draws every weight, op by op, before it is overwritten.
        model = jax.eval_shape(lambda key: cls(key, cfg, compute, tuple(homes)), jax.random.key(0))
        for name, home in homes.items():
            # Read in `dtype` and split as the mesh says, so that no device of a mesh holds a whole branch on the way.
            shapes = with_shardings(getattr(model, name), mesh, compute.rules, dtype=kind, name=name)
            setattr(model, name, read_tree(home / branch_folder(name), shapes, f"branch {name}"))
        return model

    def embed(self, batch: Batch) -> Float[Array, "b t d"]:
        """Computes token embeddings with every pad slot replaced by its image's or audio's embedding."""
        x, media = self.llm.embed(batch["tokens"]), []
        if "vision" in self.branches:
            # All images of the row in one call of the tower: segments keep them apart.
            visual = self.vision(batch["patches"], batch["patch_grid"], batch["patch_segments"])
            media.append((visual, batch["visual_index"]))
        if "audio_head" in self.branches:
            with jax.named_scope("audio_embedding"):
                # Audio that was heard and audio that was spoken enter alike: by the embeddings of their codes.
                media.append((self.audio_head.embed(batch["audio_codes"]), batch["audio_index"]))
        return merge_media(x, media, self.compute.rules) if media else x

    def __call__(self, batch: Batch) -> tuple[Float[Array, "b t d"], tuple[Float[Array, "b c _"], ...]]:
        """Hidden states after the final norm, and per level the logits (b, c, size + 1) of the audio to predict.

        No levels without an audio head.
        """
        batch = jax.tree.map(jnp.asarray, batch)  # arrays of the host are welcome
        embedded = self.embed(batch)
        with jax.named_scope("llm"):
            hidden = self.llm(embedded, batch["positions"], batch["segment_ids"])
        if "audio_head" not in self.branches:
            return hidden, ()
        with jax.named_scope("audio_head"):
            # Only states that predict a frame go on: each becomes a depth sequence, one position a level.
            start = pick_slots(hidden, batch["audio_target_index"], self.compute.rules)
            return hidden, self.audio_head(start, batch["audio_targets"])
