"""Files that a user gives: JSON read with one sentence for whatever is wrong, and stand-ins for files never fetched.

A clone without Git LFS, a download that ended at a login page or an interrupted copy leave files of the right name that
hold something else. Decoders would call each of them corrupt; here they are called what they are.
"""

import json
from pathlib import Path
from typing import Any

from baichuan_omni_jax.errors import ConfigError

_LFS = b"version https://git-lfs.github.com/spec/"
# First bytes, after white space and in lower case, of what servers send instead of a file.
_PAGES = {b"<!doctype": "a web page", b"<html": "a web page", b"<?xml": "a message in XML"}
_HEAD = 512  # bytes: a pointer is shorter


def describe_stand_in(path: Path) -> str:
    """What stands in the place of the file `path`, as the end of "PATH is ..."; nothing when it may be the file itself.

    Raises OSError when it cannot be opened.
    """
    with open(path, "rb") as file:
        head = file.read(_HEAD)
    if not head:
        return "empty: it was never written, or never fetched"
    if head.startswith(_LFS):
        return f"a pointer of Git LFS{_pointed_size(head)}, not the file itself: fetch it with `git lfs pull`"
    if head.startswith(b"/annex/objects/") or b".git/annex/objects/" in head:
        return "a pointer of git-annex, not the file itself: fetch it with `git annex get`"
    start = head.lstrip().lower()
    page = next((name for first, name in _PAGES.items() if start.startswith(first)), "")
    return f"{page}, not the file itself: the download of it failed" if page else ""


def refuse_stand_in(path: Path) -> None:
    """Raises ConfigError when something else stands in the place of the file `path`, or it cannot be opened."""
    try:
        found = describe_stand_in(path)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from error
    if found:
        raise ConfigError(f"{path} is {found}")


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in the file `path`, UTF-8 with or without a mark of byte order.

    Raises ConfigError naming the file: it cannot be read, is a stand-in, no UTF-8, no JSON, or no object.
    """
    try:
        text = Path(path).read_bytes()
        if found := describe_stand_in(path):
            raise ConfigError(f"{path} is {found}")
        values = json.loads(text.decode("utf-8-sig"))
    except ConfigError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} is no JSON object but {type(values).__name__}")
    return values


def _pointed_size(head: bytes) -> str:
    """The size that a pointer gives for its file, as it is said in a sentence."""
    sizes = [line[5:] for line in head.decode("utf-8", "replace").splitlines() if line.startswith("size ")]
    return f" (to {int(sizes[0]):,} bytes)" if sizes and sizes[0].isdigit() else ""
