"""The store of codes that belongs to a pipeline and an audio tokenizer: found, or written."""

import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator

import numpy as np
from jaxtyping import Float, Int32

from data_pipelines.codes import CodeKey, CodeStore, write_codes
from data_pipelines.document import SampleError
from data_pipelines.features import log_mel
from data_pipelines.pipeline import Pipeline
from data_pipelines.processor import AudioItem
from data_pipelines.sounds import decode_sound

log = logging.getLogger(__name__)

# Log-mel windows (mels, frames) to codes (g, levels), in order.
Encode = Callable[[Iterable[Float[np.ndarray, "mels f"]]], Iterator[Int32[np.ndarray, "g q"]]]


def open_or_write_codes(pipeline: Pipeline, fingerprint: str, encode: Encode) -> CodeStore:
    """The store of this tokenizer's codes for this pipeline's clips, in the data's cache; written when it is not there.

    A clip that cannot be decoded is named in the log and left out; its documents are then counted as `no_codes`.
    """
    items = list(pipeline.audio_items())
    clips = hashlib.sha256(repr(sorted(item.key for item in items)).encode()).hexdigest()
    path = pipeline.cache / f"codes-{fingerprint[:12]}-{clips[:12]}"
    if not path.exists():
        audio = pipeline.omni.audio
        write_codes(
            path,
            _encode_items(pipeline, items, encode),
            fingerprint=fingerprint,
            codebook_sizes=audio.codebook_sizes,
            window_rule={"seconds": audio.max_audio_seconds, "overlap": audio.split_overlap},
        )
    return CodeStore(path, fingerprint)


def _encode_items(
    pipeline: Pipeline, items: list[AudioItem], encode: Encode
) -> Iterator[tuple[CodeKey, Int32[np.ndarray, "g q"]]]:
    """Codes of every item that decodes. Mels are made as the encoder asks for them."""
    audio = pipeline.omni.audio
    decoded: list[AudioItem] = []

    def mels():
        for item in items:
            try:
                wave = decode_sound(item.media, item.samples, audio.sampling_rate)
            except SampleError as error:
                log.warning("no codes for %s (%s): %s", item.media.name, error.cause, error)
                continue
            decoded.append(item)
            yield log_mel(wave[item.window.start : item.window.start + item.window.samples], audio)

    for place, codes in enumerate(encode(mels())):
        yield decoded[place].key, codes
