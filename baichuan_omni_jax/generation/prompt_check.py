"""What a prompt must be like to be served; everything else is refused before it costs anything."""

from collections.abc import Collection

import numpy as np

from baichuan_omni_jax.config import GenerationConfig, OmniConfig
from baichuan_omni_jax.errors import RequestError
from baichuan_omni_jax.generation.events import Prompt


def check_prompt(
    prompt: Prompt, settings: GenerationConfig, cfg: OmniConfig, branches: Collection[str], length: int
) -> None:
    """Raises RequestError: `too_long` for the cache of `length`, `no_branch`, `bad_media`, `bad_message`."""
    tokens = np.asarray(prompt.tokens)
    if not len(tokens) or tokens.min() < 0 or tokens.max() >= cfg.llm.vocab_size:
        raise RequestError("bad_message", f"a prompt has at least one token, all in 0 .. {cfg.llm.vocab_size - 1}")
    if len(tokens) + 1 > length:
        raise RequestError(
            "too_long", f"the prompt has {len(tokens)} tokens; the cache holds {length}, one of the answer included"
        )
    _check_branches(prompt, settings, cfg, branches)
    _check_sound(prompt, cfg)
    _check_pictures(prompt, cfg)


def _check_branches(prompt: Prompt, settings: GenerationConfig, cfg: OmniConfig, branches: Collection[str]) -> None:
    speech = settings.speech or int(prompt.tokens[-1]) == cfg.tokens.audiogen_start
    needs = (
        ("vision", len(prompt.patches), "pictures"),
        ("audio_encoder", len(prompt.mels), "sound"),
        ("audio_head", len(prompt.audio_codes), "sound"),
        ("audio_head", speech, "an answer aloud"),
    )
    for branch, needed, what in needs:
        if needed and branch not in branches:
            raise RequestError("no_branch", f"the request has or asks for {what}, the checkpoint has no {branch}")


def _check_sound(prompt: Prompt, cfg: OmniConfig) -> None:
    codes, sizes = np.asarray(prompt.audio_codes), np.array(cfg.audio.codebook_sizes)
    if codes.shape != (len(prompt.audio_slots), len(sizes)):
        raise RequestError(
            "bad_media", f"audio codes {codes.shape} do not fit {len(prompt.audio_slots)} slots of {len(sizes)} levels"
        )
    if len(codes) and not ((codes >= 0) & (codes < sizes)).all():
        raise RequestError("bad_media", f"an audio code lies outside its codebook (sizes {tuple(sizes.tolist())})")
    _check_slots("audio", prompt.audio_slots, len(prompt.tokens))
    if len(prompt.mels) != len(prompt.mel_places):
        raise RequestError("bad_media", f"{len(prompt.mels)} mel windows have {len(prompt.mel_places)} places")
    for mel, place in zip(prompt.mels, prompt.mel_places, strict=True):
        frames, most = len(mel), cfg.audio.max_mel_frames
        if mel.shape[1:] != (cfg.audio.num_mel_bins,) or frames > most:
            raise RequestError(
                "bad_media", f"a mel window {mel.shape} is not (at most {most}, {cfg.audio.num_mel_bins})"
            )
        if not 0 <= place <= len(codes) - cfg.audio.bridge_length(frames):
            raise RequestError("bad_media", f"code frames of a mel window at {place} lie outside the {len(codes)}")
        if not np.isfinite(mel).all():
            raise RequestError("bad_media", "a mel window holds values that are not finite")


def _check_pictures(prompt: Prompt, cfg: OmniConfig) -> None:
    patches, merged = np.asarray(prompt.patches), cfg.vision.merged_patches
    if len(prompt.visual_slots) * merged != len(patches):
        raise RequestError(
            "bad_media", f"{len(patches)} patches do not fit {len(prompt.visual_slots)} visual slots of {merged}"
        )
    if len(patches) and patches.shape[1] != cfg.vision.patch_values:
        raise RequestError("bad_media", f"a patch has {patches.shape[1]} values, not {cfg.vision.patch_values}")
    frames = np.asarray(prompt.patch_frames)
    if prompt.patch_grid.shape != (len(patches), 2) or frames.shape != (len(patches),):
        raise RequestError("bad_media", f"patch_grid and patch_frames do not fit {len(patches)} patches")
    if len(frames) and (frames[0] < 1 or (np.diff(frames) < 0).any() or (np.bincount(frames) % merged).any()):
        raise RequestError("bad_media", f"patch_frames must ascend from 1, each picture a multiple of {merged} patches")
    _check_slots("visual", prompt.visual_slots, len(prompt.tokens))


def _check_slots(kind: str, slots: np.ndarray, tokens: int) -> None:
    slots = np.asarray(slots)
    if len(slots) and (slots.min() < 0 or slots.max() >= tokens or len(np.unique(slots)) < len(slots)):
        raise RequestError("bad_media", f"{kind} slots are not different positions among the {tokens} tokens")
