"""A fixtures folder of other sizes than the golden one: random weights, random inputs, outputs of zeros."""

from dataclasses import replace
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from baichuan_omni_jax.config import OmniConfig, tiny
from baichuan_omni_jax.config.vocoder import VocoderConfig, tiny_vocoder
from baichuan_omni_jax.convert.synthetic import write_random_checkpoint

Arrays = dict[str, np.ndarray]


def other_sizes() -> OmniConfig:
    """3 KV heads, 3 mid blocks, five codebooks, other depths."""
    cfg = tiny()
    return replace(
        cfg,
        vision=replace(cfg.vision, depth=1, num_heads=4),
        audio=replace(cfg.audio, encoder_layers=1, decoder_layers=1, codebook_sizes=(40, 24, 16, 8, 8)),
        llm=replace(cfg.llm, num_layers=2, num_heads=6, num_kv_heads=3),
        flow=replace(cfg.flow, num_mid_blocks=3, n_blocks=1, prenet_layers=1),
    )


def write_fixtures(folder: Path) -> Path:
    """Writes a folder of the golden format for `other_sizes`."""
    cfg, vocoder = other_sizes(), tiny_vocoder()
    write_random_checkpoint(folder, cfg, vocoder=vocoder)
    golden = _media(cfg) | _language(cfg) | _omni(cfg) | _sound(cfg) | _vocoder(vocoder)
    for name, arrays in golden.items():
        save_file({key: np.ascontiguousarray(x) for key, x in arrays.items()}, folder / f"{name}.safetensors")
    return folder


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


def zeros(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float32)


def counts(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def _media(cfg: OmniConfig) -> dict[str, Arrays]:
    a, v, q = cfg.audio, cfg.vision, cfg.audio.levels
    # A pair of frames of 2 x 4 patches, and a picture of 6 x 2.
    grids = np.array([[2, 2, 4], [1, 6, 2]])
    patches, frames = 16 + 12, (61, 18)
    lengths, groups = [a.encoder_length(n) for n in frames], [a.bridge_length(n) for n in frames]
    single = {}
    for i, (t, g) in enumerate(zip(lengths, groups, strict=True)):
        single |= {f"hidden_states_{i}": zeros(t, a.d_model), f"pre_quant_{i}": zeros(g, a.code_dim)}
        single[f"codes_{i}"] = np.zeros((g, q), np.int64)
    return {
        "vision": {
            "pixel_values": random(patches, 2 * v.patch_values),
            "grid_thw": grids,
            "encoder_out": zeros(patches, v.embed_dim),
            "bridge_out": zeros(patches // 4, v.out_dim),
        },
        "audio_encoder": {
            "mel": random(2, a.num_mel_bins, 61),
            "frames": counts(*frames),
            "encoder_length": counts(*lengths),
            "bridge_length": counts(*groups),
            "hidden_states": zeros(2, 31, a.d_model),
        },
        "audio_encoder_single": single,
        "audio_quantizer": {
            "hidden_states": random(2, 31, a.d_model),
            "bridge_length": counts(*groups),
            "pre_quant": zeros(2, 8, a.code_dim),
            "codes": np.zeros((sum(groups), q), np.int64),
            "recovered": zeros(sum(groups), a.code_dim),
            "decoder_emb": zeros(sum(groups), a.d_model),
        },
        "rvq": {"x": random(9, a.code_dim), "codes": np.zeros((9, q), np.int64)},
    }


def _language(cfg: OmniConfig) -> dict[str, Arrays]:
    d, v, q = cfg.llm.hidden_size, cfg.llm.vocab_size, cfg.audio.levels
    mask = np.array([[0, 0, 1, 1, 1], [1] * 5, [0, 1, 1, 1, 1]])
    tokens, prompt = 100 + np.arange(15).reshape(3, 5), counts(70, 71, 72, cfg.tokens.audiogen_start)[None]
    return {
        "llm": {
            "input_ids": tokens,
            "attention_mask": mask,
            "position_ids": mask.cumsum(1) * mask,
            "logits": zeros(3, 5, v),
            "last_hidden": zeros(3, d),
        },
        "packed": {
            "input_ids": tokens.reshape(1, 15),
            "position_ids": np.concatenate([np.arange(9), np.arange(6)])[None],
            "document_lengths": counts(9, 6),
            "logits": zeros(1, 15, v),
        },
        "audio_head": {"hidden": random(3, d), "codes": np.ones((3, q), np.int64)}
        | {f"logits_{i}": zeros(3, size + 1) for i, size in enumerate(cfg.audio.codebook_sizes)},
        "generate_text": {"prompt": prompt, "sequence": np.pad(prompt, ((0, 0), (0, 3)))},
        "generate_audio": {"prompt": prompt, "codes": np.zeros((48, q), np.int64)},
    }


def _omni(cfg: OmniConfig) -> dict[str, Arrays]:
    ids, d, a = cfg.tokens, cfg.llm.hidden_size, cfg.audio
    # Two rows: the pictures' slots lie in both, the clip's in the second.
    rows = [[70, *[ids.image_pad] * 4, 71, *[ids.video_place] * 2, 72, 73, 74, 75, 76]]
    rows.append([ids.image_pad, 70, *[ids.video_place] * 2, *[ids.audio_pad] * 7, 71, 72])
    return {
        "omni": {
            "input_ids": np.array(rows),
            "image_pixels": random(20, 2 * cfg.vision.patch_values),
            "image_grid_thw": np.array([[1, 2, 8], [1, 2, 2]]),
            "video_pixels": random(16, 2 * cfg.vision.patch_values),
            "video_grid_thw": np.array([[2, 4, 2]]),
            "mel": random(1, a.num_mel_bins, 61),
            "encoder_length": counts(31),
            "bridge_length": counts(7),
            "inputs_embeds": zeros(2, 13, d),
            "last_hidden": zeros(2, 13, d),
            "logits": zeros(2, 13, cfg.llm.vocab_size),
        }
    }


def _sound(cfg: OmniConfig) -> dict[str, Arrays]:
    a, mels, codes = cfg.audio, cfg.post_net.num_mel_bins, (5, 2)
    states = [4 * n - 1 for n in codes]
    frames = [2 * n * 5 // 8 for n in states]
    single = {}
    for i, (n, t, s) in enumerate(zip(codes, states, frames, strict=True)):
        single |= {f"decoder_emb_{i}": random(n, a.d_model), f"mel_length_{i}": counts(s)}
        single |= {f"hidden_states_before_dconv2_{i}": zeros(t, a.d_model)}
        single |= {f"coarse_mel_{i}": zeros(s, mels), f"refined_mel_{i}": zeros(s, mels)}

    def flow(*lengths: int) -> Arrays:
        b, t, m = len(lengths), max(lengths), cfg.flow.in_channels
        return {
            "hidden_states": random(b, t, a.d_model),
            "lengths": counts(*lengths),
            "noise": random(b, m, t),
            "t": np.float32(0.3).reshape(()),
            "prenet_out": zeros(b, t, m),
            "prenet_lengths": counts(*lengths),
            "estimator_out": zeros(b, m, t),
            "mel": zeros(b, m, t),
        }

    return {
        "audio_decoder": {
            "decoder_emb": random(sum(codes), a.d_model),
            "bridge_length": counts(*codes),
            "coarse_mel": zeros(2, max(frames), mels),
            "refined_mel": zeros(2, max(frames), mels),
            "mel_length": counts(*frames),
            "hidden_states_before_dconv2": zeros(sum(states), a.d_model),
            "output_length_before_dconv2": counts(*states),
        },
        "audio_decoder_single": single,
        "flow_matching": flow(7),
        "flow_matching_long": flow(110, 30, 4),
    }


def _vocoder(cfg: VocoderConfig) -> dict[str, Arrays]:
    def speech(b: int, t: int) -> Arrays:
        samples = t * cfg.hop_length
        return {
            "mel": random(b, cfg.in_channels, t),
            "phase": random(b, cfg.harmonics, 1),
            "sine_noise": random(b, cfg.harmonics, samples),
            "f0": zeros(b, t),
            "source": zeros(b, 1, samples),
            "wav": zeros(b, samples),
        }

    own = {"f0_predictor.classifier.weight": random(1, cfg.f0_cond_channels)}
    return {"vocoder_io": speech(1, 3), "vocoder_unvoiced_io": speech(2, 2) | own}
