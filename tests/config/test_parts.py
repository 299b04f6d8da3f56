"""Sizes of public models, by the config.json that each is published with, joined to an omni model."""

import pytest

from baichuan_omni_jax.config import MODELS, baichuan_omni_7b
from baichuan_omni_jax.config.parts import (
    audio_from_whisper,
    join_parts,
    llm_from_qwen2,
    qwen2_config,
    qwen2_vl_config,
    vision_from_qwen2_vl,
    whisper_config,
)

# What the files say that their own class does not, of Qwen2.5 and Whisper (encoder and decoder are equally deep).
QWEN = {"model_type": "qwen2", "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 1000000.0}
QWEN |= {"use_sliding_window": False, "sliding_window": 32768, "max_window_layers": 21}
SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
LLMS = {
    "omni_0b5": (151936, (896, 24, 14, 2, 4864), True),
    "omni_1b5": (151936, (1536, 28, 12, 2, 8960), True),
    "omni_3b": (151936, (2048, 36, 16, 2, 11008), True),
    "baichuan_omni_7b": (152064, (3584, 28, 28, 4, 18944), False),
    "omni_14b": (152064, (5120, 48, 40, 8, 13824), False),
}
WHISPERS = {"omni_0b5": (80, 768, 12, 12), "omni_1b5": (80, 1024, 24, 16)}
TOWER = {"depth": 32, "embed_dim": 1280, "num_heads": 16, "mlp_ratio": 4, "in_chans": 3, "hidden_act": "quick_gelu"}
TOWER |= {"patch_size": 14, "spatial_merge_size": 2, "spatial_patch_size": 14, "temporal_patch_size": 2}


@pytest.mark.parametrize("name", LLMS)
def test_public_sizes_are_those_of_the_named_models(name):
    vocabulary, sizes, tied = LLMS[name]
    stated = QWEN | dict(zip(SIZES, sizes, strict=True))
    llm, found = llm_from_qwen2(stated | {"vocab_size": vocabulary, "tie_word_embeddings": tied})
    assert found == tied
    base = baichuan_omni_7b()
    tower = TOWER | {"hidden_size": 1536}
    vision = vision_from_qwen2_vl({"model_type": "qwen2_vl", "vision_config": tower}, base.vision)
    assert vision.out_dim == 1536
    mels, width, layers, heads = WHISPERS.get(name, (128, 1280, 32, 20))
    whisper = {"model_type": "whisper", "num_mel_bins": mels, "d_model": width, "encoder_layers": layers}
    whisper |= {"encoder_attention_heads": heads, "encoder_ffn_dim": 4 * width, "max_source_positions": 1500}
    audio = audio_from_whisper(whisper, base.audio)
    assert join_parts(base, llm=llm, vision=vision, audio=audio) == MODELS[name]()


@pytest.mark.parametrize("name", LLMS)
def test_each_part_of_a_model_is_read_back(name):
    """The config.json that a part is written with says the sizes that it has."""
    cfg, base = MODELS[name](), baichuan_omni_7b()
    assert llm_from_qwen2(qwen2_config(cfg, {}, "bfloat16")) == (cfg.llm, False)
    assert llm_from_qwen2(qwen2_config(cfg, {}, "bfloat16", tied=True)) == (cfg.llm, True)
    assert vision_from_qwen2_vl(qwen2_vl_config(cfg, "bfloat16"), base.vision) == cfg.vision
    assert audio_from_whisper(whisper_config(cfg, "bfloat16"), base.audio) == cfg.audio


def test_windows_that_no_layer_has_are_no_windows():
    """Where the switch is on, layers from `max_window_layers` on have one."""
    stated = QWEN | dict(zip(SIZES, LLMS["omni_0b5"][1], strict=True)) | {"vocab_size": 151936}
    llm, _ = llm_from_qwen2(stated | {"use_sliding_window": True, "max_window_layers": 24})
    assert llm.num_layers == 24
