"""`OmniConfig` from and to the released Hugging Face `config.json`, read strictly.

Three kinds of keys: those that set a size (the tables below, one row a field), those that must have the one value the
released model uses (`REQUIRED`), and leftovers that the released computation ignores. A key that would change the
computation and is not supported is refused by name.
"""

import json
from pathlib import Path
from typing import Any

from baichuan_omni_jax.audio.config import AudioConfig, PostNetConfig
from baichuan_omni_jax.config.errors import ConfigError
from baichuan_omni_jax.config.model import OmniConfig, SpecialTokens
from baichuan_omni_jax.flow.config import FlowConfig
from baichuan_omni_jax.llm.config import AudioHeadConfig, LLMConfig
from baichuan_omni_jax.vision.config import PixelLimits, VisionConfig

LLM_KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "intermediate_size": "intermediate_size",
    "norm_eps": "rms_norm_eps",
    "rope_theta": "rope_theta",
}
# Written by the released model; older configs leave them out.
LLM_OPTIONAL = {"qkv_pack": ("attention_qkv_pack", True), "use_norm_head": ("use_norm_head", False)}
VISION_KEYS = {
    "depth": "depth",
    "embed_dim": "embed_dim",
    "num_heads": "num_heads",
    "mlp_ratio": "mlp_ratio",
    "patch_size": "patch_size",
    "temporal_patch_size": "temporal_patch_size",
    "spatial_merge_size": "spatial_merge_size",
    "in_channels": "in_channels",
    "out_dim": "hidden_size",
    "image_mean": "image_mean",
    "image_std": "image_std",
}
AUDIO_KEYS = {
    name: name
    for name in (
        "sampling_rate num_mel_bins n_fft hop_length max_audio_seconds split_overlap d_model encoder_layers "
        "encoder_attention_heads encoder_ffn_dim kernel_size stride_size avg_pooler decoder_layers "
        "decoder_attention_heads decoder_ffn_dim decoder_kernel_size decoder_stride_size"
    ).split()
}
POST_NET_KEYS = {name: name for name in ("sampling_rate", "n_fft", "hop_length", "num_mel_bins", "channels")}
FLOW_KEYS = {
    name: name
    for name in (
        "sampling_rate hop_length in_channels channels num_mid_blocks n_blocks num_heads attention_head_dim "
        "prenet_in_dim prenet_out_dim prenet_d_model prenet_ffn_dim prenet_attention_heads diffusion_steps "
        "prenet_loss_weight loss_weight"
    ).split()
} | {"prenet_layers": "prenet_nlayers"}
CFM_KEYS = {"guidance": "inference_cfg_rate", "condition_dropout": "training_cfg_rate", "sigma_min": "sigma_min"}
# Our name -> (section, key).
TOKEN_KEYS = {
    "audio_start": ("audio_config", "audio_start_token_id"),
    "audio_end": ("audio_config", "audio_end_token_id"),
    "audio_pad": ("audio_config", "audio_pad_token_id"),
    "audiogen_start": ("audio_config", "audiogen_start_token_id"),
    "audiogen_end": ("audio_config", "audiogen_end_token_id"),
    "image_start": ("visual_config", "image_start_token_id"),
    "image_end": ("visual_config", "image_end_token_id"),
    "image_pad": ("visual_config", "image_pad_token_id"),
    "video_place": ("video_config", "video_place_token_id"),
    "video_start": ("video_config", "video_start_token_id"),
    "video_end": ("video_config", "video_end_token_id"),
}
# (section, key): values the computation is written for. A key that is absent has the first of them.
REQUIRED: dict[tuple[str, str], tuple[Any, ...]] = {
    ("", "position_embedding_type"): ("rope",),
    ("", "hidden_act"): ("silu",),
    ("", "attention_qkv_bias"): (True,),
    ("", "tie_word_embeddings"): (False,),
    ("", "use_sliding_window"): (False,),
    ("", "sparse_attention_heads"): (None, []),
    ("", "sparse_attention_layers"): ([], None),
    ("", "rope_scaling"): (None,),
    ("visual_config", "hidden_act"): ("quick_gelu",),
    ("flow_matching_config", "act_fn"): ("gelu",),
    ("flow_matching_config", "prenet_activation_function"): ("gelu",),
    ("flow_matching_config", "use_hires_mel"): (True,),
    ("flow_matching_config", "unet_use_omni_attn"): (False,),
    ("flow_matching_config", "use_hidden_states_before_dconv2"): (True,),
    ("flow_matching_config", "spk_emb_dim"): (0,),
    ("flow_matching_config", "prenet_target_mel_length_scale_ratio"): (1.0,),
    ("vocoder_config", "enable_multi_scale"): (True,),
}
CFM_REQUIRED = {"solver": "euler", "t_scheduler": "cosine", "reg_loss_type": "l1"}


def read_hf(path: Path) -> OmniConfig:
    """`OmniConfig` of the config.json at `path`. Raises ConfigError naming the file and the field."""
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}") from error
    try:
        return from_hf(values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def from_hf(values: dict[str, Any]) -> OmniConfig:
    """`OmniConfig` of a released config's dict. Raises ConfigError on a missing or unsupported field."""
    _check_required(values)
    vision, video = values.get("visual_config", {}), values.get("video_config", {})
    audio, flow = values.get("audio_config", {}), values.get("flow_matching_config", {})
    llm = _take(values, LLM_KEYS, "") | {
        ours: values.get(theirs, default) for ours, (theirs, default) in LLM_OPTIONAL.items()
    }
    llm["head_dim"] = values.get("head_dim") or llm["hidden_size"] // llm["num_heads"]
    return OmniConfig(
        vision=VisionConfig(
            **_take(vision, VISION_KEYS, "visual_config"),
            image_limits=PixelLimits(**_take(vision, _LIMITS, "visual_config")),
            frame_limits=PixelLimits(**_take(video, _LIMITS, "video_config")),
            max_frames=_take(video, {"n": "max_frame_num"}, "video_config")["n"],
            frames_per_second=_frame_rate(video),
        ),
        audio=AudioConfig(
            **_take(audio, AUDIO_KEYS, "audio_config"),
            codebook_sizes=tuple(_take(audio.get("vq_config", {}), {"s": "codebook_sizes"}, "vq_config")["s"]),
        ),
        post_net=PostNetConfig(**_take(values.get("vocoder_config", {}), POST_NET_KEYS, "vocoder_config")),
        llm=LLMConfig(**llm),
        audio_head=AudioHeadConfig(
            num_layers=_take(audio, {"n": "audio_head_transformer_layers"}, "audio_config")["n"],
            head_dim=min(128, llm["hidden_size"]),
        ),
        flow=FlowConfig(
            **_take(flow, FLOW_KEYS, "flow_matching_config"),
            **_take(flow.get("cfm_params", {}), CFM_KEYS, "flow_matching_config.cfm_params"),
        ),
        tokens=SpecialTokens(
            end_of_text=values.get("eos_token_id", SpecialTokens.end_of_text),
            **{
                ours: _take(values.get(section, {}), {"id": key}, section)["id"]
                for ours, (section, key) in TOKEN_KEYS.items()
            },
        ),
    )


def to_hf(config: OmniConfig) -> dict[str, Any]:
    """The released config's dict of `config`; `from_hf` of it gives `config` back.

    Raises ConfigError for an audio head whose head width the released code cannot express (it is always 128).
    """
    if config.audio_head.head_dim != min(128, config.llm.hidden_size):
        raise ConfigError(
            f"audio_head.head_dim {config.audio_head.head_dim} has no place in a Hugging Face config (always 128)"
        )
    values: dict[str, Any] = {"architectures": ["OmniForCausalLM"], "model_type": "omni", "torch_dtype": "bfloat16"}
    sections = {name: {"enable": True} for name in _SECTIONS}
    for (section, key), allowed in REQUIRED.items():
        (sections[section] if section else values)[key] = allowed[0]
    values |= _give(config.llm, LLM_KEYS) | {"head_dim": config.llm.head_dim}
    values |= {theirs: getattr(config.llm, ours) for ours, (theirs, _) in LLM_OPTIONAL.items()}
    values["eos_token_id"] = config.tokens.end_of_text
    vision = config.vision
    sections["visual_config"] |= _give(vision, VISION_KEYS) | _give(vision.image_limits, _LIMITS)
    sections["video_config"] |= _give(vision, VISION_KEYS) | _give(vision.frame_limits, _LIMITS)
    sections["video_config"] |= {"max_frame_num": vision.max_frames, "decode_way": f"{vision.frames_per_second:g}fps"}
    sections["audio_config"] |= _give(config.audio, AUDIO_KEYS)
    sections["audio_config"]["audio_head_transformer_layers"] = config.audio_head.num_layers
    sections["audio_config"]["vq_config"] = {"enable": True, "codebook_sizes": list(config.audio.codebook_sizes)}
    sections["vocoder_config"] |= _give(config.post_net, POST_NET_KEYS)
    sections["flow_matching_config"] |= _give(config.flow, FLOW_KEYS)
    sections["flow_matching_config"]["cfm_params"] = _give(config.flow, CFM_KEYS) | CFM_REQUIRED
    for ours, (section, key) in TOKEN_KEYS.items():
        sections[section][key] = getattr(config.tokens, ours)
    return values | sections


_LIMITS = {"min_pixels": "min_pixels", "max_pixels": "max_pixels"}
_SECTIONS = ("audio_config", "visual_config", "video_config", "vocoder_config", "flow_matching_config")


def _check_required(values: dict[str, Any]) -> None:
    for (section, key), allowed in REQUIRED.items():
        found = (values.get(section, {}) if section else values).get(key, allowed[0])
        if found not in allowed:
            name = f"{section}.{key}" if section else key
            raise ConfigError(f"{name} = {found!r} is not supported (only {allowed[0]!r})")
    cfm = values.get("flow_matching_config", {}).get("cfm_params", {})
    for key, expected in CFM_REQUIRED.items():
        if cfm.get(key, expected) != expected:
            raise ConfigError(f"flow_matching_config.cfm_params.{key} = {cfm[key]!r} is not supported ({expected!r})")


def _take(values: dict[str, Any], keys: dict[str, str], section: str) -> dict[str, Any]:
    missing = [theirs for theirs in keys.values() if theirs not in values]
    if missing:
        raise ConfigError(f"{section + '.' if section else ''}{missing[0]} is missing")
    taken = {ours: values[theirs] for ours, theirs in keys.items()}
    return {ours: tuple(value) if isinstance(value, list) else value for ours, value in taken.items()}


def _give(config: Any, keys: dict[str, str]) -> dict[str, Any]:
    given = {theirs: getattr(config, ours) for ours, theirs in keys.items()}
    return {theirs: list(value) if isinstance(value, tuple) else value for theirs, value in given.items()}


def _frame_rate(video: dict[str, Any]) -> float:
    text = video.get("decode_way", "1fps")
    try:
        return float(text.removesuffix("fps"))
    except (AttributeError, ValueError) as error:
        raise ConfigError(f"video_config.decode_way = {text!r} is not supported (only '<n>fps')") from error
