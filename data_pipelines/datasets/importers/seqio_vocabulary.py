"""Our tokenizer as a `seqio.Vocabulary`. Needs the extra `seqio`; no training host imports it."""

import os
import re
from collections.abc import Sequence

import numpy as np
import seqio
import tensorflow as tf
from tokenizers import Tokenizer

from baichuan_omni_jax.errors import ConfigError
from data_pipelines.documents.prompts import NAMES, read_text
from data_pipelines.tokenizers.tokenizer import (
    END_OF_TEXT,
    LITERAL,
    encode,
    load_tokenizer,
    plain_tokenizer,
    tokenizer_fingerprint,
)

# All names begin with "<" and end with ">"; RE2 knows the same escapes.
NAME_PATTERN = f"<({'|'.join(re.escape(name[1:-1]) for name in NAMES)})>"
ESCAPED = f"<{LITERAL}\\1>"
TOKENIZER_VARIABLE = "OMNI_TOKENIZER"  # the environment variable that `default_vocabulary` reads


def plain(text: tf.Tensor) -> tf.Tensor:
    """Returns text that somebody wrote, for a feature: names of special tokens in it stay text (`prompts.escape`)."""
    return tf.strings.regex_replace(text, NAME_PATTERN, ESCAPED)


class OmniVocabulary(seqio.Vocabulary):
    """A `tokenizer.json` for seqio's tasks: text to ids and back as training does it, `<|endoftext|>` the end.

    Names of special tokens become their ids; a task puts text that somebody wrote through `plain` first.

    There is no id for unknown text (the tokenizer is byte level), and id 0 is a token like any other: nothing here
    pads. As everywhere in seqio, decoding stops after the first end.
    """

    def __init__(self, tokenizer: Tokenizer):
        super().__init__(extra_ids=0)
        self.tokenizer, self._plain = tokenizer, plain_tokenizer(tokenizer)
        self.fingerprint = tokenizer_fingerprint(tokenizer)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, OmniVocabulary) and other.fingerprint == self.fingerprint

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    @property
    def bos_id(self) -> int | None:
        return None

    @property
    def eos_id(self) -> int | None:
        return self.tokenizer.token_to_id(END_OF_TEXT)

    @property
    def unk_id(self) -> int | None:
        return None

    @property
    def _base_vocab_size(self) -> int:
        return max(self.tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    def _encode(self, s: str) -> list[int]:
        # As documents are tokenized: escaped names by the plain tokenizer, which knows no special token.
        parts = read_text(s)
        return [i for part in parts for i in encode(self._plain if part.plain else self.tokenizer, part.text)]

    def _decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=False)

    def _encode_tf(self, s: tf.Tensor) -> tf.Tensor:
        """Encodes text in a TensorFlow graph; bytes that are no UTF-8 become U+FFFD."""

        def ids(text: bytes | np.ndarray) -> np.ndarray:
            content = text if isinstance(text, bytes) else text.item()  # an array where TensorFlow runs eagerly
            return np.array(self._encode(content.decode("utf-8", "replace")), np.int32)

        encoded = tf.numpy_function(ids, [s], tf.int32)
        encoded.set_shape([None])
        return encoded

    def _decode_tf(self, ids: tf.Tensor) -> tf.Tensor:
        """Decodes ids (n,) to a string, ids (batch, n) to as many."""
        decode = lambda rows: self._decode(rows.tolist())  # noqa: E731
        if ids.shape.rank == 1:
            return tf.ensure_shape(tf.numpy_function(decode, [ids], tf.string), [])
        return tf.map_fn(self._decode_tf, ids, fn_output_signature=tf.string)


def default_vocabulary() -> OmniVocabulary:
    """Returns the vocabulary of the `tokenizer.json` that OMNI_TOKENIZER names, for modules that register tasks.

    `data_pipelines.datasets.importers.seqio_cache --tokenizer` sets it. Raises ConfigError.
    """
    path = os.environ.get(TOKENIZER_VARIABLE)
    if not path:
        raise ConfigError(f"set {TOKENIZER_VARIABLE} to a tokenizer.json: the tasks' vocabulary is read from it")
    return OmniVocabulary(load_tokenizer(path))
