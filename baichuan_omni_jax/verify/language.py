"""Checks of the language model, of the audio head on it, and of both with media merged in."""

import jax
import numpy as np
from jax.sharding import PartitionSpec

from baichuan_omni_jax.omni.merge import merge_media
from baichuan_omni_jax.verify.fixtures import COMPUTE, Fixtures, as_media, as_rows
from baichuan_omni_jax.verify.generation import greedy_codes, greedy_text
from baichuan_omni_jax.verify.golden import Golden
from baichuan_omni_jax.verify.media import patch_places

MAX_AUDIO_FRAMES = 48


@jax.jit
def forward(llm, *row):
    """Hidden states and logits of a row of tokens, positions and segment ids."""
    tokens, positions, segment_ids = as_rows(*row)
    hidden = llm(llm.embed(tokens), positions, segment_ids)
    return hidden, llm.logits(hidden)


def llm(fixtures: Fixtures, gold: Golden) -> None:
    """A left-padded batch."""
    mask = gold.input("attention_mask")
    hidden, logits = forward(fixtures.branch("llm"), gold.input("input_ids"), gold.input("position_ids"), mask)
    gold.compare_rows("logits", logits, mask == 1)
    gold.compare("last_hidden", hidden[:, -1])


def packed(fixtures: Fixtures, gold: Golden) -> None:
    """Documents side by side in a row, which must not see each other."""
    tokens, lengths = gold.input("input_ids"), gold.input("document_lengths")
    ids = np.zeros(tokens.size, np.int32)
    ids[: lengths.sum()] = np.repeat(np.arange(1, len(lengths) + 1), lengths)
    ids = ids.reshape(tokens.shape)
    _, logits = forward(fixtures.branch("llm"), tokens, gold.input("position_ids"), ids)
    gold.compare_rows("logits", logits, ids > 0)


def audio_head(fixtures: Fixtures, gold: Golden) -> None:
    """Logits of every level, given the levels before."""
    run = jax.jit(lambda head, hidden, codes: head(hidden, codes))
    logits = run(fixtures.branch("audio_head"), gold.input("hidden")[None], gold.input("codes")[None])
    for q, level in enumerate(logits):
        gold.compare(f"logits_{q}", level[0])


def omni(fixtures: Fixtures, gold: Golden) -> None:
    """Images, video and sound merged into a row of text, each in order of appearance; sound by our own tokenizer."""
    tokens = gold.input("input_ids")
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    visual, heard = _visual_tokens(fixtures, gold, tokens), _audio_codes(fixtures, gold, tokens)

    @jax.jit
    def run(llm, vision, head, tokens, positions, visual, heard):
        tokens, positions = as_rows(tokens, positions)
        *patches, order, slots = visual
        embedded = jax.reshard(vision(*patches)[0], PartitionSpec())
        codes, heard_slots = as_media(*heard)
        media = [tuple(as_media(embedded[order], slots)), (head.embed(codes), heard_slots)]
        x = merge_media(llm.embed(tokens), media, COMPUTE.rules)
        hidden = llm(x, positions, positions * 0 + 1)
        return x, hidden, llm.logits(hidden)

    branches = (fixtures.branch(name) for name in ("llm", "vision", "audio_head"))
    embedded, hidden, logits = run(*branches, tokens, positions, visual, heard)
    gold.compare("inputs_embeds", embedded)
    gold.compare("last_hidden", hidden)
    gold.compare("logits", logits)


def _visual_tokens(fixtures: Fixtures, gold: Golden, tokens: np.ndarray) -> tuple[np.ndarray, ...]:
    """Patches of images, then of videos, as one row; which visual token goes into which slot of which row."""
    cfg, ids = fixtures.config.vision, fixtures.config.tokens
    grids = [gold.input("image_grid_thw"), gold.input("video_grid_thw")]
    pixels = np.concatenate([gold.input("image_pixels"), gold.input("video_pixels")])
    places, frames = patch_places(np.concatenate(grids), cfg.spatial_merge_size)
    counts = [int(grid.prod(-1).sum()) // cfg.merged_patches for grid in grids]
    source = np.zeros(tokens.shape, np.int64)
    source[tokens == ids.image_pad] = np.arange(_expect(gold, tokens, ids.image_pad, counts[0], "image_pad"))
    of_video = np.arange(_expect(gold, tokens, ids.video_place, counts[1], "video_place"))
    source[tokens == ids.video_place] = counts[0] + of_video
    order, slots = slots_of(np.isin(tokens, (ids.image_pad, ids.video_place)), source)
    return pixels[None], places[None], frames[None], order, slots


def _audio_codes(fixtures: Fixtures, gold: Golden, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes (b, a, q) of every audio slot and the slots (b, a), clips in order of appearance."""
    cfg, mel = fixtures.config.audio, gold.input("mel").transpose(0, 2, 1)
    # Any count of mel frames that gives this length will do: frames past the clip are zero in the file.
    frames = gold.input("encoder_length") * cfg.stride_size
    encode = jax.jit(lambda tokenizer, mel, frames: tokenizer.encode(mel, frames, padded=True))
    codes, valid = (np.asarray(x) for x in encode(fixtures.branch("audio_encoder"), mel, frames))
    gold.equal("bridge_length", valid.sum(1))
    flat = codes[valid]
    pad = tokens == fixtures.config.tokens.audio_pad
    source = np.zeros(tokens.shape, np.int64)
    source[pad] = np.arange(_expect(gold, tokens, fixtures.config.tokens.audio_pad, len(flat), "audio_pad"))
    order, slots = slots_of(pad, source)
    return flat[order], slots


def _expect(gold: Golden, tokens: np.ndarray, pad: int, count: int, name: str) -> int:
    """`count`, the embeddings there are for the slots of `pad`. Raises ValueError when there are not as many slots."""
    slots = int((tokens == pad).sum())
    if slots != count:
        raise ValueError(f"input_ids hold {slots} {name} tokens, the media make {count}")
    return count


def slots_of(taken: np.ndarray, source: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Row by row the `source` of the slots that are `taken` (b, t), and those slots; both (b, most of a row).

    An unused place has slot t (and source 0).
    """
    b, t = taken.shape
    most = int(taken.sum(1).max())
    order, slots = np.zeros((b, most), np.int32), np.full((b, most), t, np.int32)
    for row in range(b):
        found = np.flatnonzero(taken[row])
        order[row, : len(found)], slots[row, : len(found)] = source[row, found], found
    return order, slots


def generate_text(fixtures: Fixtures, gold: Golden) -> None:
    """The most likely token, as many times as the reference took it."""
    prompt = gold.input("prompt")
    steps = gold.reference("sequence").shape[1] - prompt.shape[1]
    gold.equal("sequence", greedy_text(fixtures.branch("llm"), prompt, steps))


def generate_audio(fixtures: Fixtures, gold: Golden) -> None:
    """The most likely frames until the end of speech."""
    branches = fixtures.branch("llm"), fixtures.branch("audio_head")
    end = fixtures.config.audio.codebook_sizes[0]
    gold.equal("codes", greedy_codes(*branches, gold.input("prompt"), end=end, limit=MAX_AUDIO_FRAMES))
