"""Sizes of the public models that an omni model is put together from, and their `config.json` for each part alone.

The language model is a Qwen2 or Qwen2.5, the vision tower Qwen2-VL's, the audio encoder Whisper's. What a file says
beyond sizes must be what the computation is written for: another architecture, sliding windows in use, scaled rotary
positions are refused by name. Files of transformers 4 and 5 are read; those written have the keys of transformers 4,
which 5 and vLLM read too.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from baichuan_omni_jax.config.architecture import AudioConfig, AudioHeadConfig, LLMConfig, VisionConfig
from baichuan_omni_jax.config.hf import LLM_KEYS, MOST_SECONDS, language_sizes, read_section, released_form, take
from baichuan_omni_jax.config.model import OmniConfig, SpecialTokens
from baichuan_omni_jax.config.overrides import convert_value
from baichuan_omni_jax.errors import ConfigError

TOWER_KEYS = {
    name: name
    for name in "depth embed_dim num_heads mlp_ratio patch_size temporal_patch_size spatial_merge_size".split()
} | {"out_dim": "hidden_size"}
WHISPER_SIZES = ("num_mel_bins", "d_model", "encoder_layers", "encoder_attention_heads", "encoder_ffn_dim")
# Model types that are taken for one of the three, and how they differ.
_RELATIVES = {
    "qwen2_vl": "its language model sees positions along three axes; give a Qwen2.5 folder for the language model and "
    "this one for the vision tower",
    "qwen2_5_vl": "Qwen2.5-VL has another tower (windows of attention, RMSNorm, gated MLPs) and positions along three "
    "axes",
    "qwen2_moe": "its MLPs are mixtures of experts",
    "qwen3": "it normalizes queries and keys, and they have no biases",
    "llama": "its queries, keys and values have no biases",
}
# The released model was trained to this many tokens; its config.json has 8192, which servers would clip at.
CONTEXT = 65536


@dataclass(frozen=True, eq=False)
class TextVocabulary:
    """The text tokenizer of a language model, with every special token of ours, and the rows of its tables.

    Attributes:
        tokenizer_json: the tokenizer with the special tokens.
        tokens: the ids of those that the model gives a meaning to.
        known: the ids of the tokenizer as it was, whose rows the language model has trained.
        added: the new special tokens -> their ids, on rows that no token had.
    """

    tokenizer_json: str
    tokens: SpecialTokens
    known: np.ndarray
    added: dict[str, int]


def llm_from_qwen2(values: dict[str, Any]) -> tuple[LLMConfig, bool]:
    """Reads a Qwen2 config's dict: the sizes, and whether the output head is the text embedding (tied).

    Raises ConfigError naming what the computation is not written for.
    """
    _check_type(values, ("qwen2",))
    values = released_form(values)
    _check_values(values, {"hidden_act": "silu"})
    if values.get("num_key_value_heads") is None:
        values["num_key_value_heads"] = values.get("num_attention_heads")
    sizes = language_sizes({key: value for key, value in values.items() if key != "attention_qkv_pack"})
    # No window where the switch is off, whatever width the file gives; what it leaves out is as in Qwen2's class.
    window, first = values.get("sliding_window", 4096), values.get("max_window_layers", 28)
    if values.get("use_sliding_window") and window:
        first = convert_value(int, first, "max_window_layers")
        if first < sizes["num_layers"]:
            raise ConfigError(f"use_sliding_window: layers from {first} on see {window} tokens alone")
    return LLMConfig(**sizes), convert_value(bool, values.get("tie_word_embeddings") or False, "tie_word_embeddings")


def vision_from_qwen2_vl(values: dict[str, Any], base: VisionConfig) -> VisionConfig:
    """Reads the tower's sizes of a Qwen2-VL config's dict; `out_dim` is the width of its merger's output.

    Args:
        values: the config of a whole Qwen2-VL, or of its tower alone.
        base: what the file says nothing of: limits of pixels and frames, mean and spread of pixels.

    Raises:
        ConfigError: another architecture, or a tower that the computation is not written for.
    """
    _check_type(values, ("qwen2_vl", "qwen2_vl_vision"))
    tower = read_section(values, "vision_config") if values["model_type"] == "qwen2_vl" else values
    if not tower:
        raise ConfigError("vision_config is missing")
    _check_values(tower, {"hidden_act": "quick_gelu"}, "vision_config.")
    _check_values(
        read_section(tower, "rope_parameters"),
        {"rope_theta": 1e4, "rope_type": "axial"},
        "vision_config.rope_parameters.",
    )
    # Sizes that a file leaves out are those of Qwen2-VL's own class, which are the released model's.
    stated = {theirs: getattr(VisionConfig, ours) for ours, theirs in TOWER_KEYS.items()} | tower
    stated["in_channels"] = tower.get("in_channels", tower.get("in_chans", VisionConfig.in_channels))
    return replace(base, **take(stated, TOWER_KEYS | {"in_channels": "in_channels"}, "vision_config", VisionConfig))


def pixel_statistics(processor: dict[str, Any]) -> dict[str, Any]:
    """Reads mean and spread of pixels, where a `preprocessor_config.json` has them. Raises ConfigError."""
    return take(processor, {name: name for name in ("image_mean", "image_std") if name in processor}, "", VisionConfig)


def audio_from_whisper(values: dict[str, Any], base: AudioConfig) -> AudioConfig:
    """Reads a Whisper config's dict: the encoder's sizes, which bridge, codebooks and decoder follow.

    Args:
        values: the config.
        base: what the file says nothing of: the quantizer's levels, the decoder's depth.

    Raises:
        ConfigError: another architecture, or an encoder that the computation is not written for.
    """
    _check_type(values, ("whisper",))
    _check_values(values, {"activation_function": "gelu", "scale_embedding": False})
    sizes = take(values, {name: name for name in WHISPER_SIZES}, "", AudioConfig)
    positions = convert_value(int, values.get("max_source_positions", 1500), "max_source_positions")
    # Two mel frames of 10 ms a position: 1500 are 30 seconds.
    seconds, rest = divmod(positions * base.stride_size * base.hop_length, base.sampling_rate)
    if rest or not 1 <= seconds <= MOST_SECONDS:
        raise ConfigError(f"max_source_positions = {positions} are no whole seconds of audio (at most {MOST_SECONDS})")
    return replace(
        base,
        **sizes,
        max_audio_seconds=seconds,
        decoder_attention_heads=sizes["encoder_attention_heads"],
        decoder_ffn_dim=sizes["encoder_ffn_dim"],
    )


def join_parts(
    base: OmniConfig,
    *,
    llm: LLMConfig | None = None,
    vision: VisionConfig | None = None,
    audio: AudioConfig | None = None,
    tokens: SpecialTokens | None = None,
) -> OmniConfig:
    """Returns the omni model of these parts: widths between two of them follow, what is not given is as in `base`.

    Raises ConfigError where no model has these sizes.
    """
    llm, vision, audio = llm or base.llm, vision or base.vision, audio or base.audio
    return replace(
        base,
        llm=llm,
        vision=replace(vision, out_dim=llm.hidden_size),
        audio=audio,
        audio_head=AudioHeadConfig(num_layers=base.audio_head.num_layers, head_dim=min(128, llm.hidden_size)),
        flow=replace(base.flow, prenet_in_dim=audio.d_model),
        tokens=tokens or base.tokens,
    )


def qwen2_config(cfg: OmniConfig, stated: dict[str, Any], dtype: str, *, tied: bool = False) -> dict[str, Any]:
    """Returns the `config.json` of the language model as a Qwen2.

    Args:
        cfg: the omni model's sizes.
        stated: its `config.json`, which may give a longer context.
        dtype: that of the tensors.
        tied: whether the text embedding is the output head too.
    """
    llm, longest = cfg.llm, stated.get("max_position_embeddings")
    values: dict[str, Any] = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "torch_dtype": dtype}
    values |= {theirs: getattr(llm, ours) for ours, theirs in LLM_KEYS.items()}
    # Only where it cannot be derived: older readers of config.json do not know the key.
    if llm.head_dim * llm.num_heads != llm.hidden_size:
        values["head_dim"] = llm.head_dim
    values |= {"hidden_act": "silu", "tie_word_embeddings": tied, "use_sliding_window": False, "use_cache": True}
    values["max_position_embeddings"] = max(longest, CONTEXT) if isinstance(longest, int) else CONTEXT
    return values | {"bos_token_id": None, "eos_token_id": cfg.tokens.end_of_text}


def qwen2_vl_config(cfg: OmniConfig, dtype: str) -> dict[str, Any]:
    """Returns the `config.json` of a Qwen2-VL that has the vision tower and no layer of a language model."""
    vision, width = cfg.vision, cfg.vision.out_dim
    tower = {theirs: getattr(vision, ours) for ours, theirs in TOWER_KEYS.items()}
    tower |= {"in_channels": vision.in_channels, "in_chans": vision.in_channels, "hidden_act": "quick_gelu"}
    # One head, so that any width is a multiple of it; three axes share its frequencies.
    text = {"hidden_size": width, "num_hidden_layers": 0, "num_attention_heads": 1, "num_key_value_heads": 1}
    text |= {"intermediate_size": width, "vocab_size": 1, "bos_token_id": None, "eos_token_id": None}
    text |= {"layer_types": [], "rope_scaling": {"type": "mrope", "mrope_section": [width // 2, 0, 0]}}
    return {
        "architectures": ["Qwen2VLModel"],
        "model_type": "qwen2_vl",
        "torch_dtype": dtype,
        "vision_config": tower | {"model_type": "qwen2_vl"},
        **text,
    }


def whisper_config(cfg: OmniConfig, dtype: str) -> dict[str, Any]:
    """Returns the `config.json` of a Whisper that has the audio encoder and no layer of a decoder."""
    audio = cfg.audio
    values = {"architectures": ["WhisperModel"], "model_type": "whisper", "torch_dtype": dtype}
    values |= {name: getattr(audio, name) for name in WHISPER_SIZES}
    values["max_source_positions"] = audio.encoder_length(audio.max_mel_frames)
    values |= {"activation_function": "gelu", "scale_embedding": False, "is_encoder_decoder": True}
    # Ids within the vocabulary of the decoder that is not there.
    ids = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"), 0)
    values |= {"decoder_layers": 0, "decoder_attention_heads": audio.encoder_attention_heads, "vocab_size": 1, **ids}
    return values | {"decoder_ffn_dim": audio.encoder_ffn_dim, "begin_suppress_tokens": None, "suppress_tokens": None}


def image_processor_config(vision: VisionConfig) -> dict[str, Any]:
    """Returns the `preprocessor_config.json` of the tower: how transformers makes its patches of a still."""
    limits = vision.image_limits
    return {
        "image_processor_type": "Qwen2VLImageProcessor",
        "min_pixels": limits.min_pixels,
        "max_pixels": limits.max_pixels,
        "patch_size": vision.patch_size,
        "temporal_patch_size": vision.temporal_patch_size,
        "merge_size": vision.spatial_merge_size,
        "image_mean": list(vision.image_mean),
        "image_std": list(vision.image_std),
    }


def mel_extractor_config(audio: AudioConfig) -> dict[str, Any]:
    """Returns the `preprocessor_config.json` of the encoder: how transformers makes its log mel of a waveform."""
    return {
        "feature_extractor_type": "WhisperFeatureExtractor",
        "feature_size": audio.num_mel_bins,
        "sampling_rate": audio.sampling_rate,
        "hop_length": audio.hop_length,
        "n_fft": audio.n_fft,
        "chunk_length": audio.max_audio_seconds,
    }


def check_tokens(vocabulary: TextVocabulary, stated: dict[str, Any], path: Path) -> None:
    """Raises ConfigError where the end tokens of a language model's config are no tokens of its tokenizer."""
    known = set(vocabulary.known.tolist())
    for key in ("bos_token_id", "eos_token_id"):
        ids = stated.get(key)
        for token in ids if isinstance(ids, list) else [ids]:
            if token is not None and (type(token) is not int or token not in known):
                raise ConfigError(f"{path}: {key} {token} is the id of no token of the tokenizer beside it")


def _check_type(values: dict[str, Any], wanted: tuple[str, ...]) -> None:
    """Raises ConfigError for another `model_type`, saying of the relatives what keeps them out."""
    found = values.get("model_type")
    if found not in wanted:
        why = _RELATIVES.get(found, "") if isinstance(found, str) else ""
        raise ConfigError(f"model_type is {found!r}, not {wanted[0]!r}{f': {why}' if why else ''}")


def _check_values(values: dict[str, Any], required: dict[str, Any], prefix: str = "") -> None:
    """Raises ConfigError for a key that has another value than the one that the computation is written for."""
    for key, wanted in required.items():
        if values.get(key, wanted) != wanted:
            raise ConfigError(f"{prefix}{key} = {values[key]!r} is not supported (only {wanted!r})")
