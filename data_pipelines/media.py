"""Finding the bytes of a media item, inside the document's root only."""

import base64
import binascii
import hashlib
import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from data_pipelines.document import SampleError
from data_pipelines.prompts import Reference


@dataclass(frozen=True)
class Media:
    """The bytes of one media item: the file at `path`, or `data` when `path` is None. `name` is for messages.

    `digest` is the SHA-256 of the bytes in hex where it is known already.
    """

    name: str
    path: Path | None
    data: bytes = b""
    digest: str = ""

    def open(self) -> io.BufferedIOBase:
        """A new binary stream at its start. Raises OSError when the file cannot be opened."""
        return io.BytesIO(self.data) if self.path is None else self.path.open("rb")

    @property
    def size(self) -> int:
        """In bytes. Raises OSError when the file is gone."""
        return len(self.data) if self.path is None else self.path.stat().st_size

    def content_hash(self) -> str:
        """SHA-256 of the bytes, in hex. Files are remembered by path, size and time of change."""
        if self.digest:
            return self.digest
        if self.path is None:
            return hashlib.sha256(self.data).hexdigest()
        with reading(self, "file"):
            status = self.path.stat()
            return _hash_file(self.path, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=65536)
def _hash_file(path: Path, size: int, changed: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def find_media(reference: Reference, root: Path | Mapping[str, Media]) -> Media:
    """The media item that `reference` means: a path taken from `root`, or a name among the media themselves.

    Raises SampleError: "outside_root" when the path, with `..` and symbolic links followed, leaves `root`;
    "missing_file" when no regular file is there; "unreadable_media" for text that is not base64.
    """
    if reference.base64:
        return Media(name="base64 media", path=None, data=_decode_base64(reference.base64))
    if isinstance(root, Mapping):
        if reference.path not in root:
            raise SampleError("missing_file", f"{reference.path!r} is not among the document's media")
        return root[reference.path]
    try:
        top = Path(root).resolve()
        path = (top / reference.path).resolve()
        inside, found = path.is_relative_to(top), path.is_file()
    except (OSError, ValueError, RuntimeError) as error:  # name too long, null byte, loop of links
        raise SampleError("missing_file", f"{reference.path!r} is no usable path: {error}") from error
    if not inside:
        raise SampleError("outside_root", f"{reference.path} lies outside {root}")
    if not found:
        raise SampleError("missing_file", f"{reference.path} does not exist in {root}")
    return Media(name=reference.path, path=path)


def _decode_base64(text: str) -> bytes:
    if text.startswith("data:"):
        text = text.partition(",")[2]
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise SampleError("unreadable_media", f"base64 media cannot be decoded: {error}") from error


# First bytes of files that hold no media, by what to call them.
_OTHER_FILES = {
    b"PK\x03\x04": "a zip archive",
    b"Rar!": "a RAR archive",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    b"\x1f\x8b": "a gzip file",
    b"%PDF": "a PDF file",
    b"Salted__": "an encrypted file",
    b"-----BEGIN PGP": "an encrypted file",
    b"<!": "a text of HTML",
    b"<?xml": "a text of XML",
    b"version https://git-lfs": "a pointer to a file in Git LFS",
}


@contextmanager
def reading(media: Media, kind: str) -> Iterator[None]:
    """Turns whatever a decoder raises inside the block into SampleError("unreadable_media")."""
    try:
        yield
    except SampleError:
        raise
    except Exception as error:  # on malformed files the decoders raise nearly anything
        reason = _other_file(media) or str(error) or type(error).__name__
        raise SampleError("unreadable_media", f"{media.name} is not a readable {kind}: {reason}") from error


def _other_file(media: Media) -> str:
    """What the file is when its first bytes are not those of any media: "it is a zip archive"; else nothing."""
    try:
        with media.open() as file:
            head = file.read(64).lstrip()
    except OSError:
        return ""
    if not head:
        return "the file is empty"
    return next((f"it is {name}" for start, name in _OTHER_FILES.items() if head.startswith(start)), "")
