"""The error that skips one document, and reports of skipped documents; imports no other module of the pipeline."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from baichuan_omni_jax.errors import ConfigError


class SampleError(Exception):
    """Tells why one document cannot be used. `cause` is the word it is counted under, the message what was wrong.

    Causes: `bad_json` (no JSON), `bad_form` (JSON of another form), `bad_prompt`, `missing_file`, `outside_root`,
    `unreadable_media`, `too_big_media` (beyond `limits`), `silent_audio`, `too_long`, `no_loss`, `unmarked` (where
    data.unmarked refuses it), `changed` (media or codes are not what the index measured), `no_codes`, `damaged_codes`
    (of the store), `bad_record` (of a shard), `other_tokenizer` (of token ids), `differs` (hosts that share its row do
    not decode it alike).
    """

    def __init__(self, cause: str, message: str):
        super().__init__(message)
        self.cause = cause

    def __reduce__(self):
        # Workers send it to the main process: pickle would call it with the message alone.
        return SampleError, (self.cause, str(self))


@contextmanager
def file_errors(path: Path) -> Iterator[None]:
    """Turns OSError into a ConfigError that names the file, or `path` where the error names none."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{error.filename or path}: {error.strerror or error}") from error


def first_of_causes(skipped: Iterable[tuple[str, str, str]], causes: Iterable[str]) -> dict[str, str]:
    """Returns one sentence for each of the causes: of the first document that was skipped for it.

    `skipped` has (where, cause, message) of each document; it is read until every cause was met.
    """
    # The file of skipped documents may have millions of lines: it is read as far as needed.
    missing, found = set(causes), {}
    for where, cause, message in skipped:
        if not missing:
            break
        if cause in missing:
            missing.remove(cause)
            found[cause] = message if message.startswith(where) else f"{where}: {message}"
    return found


def describe_causes(causes: Mapping[str, int], examples: Mapping[str, str]) -> list[str]:
    """Writes a line for each cause, the most frequent first, with how often it was met and one of the documents.

    >>> describe_causes({"bad_form": 2}, {"bad_form": 'm.jsonl:1 has no "text"'})
    ['2 bad_form, the first: m.jsonl:1 has no "text"']
    """
    lines = []
    # By count, then by name: the same data print the same lines.
    for cause, count in sorted(causes.items(), key=lambda item: (-item[1], item[0])):
        example = " ".join(examples.get(cause, "").split())
        example = example if len(example) <= 400 else f"{example[:397]}..."
        lines.append(f"{count} {cause}" + (f", the first: {example}" if example else ""))
    return lines
