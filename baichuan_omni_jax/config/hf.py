"""`OmniConfig` from and to the released Hugging Face `config.json`, read strictly.

Three kinds of keys: those that set a size (the tables below, one row a field), those that must have the one value the
released model uses (`REQUIRED`), and leftovers that the released computation ignores. A key that would change the
computation and is not supported is refused by name. What transformers 5 writes otherwise (`rope_parameters`) is read
as the same; `dtype` and `torch_dtype` say how tensors are stored, which the tensors say themselves.
"""

import math
from typing import Any, get_type_hints

from etils import epath

from baichuan_omni_jax.config.architecture import (
    AudioConfig,
    AudioHeadConfig,
    FlowConfig,
    LLMConfig,
    PixelLimits,
    PostNetConfig,
    VisionConfig,
)
from baichuan_omni_jax.config.model import MODELS, OmniConfig, SpecialTokens
from baichuan_omni_jax.config.overrides import convert_value
from baichuan_omni_jax.errors import ConfigError
from baichuan_omni_jax.storage import parse_path, read_json_object

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
# Our own, which released configs do not have: they sample from all of the noise.
CFM_OPTIONAL = {"temperature": "temperature"}
CFM_REQUIRED = {"solver": "euler", "t_scheduler": "cosine", "reg_loss_type": "l1"}
# Far above any model: what loops over layers, or over the positions of a window, would otherwise run out of memory.
_MOST_LAYERS, MOST_SECONDS = 1024, 3600
_MOST: dict[str, int] = {
    **dict.fromkeys("num_layers depth encoder_layers decoder_layers prenet_layers".split(), _MOST_LAYERS),
    **dict.fromkeys("n_blocks num_mid_blocks".split(), _MOST_LAYERS),
    "max_audio_seconds": MOST_SECONDS,
}


def read_hf(path: epath.PathLike) -> OmniConfig:
    """Reads the config.json at `path`. Raises ConfigError naming the file and the field."""
    values = read_json_object(path)
    try:
        return from_hf(values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def resolve_model(name: str) -> OmniConfig:
    """Returns the variant called `name`, or that of the Hugging Face `config.json` at that path.

    Raises ConfigError for neither.
    """
    if name in MODELS:
        return MODELS[name]()
    if name and (path := parse_path(name)).is_file():
        return read_hf(path)
    raise ConfigError(f"model {name!r} is neither a variant ({', '.join(MODELS)}) nor a config.json that exists")


def from_hf(values: dict[str, Any]) -> OmniConfig:
    """Reads a released config's dict. Raises ConfigError on a missing, mistyped or unsupported field."""
    values = {**released_form(values), **{name: read_section(values, name) for name in _SECTIONS}}
    _check_required(values)
    vision, video = values["visual_config"], values["video_config"]
    audio, flow = values["audio_config"], values["flow_matching_config"]
    heads = {"num_layers": "audio_head_transformer_layers"}
    llm = language_sizes(values)
    return OmniConfig(
        vision=VisionConfig(
            **take(vision, VISION_KEYS, "visual_config", VisionConfig),
            image_limits=PixelLimits(**take(vision, _LIMITS, "visual_config", PixelLimits)),
            frame_limits=PixelLimits(**take(video, _LIMITS, "video_config", PixelLimits)),
            **take(video, {"max_frames": "max_frame_num"}, "video_config", VisionConfig),
            frames_per_second=_frame_rate(video),
        ),
        audio=AudioConfig(
            **take(audio, AUDIO_KEYS, "audio_config", AudioConfig),
            **take(read_section(audio, "vq_config"), {"codebook_sizes": "codebook_sizes"}, "vq_config", AudioConfig),
        ),
        post_net=PostNetConfig(**take(values["vocoder_config"], POST_NET_KEYS, "vocoder_config", PostNetConfig)),
        llm=LLMConfig(**llm),
        audio_head=AudioHeadConfig(
            **take(audio, heads, "audio_config", AudioHeadConfig), head_dim=min(128, llm["hidden_size"])
        ),
        flow=FlowConfig(**take(flow, FLOW_KEYS, "flow_matching_config", FlowConfig), **_sampling(flow)),
        tokens=_token_ids(values),
    )


def to_hf(config: OmniConfig) -> dict[str, Any]:
    """Writes `config` as a released config's dict; `from_hf` of it gives `config` back.

    Raises ConfigError for an audio head whose head width the released code cannot express (it is always 128).
    """
    if config.audio_head.head_dim != min(128, config.llm.hidden_size):
        raise ConfigError(
            f"audio_head.head_dim {config.audio_head.head_dim} has no place in a Hugging Face config (always 128)"
        )
    values: dict[str, Any] = {"architectures": ["OmniForCausalLM"], "model_type": "omni", "torch_dtype": "bfloat16"}
    sections: dict[str, dict[str, Any]] = {name: {"enable": True} for name in _SECTIONS}
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
    # Written where it says something: the config of a released model is given back as it was.
    cfm_keys = CFM_KEYS if config.flow.temperature == FlowConfig.temperature else CFM_KEYS | CFM_OPTIONAL
    sections["flow_matching_config"]["cfm_params"] = _give(config.flow, cfm_keys) | CFM_REQUIRED
    for ours, (section, key) in TOKEN_KEYS.items():
        sections[section][key] = getattr(config.tokens, ours)
    return values | sections


_LIMITS = {"min_pixels": "min_pixels", "max_pixels": "max_pixels"}
_SECTIONS = ("audio_config", "visual_config", "video_config", "vocoder_config", "flow_matching_config")


def read_section(values: dict[str, Any], name: str) -> dict[str, Any]:
    """Returns a nested object; one that is absent or null is empty."""
    found = values.get(name)
    if not isinstance(found, dict | None):
        raise ConfigError(f"{name} must be an object, not {found!r}")
    return found or {}


def released_form(values: dict[str, Any]) -> dict[str, Any]:
    """Rewrites the keys that transformers 5 and later 4 write otherwise, as the released config has them.

    Raises ConfigError naming what they say of positions, layers or tensors that the computation is not written for.
    """
    values = dict(values)
    thetas = {key: _plain_rope(values, key) for key in ("rope_parameters", "rope_scaling")}
    thetas["rope_theta"] = values.get("rope_theta")
    found = {key: theta for key, theta in thetas.items() if theta is not None}
    for theta in found.values():
        if theta != next(iter(found.values())):
            both = " and ".join(f"{theta!r} in {key}" for key, theta in found.items())
            raise ConfigError(f"rope_theta is given twice: {both}")
        values["rope_theta"] = theta
    values["rope_scaling"] = None
    layers = values.get("layer_types") or []
    if not isinstance(layers, list):
        raise ConfigError(f"layer_types must be a list, not {layers!r}")
    for layer in layers:
        if layer != "full_attention":
            raise ConfigError(f"layer_types holds {layer!r}, which is not supported (only 'full_attention')")
    if quantization := values.get("quantization_config"):
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise ConfigError(f"quantization_config ({method}) is not supported: give the weights before quantization")
    return values


def _plain_rope(values: dict[str, Any], key: str) -> Any:
    """Returns the base that `rope_parameters` (or the older `rope_scaling`) holds, or None; refuses all but plain RoPE.

    {"rope_type": "default", "rope_theta": 1e6} -> 1e6
    """
    rope = read_section(values, key)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", None):
        raise ConfigError(f"{key}.rope_type = {kind!r} is not supported (only 'default')")
    for name, value in rope.items():
        known = name in ("rope_type", "type", "rope_theta") or (name == "partial_rotary_factor" and value == 1)
        if not known and value is not None:
            raise ConfigError(f"{key}.{name} = {value!r} is not supported")
    return rope.get("rope_theta")


def language_sizes(values: dict[str, Any]) -> dict[str, Any]:
    """Reads the fields of `LLMConfig`; without `head_dim` the width is shared out among the heads."""
    llm = take(values, LLM_KEYS, "", LLMConfig)
    for ours, theirs in LLM_KEYS.items():
        if not 0 < llm[ours] < math.inf:
            raise ConfigError(f"{theirs} = {llm[ours]!r} must be above 0")
    optional = {ours: values.get(theirs, default) for ours, (theirs, default) in LLM_OPTIONAL.items()}
    optional["head_dim"] = values.get("head_dim") or llm["hidden_size"] // llm["num_heads"]
    return llm | take(optional, {ours: ours for ours in optional}, "", LLMConfig)


def _token_ids(values: dict[str, Any]) -> SpecialTokens:
    """Reads the ids of the media marks, and of the end of text: the first, where a list of them is given."""
    end = values.get("eos_token_id", SpecialTokens.end_of_text)
    end = {"eos_token_id": end[0] if isinstance(end, list) and end else end}
    ids = take(end, {"end_of_text": "eos_token_id"}, "", SpecialTokens)
    for ours, (section, key) in TOKEN_KEYS.items():
        ids |= take(values[section], {ours: key}, section, SpecialTokens)
    return SpecialTokens(**ids)


def _check_required(values: dict[str, Any]) -> None:
    for (section, key), allowed in REQUIRED.items():
        found = (values[section] if section else values).get(key, allowed[0])
        if found not in allowed:
            name = f"{section}.{key}" if section else key
            raise ConfigError(f"{name} = {found!r} is not supported (only {allowed[0]!r})")
    cfm = read_section(values["flow_matching_config"], "cfm_params")
    for key, expected in CFM_REQUIRED.items():
        if cfm.get(key, expected) != expected:
            raise ConfigError(f"flow_matching_config.cfm_params.{key} = {cfm[key]!r} is not supported ({expected!r})")


def take(values: dict[str, Any], keys: dict[str, str], section: str, config: type) -> dict[str, Any]:
    """Reads fields of the dataclass `config` by name: sizes from 1, ids of tokens from 0, layers to 1024.

    Raises ConfigError for one that is missing, of another type, or a whole number that is no size or id.
    """
    prefix, hints = f"{section}." if section else "", get_type_hints(config)
    missing = [theirs for theirs in keys.values() if theirs not in values]
    if missing:
        raise ConfigError(f"{prefix}{missing[0]} is missing")
    taken = {ours: convert_value(hints[ours], values[theirs], prefix + theirs) for ours, theirs in keys.items()}
    # Arrays of such sizes cannot even be described: what they are computed with would fail further on, without a name.
    least = 0 if config is SpecialTokens else 1
    for ours, value in taken.items():
        most = _MOST[ours] if ours in _MOST else 2**31 - 1
        for number in value if isinstance(value, tuple) else (value,):
            if type(number) is int and not least <= number <= most:
                bound = f"at least {least}" if number < least else f"at most {most}"
                raise ConfigError(f"{prefix}{keys[ours]} = {values[keys[ours]]!r} must be {bound}")
    return taken


def _give(config: Any, keys: dict[str, str]) -> dict[str, Any]:
    given = {theirs: getattr(config, ours) for ours, theirs in keys.items()}
    return {theirs: list(value) if isinstance(value, tuple) else value for theirs, value in given.items()}


def _sampling(flow: dict[str, Any]) -> dict[str, Any]:
    """Reads how flow matching samples, and what it was trained with."""
    section = "flow_matching_config.cfm_params"
    values = {"temperature": FlowConfig.temperature} | read_section(flow, "cfm_params")
    taken = take(values, CFM_KEYS | CFM_OPTIONAL, section, FlowConfig)
    if not 0 <= taken["temperature"] < math.inf:
        raise ConfigError(f"{section}.temperature = {values['temperature']!r} must be at least 0")
    return taken


def _frame_rate(video: dict[str, Any]) -> float:
    text = video.get("decode_way", "1fps")
    try:
        return float(text.removesuffix("fps"))
    except (AttributeError, ValueError) as error:
        raise ConfigError(f"video_config.decode_way = {text!r} is not supported (only '<n>fps')") from error
