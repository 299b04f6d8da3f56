"""Two seqio tasks and a mixture of them, as an example of one's own. Needs the extra `seqio`.

    omni_text        lines of `text.jsonl` of the sample data set, through a FunctionDataSource: loss on all of it
    omni_questions   TFRecords of `question` and `answer` (`write_questions` makes some): loss on the answer
    omni_mixture     three documents of the first for one of the second

The data are read from the folder that OMNI_SEQIO_DATA names (default `data/sample`); the tokenizer is that of
OMNI_TOKENIZER, which the caching command sets.

    python -m data_pipelines.datasets.importers.seqio_tasks data/sample       # writes questions-*.tfrecord there
"""

import functools
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import seqio
import tensorflow as tf

from data_pipelines.datasets.importers.seqio_vocabulary import default_vocabulary, plain
from data_pipelines.documents.prompt_writing import plain_text
from data_pipelines.tokenizers.tokenizer import ASSISTANT, USER

FOLDER = Path(os.environ.get("OMNI_SEQIO_DATA", "data/sample"))
RATES = {"omni_text": 3.0, "omni_questions": 1.0}
_PAIR = re.compile(r"Question: (.+)\nAnswer: (.+)")


def read_texts(folder: Path) -> Iterator[str]:
    """Yields the text of each line of the manifest, without marks."""
    with (folder / "text.jsonl").open(encoding="utf-8") as lines:
        for line in lines:
            yield plain_text(json.loads(line)["text"])


def text_lines(split: str, shuffle_files: bool) -> tf.data.Dataset:
    """`FunctionDataSource`: one example a line."""
    del split, shuffle_files
    signature = {"text": tf.TensorSpec((), tf.string)}
    return tf.data.Dataset.from_generator(
        lambda: ({"text": text} for text in read_texts(FOLDER)), output_signature=signature
    )


def as_targets(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """Maps text to targets: all of it is learned."""
    return dataset.map(lambda example: {"targets": plain(example["text"])}, num_parallel_calls=tf.data.AUTOTUNE)


def as_turn(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """Maps a pair to inputs, the question of the user, and targets, the answer that is learned."""

    def turn(example: dict) -> dict:
        question, answer = plain(example["question"]), plain(example["answer"])
        return {"inputs": tf.strings.join([USER, question, ASSISTANT]), "targets": answer}

    return dataset.map(turn, num_parallel_calls=tf.data.AUTOTUNE)


def write_questions(folder: Path, files: int = 2) -> list[Path]:
    """TFRecords with the questions and answers in the sample's text; returns them."""
    # Dealt out in turns, so that files are of about one size.
    pairs = [pair for text in read_texts(folder) for pair in _PAIR.findall(text)]
    paths = [folder / f"questions-{number:05d}-of-{files:05d}.tfrecord" for number in range(files)]
    for number, path in enumerate(paths):
        with tf.io.TFRecordWriter(str(path)) as writer:
            for pair in pairs[number::files]:
                values = {
                    name: tf.train.Feature(bytes_list=tf.train.BytesList(value=[text.encode()]))
                    for name, text in zip(("question", "answer"), pair, strict=True)
                }
                writer.write(tf.train.Example(features=tf.train.Features(feature=values)).SerializeToString())
    return paths


def register() -> None:
    """Adds tasks and mixture to seqio's registries."""
    vocabulary = default_vocabulary()
    # The end of a document is the pipeline's to add (`data.end_of_text`).
    features = {
        "inputs": seqio.Feature(vocabulary, add_eos=False, required=False),
        "targets": seqio.Feature(vocabulary, add_eos=False),
    }
    tokenize = functools.partial(seqio.preprocessors.tokenize, copy_pretokenized=False)
    seqio.TaskRegistry.add(
        "omni_text",
        source=seqio.FunctionDataSource(text_lines, splits=["train"]),
        preprocessors=[as_targets, tokenize],
        output_features=features,
    )
    string = tf.io.FixedLenFeature((), tf.string)
    seqio.TaskRegistry.add(
        "omni_questions",
        source=seqio.TFExampleDataSource(
            {"train": str(FOLDER / "questions-*.tfrecord")}, {"question": string, "answer": string}
        ),
        preprocessors=[as_turn, tokenize],
        output_features=features,
    )
    seqio.MixtureRegistry.add("omni_mixture", list(RATES.items()))


if __name__ == "__main__":
    print(*write_questions(Path(sys.argv[1])), sep="\n")
else:
    register()
