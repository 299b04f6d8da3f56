"""Checks of the language model, of the audio head on it, and of both with media merged in.

Greedy generation computes the whole row again for every token: slow, and with nothing that could go wrong. Rows have
one padded length, so that one program is compiled; what follows the last token is not seen, as all is causal.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Int32

from baichuan_omni_jax.llm.audio_head import AudioHeadBranch
from baichuan_omni_jax.llm.model import LanguageModel
from baichuan_omni_jax.omni.merge import merge_media, pick_slots
from baichuan_omni_jax.verify.fixtures import COMPUTE, Fixtures, Golden, as_media, as_rows
from baichuan_omni_jax.verify.media import patch_places

MAX_AUDIO_FRAMES = 48


@jax.jit
def forward(llm, *row):
    """Computes hidden states and logits of a row of tokens, positions and segment ids."""
    tokens, positions, segment_ids = as_rows(*row)
    hidden = llm(llm.embed(tokens), positions, segment_ids)
    return hidden, llm.logits(hidden)


def llm(fixtures: Fixtures, gold: Golden) -> None:
    """Checks a left-padded batch."""
    mask = gold.input("attention_mask")
    # The attention mask serves as segment ids: 1 for text, 0 for padding, which nothing attends to.
    hidden, logits = forward(fixtures.branch("llm"), gold.input("input_ids"), gold.input("position_ids"), mask)
    gold.compare_rows("logits", logits, mask == 1)
    gold.compare("last_hidden", hidden[:, -1])


def packed(fixtures: Fixtures, gold: Golden) -> None:
    """Checks documents side by side in a row, which must not see each other."""
    tokens, lengths = gold.input("input_ids"), gold.input("document_lengths")
    # Segment ids from 1, document after document; 0 past the last.
    ids = np.zeros(tokens.size, np.int32)
    ids[: lengths.sum()] = np.repeat(np.arange(1, len(lengths) + 1), lengths)
    ids = ids.reshape(tokens.shape)
    _, logits = forward(fixtures.branch("llm"), tokens, gold.input("position_ids"), ids)
    gold.compare_rows("logits", logits, ids > 0)


def audio_head(fixtures: Fixtures, gold: Golden) -> None:
    """Checks the logits of every level, given the levels before."""
    run = jax.jit(lambda head, hidden, codes: head(hidden, codes))
    logits = run(fixtures.branch("audio_head"), gold.input("hidden")[None], gold.input("codes")[None])
    for q, level in enumerate(logits):
        gold.compare(f"logits_{q}", level[0])


def omni(fixtures: Fixtures, gold: Golden) -> None:
    """Checks images, video and audio merged into a row of text, each in order of appearance.

    The audio's codes are our own tokenizer's.
    """
    tokens = gold.input("input_ids")
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    visual, audio = _visual_tokens(fixtures, gold, tokens), _audio_codes(fixtures, gold, tokens)

    @jax.jit
    def run(llm, vision, head, tokens, positions, visual, audio):
        tokens, positions = as_rows(tokens, positions)
        *patches, order, slots = visual
        # Visual tokens of all images and videos are gathered on the device, then dealt to the rows' slots.
        embedded = jax.reshard(vision(*patches)[0], PartitionSpec())
        codes, audio_slots = as_media(*audio)
        media = [tuple(as_media(embedded[order], slots)), (head.embed(codes), audio_slots)]
        x = merge_media(llm.embed(tokens), media, COMPUTE.rules)
        hidden = llm(x, positions, positions * 0 + 1)
        return x, hidden, llm.logits(hidden)

    branches = (fixtures.branch(name) for name in ("llm", "vision", "audio_head"))
    embedded, hidden, logits = run(*branches, tokens, positions, visual, audio)
    gold.compare("inputs_embeds", embedded)
    gold.compare("last_hidden", hidden)
    gold.compare("logits", logits)


def _visual_tokens(fixtures: Fixtures, gold: Golden, tokens: np.ndarray) -> tuple[np.ndarray, ...]:
    """Returns patches of images, then of videos, as one row, and which visual token goes into which slot."""
    cfg, ids = fixtures.config.vision, fixtures.config.tokens
    grids = [gold.input("image_grid_thw"), gold.input("video_grid_thw")]
    pixels = np.concatenate([gold.input("image_pixels"), gold.input("video_pixels")])
    places, frames = patch_places(np.concatenate(grids), cfg.spatial_merge_size)
    counts = [int(grid.prod(-1).sum()) // cfg.merged_patches for grid in grids]
    source = np.zeros(tokens.shape, np.int64)
    # Each kind of slot takes its own embeddings in order of appearance over the whole batch.
    source[tokens == ids.image_pad] = np.arange(_expect(gold, tokens, ids.image_pad, counts[0], "image_pad"))
    of_video = np.arange(_expect(gold, tokens, ids.video_place, counts[1], "video_place"))
    source[tokens == ids.video_place] = counts[0] + of_video
    order, slots = slots_of(np.isin(tokens, (ids.image_pad, ids.video_place)), source)
    return pixels[None], places[None], frames[None], order, slots


def _audio_codes(fixtures: Fixtures, gold: Golden, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns codes (b, a, q) of every audio slot and the slots (b, a), clips in order of appearance."""
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
    """Returns `count`, the embeddings for the slots of `pad`. Raises ValueError when there are not as many slots."""
    slots = int((tokens == pad).sum())
    if slots != count:
        raise ValueError(f"input_ids hold {slots} {name} tokens, the media make {count}")
    return count


def slots_of(taken: np.ndarray, source: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Comparison by row the `source` of the slots that are `taken` (b, t), and those slots; both (b, most of a row).

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
    """Checks the most likely token, as many times as the reference took it."""
    prompt = gold.input("prompt")
    steps = gold.reference("sequence").shape[1] - prompt.shape[1]
    gold.equal("sequence", greedy_text(fixtures.branch("llm"), prompt, steps))


def generate_audio(fixtures: Fixtures, gold: Golden) -> None:
    """Checks the most likely frames until the end of speech."""
    branches = fixtures.branch("llm"), fixtures.branch("audio_head")
    end = fixtures.config.audio.codebook_sizes[0]
    gold.equal("codes", greedy_codes(*branches, gold.input("prompt"), end=end, limit=MAX_AUDIO_FRAMES))


def greedy_text(llm: LanguageModel, prompt: Int32[np.ndarray, "b p"], steps: int) -> Int32[np.ndarray, "b t"]:
    """Returns `prompt` and the `steps` most likely tokens after it. All rows of the prompt are of the same length."""
    # Rows of their final length: what stands past a position cannot reach it.
    tokens = np.pad(prompt, ((0, 0), (0, steps)))
    for at in range(prompt.shape[1], tokens.shape[1]):
        tokens[:, at] = _next_token(llm, tokens, np.full((len(tokens), 1), at - 1, np.int32))
    return tokens


def greedy_codes(
    llm: LanguageModel, head: AudioHeadBranch, prompt: Int32[np.ndarray, "1 p"], *, end: int, limit: int
) -> Int32[np.ndarray, "n q"]:
    """Returns the most likely frames after `prompt`, up to the one whose level 0 is `end`, or `limit` of them."""
    start, levels = prompt.shape[1], len(head.embedding.tables)
    tokens = np.pad(prompt, ((0, 0), (0, limit)))
    codes, slots = np.zeros((1, limit, levels), np.int32), np.full((1, limit), start + limit, np.int32)
    made = 0
    while made < limit and (made == 0 or codes[0, made - 1, 0] != end):
        codes[:, made] = _next_frame(llm, head, tokens, codes, slots, np.array([[start + made - 1]], np.int32))
        slots[:, made] = start + made
        made += 1
    return codes[0, :made]


@jax.jit
def _next_token(llm, tokens, at):
    x = llm.embed(*as_rows(tokens))
    (slot,) = as_media(at)
    hidden = pick_slots(_hidden(llm, x), slot, COMPUTE.rules)
    return jnp.argmax(llm.logits(hidden)[:, 0], -1)


@jax.jit
def _next_frame(llm, head, tokens, codes, slots, at):
    # The frames so far stand in their slots, then the head reads the last position's state.
    x = llm.embed(*as_rows(tokens))
    frame_slots, slot = as_media(slots, at)
    x = merge_media(x, [(head.embed(codes), frame_slots)], COMPUTE.rules)
    hidden = pick_slots(_hidden(llm, x), slot, COMPUTE.rules)
    levels = codes.shape[-1]

    def choose(level, frame):
        logits = head(hidden, frame)
        width = max(x.shape[-1] for x in logits)
        # Only level 0 may choose its extra index, the end of speech.
        allowed = [x if q == 0 else x[..., :-1] for q, x in enumerate(logits)]
        padded = [jnp.pad(x[:, 0], ((0, 0), (0, width - x.shape[-1])), constant_values=-jnp.inf) for x in allowed]
        best = jax.reshard(jnp.argmax(jnp.stack(padded)[level], -1), PartitionSpec())
        return jnp.where(jnp.arange(levels) == level, best[:, None, None], frame)

    # Level by level: each is chosen given the levels before, whose codes the head embeds.
    frame = jnp.zeros((len(tokens), 1, levels), jnp.int32)
    return jax.lax.fori_loop(0, levels, choose, frame)[:, 0]


def _hidden(llm, x):
    positions = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2])
    return llm(x, *as_rows(positions, jnp.ones_like(positions)))
