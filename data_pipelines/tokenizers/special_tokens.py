"""Names of the special tokens, and of the marks that only a source prompt holds.

`SPECIAL_TOKENS` lists the released added tokens in the order of their ids; a tokenizer trained here gives them the ids
0..58 (`baichuan_omni_jax.config.model.TRAINED_TOKENS`), the released one 151643..151701.
"""

import json
from pathlib import Path

SPECIAL_TOKENS: tuple[str, ...] = tuple(
    json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8")),
)

END_OF_TEXT = "<|endoftext|>"
SYSTEM, USER, ASSISTANT = "<B_SYS>", "<C_Q>", "<C_A>"
AUDIO_START, AUDIO_END, AUDIO_PAD = "<audio_start_baichuan>", "<audio_end_baichuan>", "<audio_pad_baichuan>"
AUDIOGEN_START, AUDIOGEN_END = "<audiogen_start_baichuan>", "<audiogen_end_baichuan>"
IMAGE_START, IMAGE_END, IMAGE_PAD = "<img_start_baichuan>", "<img_end_baichuan>", "<img_pad_baichuan>"
AUDIOTEXT_START = "<audiotext_start_baichuan>"  # before the turn of an assistant that answers aloud
VIDEO_START, VIDEO_END = "<video_start_baichuan>", "<video_end_baichuan>"
VIDEO_PLACE = "<video_palce_baichuan>"  # the released spelling

# Marks of a source prompt; they are no tokens and never reach the tokenizer.
TRAINABLE_START, TRAINABLE_END = "<trainable_start>", "<trainable_end>"
FRAME_START, FRAME_END = "<videoframe_start_omni>", "<videoframe_end_omni>"
TOKENS_START, TOKENS_END = "<tokens_start_omni>", "<tokens_end_omni>"
LITERAL = "<literal_omni>"  # within a name: the name is text (`prompts.escape`)

# What a tokenizer must know as one token each, besides those of the model: the marks of a conversation.
CONVERSATION_TOKENS: tuple[str, ...] = (SYSTEM, USER, ASSISTANT, AUDIOTEXT_START)

# Field of `baichuan_omni_jax.config.SpecialTokens` -> name of the token.
MODEL_TOKENS: dict[str, str] = {
    "end_of_text": END_OF_TEXT,
    "audio_start": AUDIO_START,
    "audio_end": AUDIO_END,
    "audio_pad": AUDIO_PAD,
    "image_start": IMAGE_START,
    "image_end": IMAGE_END,
    "image_pad": IMAGE_PAD,
    "video_place": VIDEO_PLACE,
    "video_start": VIDEO_START,
    "video_end": VIDEO_END,
    "audiogen_start": AUDIOGEN_START,
    "audiogen_end": AUDIOGEN_END,
}
