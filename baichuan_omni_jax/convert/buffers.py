"""Buffers that the released code computes at construction."""

import math
import re
from collections.abc import Mapping

import numpy as np

from baichuan_omni_jax.config import OmniConfig
from baichuan_omni_jax.convert.safetensors_io import TensorSource

# Older versions of transformers saved what rotary positions are computed from, once or in every layer.
_ROTARY = re.compile(r"(?:.*\.)?rotary(?:_pos)?_emb\.(inv_freq|cos_cached|sin_cached)")
_VISION, _VISION_BASE = "model.visual_model.", 1e4
# bf16 keeps 8 bits; fp16 has no small numbers.
_RELATIVE, _ABSOLUTE = 1e-2, 1e-5


def sinusoids(length: int, width: int) -> np.ndarray:
    """The position table (length, width), fp32: all sines, then all cosines, of the audio encoder and decoders.

    Rounded as the released code does it: frequencies as fp32 exponentials, angles as fp32 products.
    """
    half = width // 2
    step = np.float32(math.log(10000.0) / (half - 1))
    frequencies = np.exp(-step * np.arange(half, dtype=np.float32))
    angles = np.arange(length, dtype=np.float32)[:, None] * frequencies
    return np.concatenate([np.sin(angles), np.cos(angles)], 1)


def rotary_buffers(source: TensorSource, cfg: OmniConfig) -> dict[str, bool]:
    """Names of the buffers of rotary positions that `source` holds, which nothing here reads, nor does transformers.

    With each, whether it is what the configuration gives: false for frequencies of another base, or another size.
    """
    buffers = {}
    found = [(name, match[1]) for name in source.infos if (match := _ROTARY.fullmatch(name))]
    for name, kind in found:
        buffers[name] = True
        if kind == "inv_freq":
            vision = cfg.vision.embed_dim // cfg.vision.num_heads // 2, _VISION_BASE
            width, base = vision if name.startswith(_VISION) else (cfg.llm.head_dim, cfg.llm.rope_theta)
            expected = base ** -(np.arange(0, width, 2) / width)
            value = source.read(name).astype(np.float64)
            same_size = value.shape == expected.shape
            buffers[name] = same_size and np.allclose(value, expected, _RELATIVE, _ABSOLUTE)
    return buffers


def describe_dropped(buffers: Mapping[str, bool]) -> str:
    """One line for the user on what `rotary_buffers` found."""
    names = list(buffers)
    many = f" and {len(names) - 1} more" if len(names) > 1 else ""
    line = f"dropped {names[0]}{many}: rotary positions are computed"
    if other := next((name for name, same in buffers.items() if not same), ""):
        line += f"; {other} does not hold the frequencies of config.json, by which they are"
    return line
