"""The tables of all branches."""

from collections.abc import Callable

from baichuan_omni_jax.branches import MODEL_BRANCHES, VOCODER_BRANCH
from baichuan_omni_jax.config import OmniConfig
from baichuan_omni_jax.convert.audio_decoder import audio_decoder_rules
from baichuan_omni_jax.convert.audio_encoder import audio_encoder_rules
from baichuan_omni_jax.convert.audio_head import audio_head_rules
from baichuan_omni_jax.convert.flow import flow_rules
from baichuan_omni_jax.convert.llm import llm_rules
from baichuan_omni_jax.convert.rules import Rule
from baichuan_omni_jax.convert.vision import vision_rules
from baichuan_omni_jax.convert.vocoder import vocoder_rules
from baichuan_omni_jax.vocoder.config import VocoderConfig

_TABLES: dict[str, Callable[[OmniConfig], list[Rule]]] = {
    "vision": vision_rules,
    "audio_encoder": audio_encoder_rules,
    "audio_decoder": audio_decoder_rules,
    "llm": llm_rules,
    "audio_head": audio_head_rules,
    "flow": flow_rules,
}


def branch_rules(cfg: OmniConfig, vocoder: VocoderConfig | None = None) -> dict[str, tuple[Rule, ...]]:
    """Branch -> its table, for a model of this configuration, and for a vocoder if one is given."""
    tables = {name: tuple(_TABLES[name](cfg)) for name in MODEL_BRANCHES}
    return tables | ({VOCODER_BRANCH: tuple(vocoder_rules(vocoder))} if vocoder else {})
