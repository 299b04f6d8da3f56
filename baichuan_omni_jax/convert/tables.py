"""The tables of all branches, and the abstract modules they are checked against."""

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import jax
from flax import nnx

from baichuan_omni_jax.audio.decoder import AudioDecoder
from baichuan_omni_jax.audio.model import AudioTokenizer
from baichuan_omni_jax.config import OmniConfig
from baichuan_omni_jax.convert.audio_decoder import audio_decoder_rules
from baichuan_omni_jax.convert.audio_encoder import audio_encoder_rules
from baichuan_omni_jax.convert.audio_head import audio_head_rules
from baichuan_omni_jax.convert.flow import flow_rules
from baichuan_omni_jax.convert.llm import llm_rules
from baichuan_omni_jax.convert.rules import Rule
from baichuan_omni_jax.convert.vision import vision_rules
from baichuan_omni_jax.convert.vocoder import vocoder_rules
from baichuan_omni_jax.flow.model import FlowDecoder
from baichuan_omni_jax.llm.audio_head import AudioHeadBranch
from baichuan_omni_jax.llm.model import LanguageModel
from baichuan_omni_jax.nn.param import ComputePolicy
from baichuan_omni_jax.vision.model import VisionModel
from baichuan_omni_jax.vocoder.config import VocoderConfig
from baichuan_omni_jax.vocoder.model import Vocoder

_TABLES: dict[str, Callable[[OmniConfig], list[Rule]]] = {
    "vision": vision_rules,
    "audio_encoder": audio_encoder_rules,
    "audio_decoder": audio_decoder_rules,
    "llm": llm_rules,
    "audio_head": audio_head_rules,
    "flow": flow_rules,
}
# Branches whose tensors lie in the released model's own files; the vocoder has one of its own.
MODEL_BRANCHES, VOCODER_BRANCH = tuple(_TABLES), "vocoder"


def branch_rules(cfg: OmniConfig, vocoder: VocoderConfig | None = None) -> dict[str, tuple[Rule, ...]]:
    """Branch -> its table, for a model of this configuration, and for a vocoder if one is given."""
    tables = {name: tuple(make(cfg)) for name, make in _TABLES.items()}
    return tables | ({VOCODER_BRANCH: tuple(vocoder_rules(vocoder))} if vocoder else {})


def abstract_branches(
    cfg: OmniConfig,
    vocoder: VocoderConfig | None = None,
    *,
    only: Iterable[str] = (),
    compute: ComputePolicy | None = None,
) -> dict[str, nnx.Module]:
    """Branch -> its module with shapes for values (`jax.eval_shape`): what the tables must cover.

    `only` names the branches wanted; default: all, and the vocoder if its sizes are given.
    """
    names = tuple(only) or (*MODEL_BRANCHES, *([VOCODER_BRANCH] if vocoder else []))
    mesh = jax.sharding.get_mesh()
    return {name: _abstract(name, cfg, vocoder, compute or ComputePolicy(), mesh) for name in names}


@cache
def _abstract(
    name: str, cfg: OmniConfig, vocoder: VocoderConfig | None, compute: ComputePolicy, mesh: jax.sharding.Mesh
) -> nnx.Module:
    # `mesh` is the one in use: it is part of every array's type.
    makers: dict[str, Callable[[Any], nnx.Module]] = {
        "vision": lambda key: VisionModel(key, cfg.vision, compute),
        "audio_encoder": lambda key: AudioTokenizer(key, cfg.audio, compute),
        "audio_decoder": lambda key: AudioDecoder(key, cfg.audio, cfg.post_net, compute),
        "llm": lambda key: LanguageModel(key, cfg.llm, compute),
        "audio_head": lambda key: AudioHeadBranch(
            key, cfg.audio_head, cfg.audio.codebook_sizes, cfg.llm.hidden_size, compute
        ),
        "flow": lambda key: FlowDecoder(key, cfg.flow, compute),
        "vocoder": lambda key: Vocoder(key, vocoder, compute),
    }
    return jax.eval_shape(makers[name], jax.random.key(0))
