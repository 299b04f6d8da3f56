"""The eight branches of the model in one table: what every other module needs to know of each.

A branch is a subtree of parameters that trains, is saved and is converted as one: `params/BRANCH/` of a checkpoint, the
first word of a parameter's dotted name (`vision.tower.layers.mlp.fc1.weight`). A new modality has a row here.

The table imports no jax, so configurations and data workers read it too; a branch's class is named, not imported.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal, get_args

if TYPE_CHECKING:
    from flax import nnx
    from jaxtyping import PRNGKeyArray

    from baichuan_omni_jax.config import OmniConfig
    from baichuan_omni_jax.config.vocoder import VocoderConfig
    from baichuan_omni_jax.nn.param import ComputePolicy

BranchName = Literal[
    "vision", "audio_encoder", "audio_decoder", "llm", "audio_head", "flow", "vocoder", "transcript_adapter"
]
BRANCH_NAMES: tuple[BranchName, ...] = get_args(BranchName)


@dataclass(frozen=True, kw_only=True)
class Branch:
    """What is true of one branch.

    Attributes:
        module: the class of its parameters, `package.module:Class`.
        arguments: what its constructor takes between key and `ComputePolicy`, by the sizes of model and vocoder.
        sections: the sections of `OmniConfig` that a checkpoint of this branch decides.
        batch_fields: the fields of a packed batch that it reads (`omni/batch.py` has their shapes and axes).
        requires: branches without which it computes nothing: whose outputs, or whose codebooks, it reads.
        audio_codes: whether it reads or makes audio codes, so that all such branches must come of one tokenizer.
        dtype: what generation computes it in: `requested`, the user's choice; `float32`, since the codes that it makes,
            or the waveform, must be those of training.
        file: whose tensors it converts from: `model`, the released model's own files; `vocoder`, the vocoder's own
            file; None: the release has no such branch.
        stream: the parameters, below its name, that write into the language model's stream (None: none do).
    """

    name: BranchName
    module: str
    arguments: Callable[[OmniConfig, VocoderConfig | None], tuple[Any, ...]]
    sections: tuple[str, ...] = ()
    batch_fields: tuple[str, ...] = ()
    requires: tuple[BranchName, ...] = ()
    audio_codes: bool = False
    dtype: Literal["requested", "float32"] = "float32"
    file: Literal["model", "vocoder"] | None = "model"
    stream: str | None = None

    def path(self, *names: str) -> str:
        """Returns the prefix of the dotted names of its parameters, or of a part's: `vision.projector.`."""
        return "".join(f"{name}." for name in (self.name, *names))

    def pattern(self, *names: str) -> str:
        r"""Returns `path` as the regular expression of an optimizer group: `vision\.projector\.`."""
        return re.escape(self.path(*names))

    def build(
        self, key: PRNGKeyArray, cfg: OmniConfig, compute: ComputePolicy, vocoder: VocoderConfig | None = None
    ) -> nnx.Module:
        """Builds the branch with random weights.

        Args:
            key: the random key of its weights.
            cfg: the model's sizes.
            compute: how its modules compute, and how parameters are split over devices.
            vocoder: the vocoder's sizes, which its branch alone needs: they stand in a file of their own.

        Returns:
            The module, parameters in fp32, on the mesh in use.
        """
        # Imported by name: this table lies below all that it names.
        package, _, name = self.module.partition(":")
        return getattr(import_module(package), name)(key, *self.arguments(cfg, vocoder), compute)


_ROWS = (
    Branch(
        name="vision",
        module="baichuan_omni_jax.vision.model:VisionModel",
        arguments=lambda cfg, _: (cfg.vision,),
        sections=("vision",),
        batch_fields=("patches", "patch_grid", "patch_segments", "visual_index"),
        requires=("llm",),
        dtype="requested",
        stream="",
    ),
    Branch(
        name="audio_encoder",
        module="baichuan_omni_jax.audio.encoder:AudioEncoderBranch",
        arguments=lambda cfg, _: (cfg.audio,),
        sections=("audio",),
        batch_fields=("mel", "mel_lengths", "mel_owner", "mel_audio"),
        audio_codes=True,
        stream="",
    ),
    Branch(
        name="audio_decoder",
        module="baichuan_omni_jax.audio.decoder:AudioDecoder",
        arguments=lambda cfg, _: (cfg.audio, cfg.post_net),
        sections=("post_net",),
        requires=("audio_encoder",),
        audio_codes=True,
    ),
    Branch(
        name="llm",
        module="baichuan_omni_jax.llm.model:LanguageModel",
        arguments=lambda cfg, _: (cfg.llm,),
        sections=("llm", "tokens"),
        batch_fields=(
            "tokens",
            "positions",
            "segment_ids",
            "document_ids",
            "source_ids",
            "text_targets",
            "text_weights",
            "text_target_index",
        ),
        dtype="requested",
    ),
    Branch(
        name="audio_head",
        module="baichuan_omni_jax.llm.audio_head:AudioHeadBranch",
        arguments=lambda cfg, _: (cfg.audio_head, cfg.audio.codebook_sizes, cfg.llm.hidden_size),
        sections=("audio_head",),
        batch_fields=(
            "audio_codes",
            "audio_targets",
            "audio_weights",
            "audio_index",
            "audio_target_index",
            "audio_target_sources",
        ),
        requires=("llm",),
        audio_codes=True,
        dtype="requested",
        stream="embedding.",
    ),
    Branch(
        name="flow",
        module="baichuan_omni_jax.flow.model:FlowDecoder",
        arguments=lambda cfg, _: (cfg.flow,),
        sections=("flow",),
        requires=("audio_encoder", "audio_decoder"),
    ),
    Branch(
        name="vocoder",
        module="baichuan_omni_jax.vocoder.model:Vocoder",
        arguments=lambda _, vocoder: (vocoder,),
        requires=("flow",),
        file="vocoder",
    ),
    # Reads quantized features into the language model while the audio tokenizer trains; no released file has it.
    Branch(
        name="transcript_adapter",
        module="baichuan_omni_jax.omni.audio_tokenizer_model:TranscriptAdapter",
        arguments=lambda cfg, _: (cfg.audio.code_dim, cfg.llm.hidden_size, cfg.llm.norm_eps),
        requires=("audio_encoder", "llm"),
        file=None,
        stream="",
    ),
)
BRANCHES: dict[str, Branch] = {row.name: row for row in _ROWS}

MODEL_BRANCHES = tuple(row.name for row in _ROWS if row.file == "model")
VOCODER_BRANCH: BranchName = "vocoder"
CONVERTED_BRANCHES = (*MODEL_BRANCHES, VOCODER_BRANCH)

# What the three training tasks compute, in the order in which their first weights' keys are split.
OMNI_BRANCHES: tuple[BranchName, ...] = ("vision", "llm", "audio_head")
AUDIO_TOKENIZER_BRANCHES: tuple[BranchName, ...] = ("audio_encoder", "audio_decoder", "transcript_adapter", "llm")
FLOW_MATCHING_BRANCHES: tuple[BranchName, ...] = ("audio_encoder", "audio_decoder", "flow")
# What answers a prompt, and what makes the waveform of the answer's audio codes (a vocoder is optional).
PROMPT_BRANCHES: tuple[BranchName, ...] = ("llm", "vision", "audio_head", "audio_encoder")
SPEECH_BRANCHES: tuple[BranchName, ...] = FLOW_MATCHING_BRANCHES


def build_branch(name: str, key: PRNGKeyArray, cfg: OmniConfig, compute: ComputePolicy) -> nnx.Module:
    """Builds a branch of the model with random weights (see `Branch.build`)."""
    return BRANCHES[name].build(key, cfg, compute)
