"""Finding the bytes of a media item: in the folder that its paths are relative to, and where links in it may lead."""

import base64
import binascii
import hashlib
import io
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from urllib.parse import unquote, unquote_to_bytes

from baichuan_omni_jax.errors import ConfigError, StorageError
from baichuan_omni_jax.storage import PATIENCE, may_pass, open_patiently, patiently
from baichuan_omni_jax.storage.cache import FileCache
from data_pipelines.errors import SampleError
from data_pipelines.media.file_kinds import HEAD, FileKind, kind_of, plain_reason

_MOST_BYTES = 1 << 33  # of a file in a bucket, which is held in memory; readers of each kind take less


@dataclass(frozen=True)
class MediaReference:
    """Where the bytes of a media item are: a path, or the bytes themselves as `base64` text (the other one is "")."""

    path: str = ""
    base64: str = ""


@dataclass(frozen=True)
class Media:
    """The bytes of one media item: the file at `path`, or `data` when `path` is None. `name` is for messages.

    `digest` is the SHA-256 of the bytes in hex where it is known already. A file that storage refuses to read is tried
    again for `patience` seconds; `faults` has the errors of reads that were given up.
    """

    name: str
    path: Path | None
    data: bytes = b""
    digest: str = ""
    patience: float = field(default=PATIENCE, compare=False)
    faults: list[StorageError] = field(default_factory=list, compare=False, repr=False)

    def open(self) -> io.BufferedIOBase:
        """Returns a new binary stream at its start. Raises OSError when the file is gone, StorageError."""
        return io.BytesIO(self.data) if self.path is None else open_patiently(self.path, self.patience, self.faults)

    @property
    def size(self) -> int:
        """In bytes. Raises OSError when the file is gone, StorageError."""
        return len(self.data) if self.path is None else self._status(self.path).st_size

    def _status(self, path: Path) -> os.stat_result:
        return patiently(path.stat, f"looking at {path}", self.patience)

    def content_hash(self) -> str:
        """Hashes the bytes by SHA-256, in hex. Files are remembered by path, size and time of change."""
        if self.digest:
            return self.digest
        if self.path is None:
            return hashlib.sha256(self.data).hexdigest()
        with reading(self, "file"):
            # A file that changes in place gets another digest, without being read each time.
            status = self._status(self.path)
            return _hash_file(self, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=65536)
def _hash_file(media: Media, size: int, changed: int) -> str:
    with media.open() as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class MediaRoot:
    """The folder that media paths are relative to, and the folders that links inside it may lead to.

    What a document writes must lie inside `folder`; `..` and absolute paths do not leave it. A link inside it may lead
    anywhere in `folder` itself and in the folders of `trusted`. `beside` is a second folder, with the same rules, for
    what the first one lacks: a manifest that is a link has media beside the link or beside the file it leads to. What
    storage refuses is tried again for `patience` seconds.
    """

    folder: Path
    trusted: tuple[Path, ...] = ()
    beside: Path | None = None
    patience: float = PATIENCE

    def find(self, written: str, name: str, absolute: bool) -> Media:
        """Finds the file that the path `written` means, links followed.

        Args:
            written: a path from the folder, or an absolute one.
            name: what messages call it.
            absolute: whether the medium is to be called by its path from the folder.

        Returns:
            The file.

        Raises:
            SampleError: "outside_root" and "missing_file" as `find_media`.
            StorageError: storage would not tell.
        """
        folders = [self.folder] if self.beside is None else [self.folder, self.beside]
        find = lambda: self._find_in(folders, written, name)  # noqa: E731
        path, inside = patiently(find, f"looking for {name}", self.patience)
        return Media(inside if absolute else written, path, patience=self.patience)

    def _find_in(self, folders: Sequence[Path], written: str, name: str) -> tuple[Path, str]:
        try:
            return self._find_below(folders[0], written, name)
        except SampleError as first:
            # The first folder's reason is told, whatever the second one says.
            try:
                if len(folders) > 1:
                    return self._find_in(folders[1:], written, name)
            except SampleError:
                pass
            raise first

    def _find_below(self, folder: Path, written: str, name: str) -> tuple[Path, str]:
        try:
            # What is written must lie inside; links are followed only afterwards.
            top = folder.resolve()
            # `..` behind a link goes back in what is written, not in the link's target, which it would leave as well.
            path = Path(os.path.normpath(top / written))
            tops = (top, Path(os.path.abspath(folder)))
            inside = next((path.relative_to(each).as_posix() for each in tops if path.is_relative_to(each)), "")
            real = (top / written).resolve()
            if not real.is_relative_to(top):
                if not inside:
                    raise SampleError("outside_root", f"{name} lies outside the folder that media are taken from")
                real = path.resolve()
                if not any(real.is_relative_to(each.resolve()) for each in (top, *self.trusted)):
                    message = f"{name} lies outside the trusted folders: a link leads there"
                    raise SampleError("outside_root", message)
            if not real.is_file():
                raise SampleError("missing_file", f"{name} {_why_missing(top / written, real)}")
        except RuntimeError as error:  # of a loop, before Python 3.13
            raise SampleError("missing_file", f"{name!r} is no usable path: its links lead in a circle") from error
        except (OSError, ValueError) as error:  # name too long, null byte, no permission
            if may_pass(error):
                raise
            raise SampleError("missing_file", f"{name!r} is no usable path: {plain_reason(error)}") from error
        return real, inside or real.relative_to(top).as_posix()


def _why_missing(path: Path, real: Path) -> str:
    if real.is_dir():
        return "is a folder"
    if real.exists():
        return "is no regular file"
    return "is a link to a file that does not exist" if path.is_symlink() else "does not exist"


@dataclass(frozen=True)
class MediaBucket:
    """The folder of a bucket that media paths are relative to; files are read through a cache of this machine.

    What a document writes must lie inside, as in a `MediaRoot`; the URL of a file inside is taken, too. There are no
    links.
    """

    url: str
    cache: FileCache

    @property
    def patience(self) -> float:
        return self.cache.patience

    def fetch(self, written: str) -> None:
        """Brings the file that `written` means to this machine; raises as the cache does."""
        with self.cache.hold(self.cache.describe(f"{self.url}/{self._inside(written, written)}")):
            pass

    def _inside(self, written: str, name: str) -> str:
        inside = os.path.normpath(written.removeprefix(f"{self.url}/"))
        if os.path.isabs(inside) or inside.split("/")[0] == "..":
            raise SampleError("outside_root", f"{name} lies outside the folder that media are taken from")
        return inside

    def find(self, written: str, name: str, absolute: bool) -> Media:
        """Reads the file that `written` means, as `MediaRoot.find` finds it."""
        inside = self._inside(written, name)
        try:
            file = self.cache.describe(f"{self.url}/{inside}")
            if file.size > _MOST_BYTES:
                raise SampleError("too_big_media", f"{name} has {file.size} bytes, more than {_MOST_BYTES}")
            return Media(inside if absolute else written, None, self.cache.read(file))
        except FileNotFoundError as error:
            raise SampleError("missing_file", f"{name} does not exist") from error
        except (OSError, ValueError) as error:  # a name that no object can have, no permission
            if isinstance(error, ConfigError):
                raise
            raise SampleError("missing_file", f"{name!r} is no usable path: {plain_reason(error)}") from error


MediaFolder = MediaRoot | MediaBucket


def find_media(reference: MediaReference, root: Path | MediaFolder | Mapping[str, Media]) -> Media:
    """Finds the media item that `reference` means: a path or `file://` URL, or a name among the media themselves.

    Paths are taken from `root`, which as a plain folder trusts no link that leaves it. Raises SampleError:
    "outside_root" when the path leaves it, or a link leads out of it and out of what it trusts; "missing_file" when no
    regular file is there, or it is an address on the network; "unreadable_media" for text that is not base64.
    """
    # Stage 1: bytes in the text itself. Stage 2: media of a shard, by name. Stage 3: files below the root.
    if reference.base64:
        return Media(name="base64 media", path=None, data=decode_base64(reference.base64))
    if isinstance(root, Mapping):
        if reference.path not in root:
            raise SampleError("missing_file", f"{reference.path!r} is not among the document's media")
        return root[reference.path]
    in_bucket = isinstance(root, MediaBucket) and reference.path.startswith(f"{root.url}/")
    written = reference.path if in_bucket else local_path(reference.path)
    absolute = written != reference.path or os.path.isabs(written)
    # An absolute path is called by its last part, or by where it lies in the root: it tells about the machine.
    name = (os.path.basename(written.rstrip("/")) or "/") if absolute else written
    name = name if len(name) <= 200 else f"{name[:100]}...{name[-97:]}"
    media_root = root if isinstance(root, MediaFolder) else MediaRoot(Path(root))
    return media_root.find(written, name, absolute)


_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/")
_DATA_URL = re.compile(r"data:[^,]*,", re.IGNORECASE)


def local_path(written: str) -> str:
    """Returns the path that is written, or that a `file://` URL means.

    Raises SampleError "missing_file" for the URL of another machine, of another scheme, or with bytes that are no text.
    """
    if not (found := _SCHEME.match(written)):
        return written
    if (scheme := found[1].lower()) != "file":
        raise SampleError("missing_file", f"{scheme}:// is an address on the network: nothing is downloaded")
    # file:/path, file:///path and file://localhost/path are one.
    rest = written[len("file:") :]
    if rest.startswith("//"):
        host, slash, path = rest[2:].partition("/")
        if host.lower() not in ("", "localhost"):
            raise SampleError("missing_file", f"file://{host} names another machine: write file:/// and the path")
        rest = slash + path
    try:
        return unquote(rest, errors="strict")
    except UnicodeDecodeError as error:
        raise SampleError("missing_file", f"{os.path.basename(rest)!r} is not a name in UTF-8") from error


_SPACE = re.compile(r"[\t\n\r\f\v ]+")


def decode_base64(text: str) -> bytes:
    """Decodes base64 or of a `data:` URL.

    White space, which mail and `base64` put after every 76 characters, is passed over; padding may be missing; both
    alphabets are read, not mixed. Raises SampleError "unreadable_media" for everything else.
    """
    if found := _DATA_URL.match(text):
        head, text = found[0], text[found.end() :]
        if ";base64" not in head.lower():
            return unquote_to_bytes(text)
        text = unquote(text)
    elif text[:5].lower() == "data:":
        raise SampleError("unreadable_media", "base64 media cannot be decoded: a data: URL without a comma")
    # Both alphabets, without padding or with it; mixed ones and anything else are refused.
    text = _SPACE.sub("", text)
    try:
        letters = text.rstrip("=").encode("ascii")
        if len(text) - len(letters) > 2 or (text.endswith("=") and len(text) % 4):
            raise ValueError("the padding is wrong")
        if len(letters) % 4 == 1:
            raise ValueError("it is cut")
        if not letters:
            raise ValueError("it is empty")
        padded = letters + b"=" * (-len(letters) % 4)
        # Validation below refuses an alphabet that mixes both.
        url_safe = (b"-" in letters or b"_" in letters) and not (b"+" in letters or b"/" in letters)
        return base64.b64decode(padded, altchars=b"-_" if url_safe else None, validate=True)
    except (binascii.Error, ValueError) as error:
        what = "it holds a character that base64 has not" if isinstance(error, binascii.Error | UnicodeError) else error
        raise SampleError("unreadable_media", f"base64 media cannot be decoded: {what}") from error


class UnknownFormatError(ValueError):
    """A file is of no format that a reader knows; where its first bytes tell which it is, that says more."""


def kind_name(kind: str) -> str:
    """Names a kind of media in a message: "audio" alone is no thing that can be read."""
    return "audio file" if kind == "audio" else kind


@contextmanager
def reading(media: Media, kind: str) -> Iterator[None]:
    """Turns whatever a decoder raises inside the block into SampleError("unreadable_media").

    The message names the file's format where its first bytes tell it: alone when such files are never read as `kind`
    (a zip archive), else beside the reason. A ValueError itself is a reader's own sentence, and always told.

    Raises StorageError where storage refused a read inside the block, whatever the decoder made of it.
    """
    try:
        yield
        _raise_fault(media)
    except (SampleError, StorageError):
        _raise_fault(media)
        raise
    except Exception as error:  # on malformed files the decoders raise nearly anything
        _raise_fault(media)
        name = kind_name(kind)
        found = _kind_of(media) if kind in ("image", "audio", "video") else None
        # Three sentences, by what the first bytes say: nothing, the kind that was expected, or another one.
        if found is None:
            message = f"{media.name} is not a readable {name}: {plain_reason(error)}"
        elif kind in found.read_as or (found.read_as and type(error) is ValueError):
            message = f"{media.name} is not a readable {name} ({found.name}): {plain_reason(error)}"
        else:
            message = f"{media.name} is not a readable {name}: it is {found.name}"
        raise SampleError("unreadable_media", message) from error


def _raise_fault(media: Media) -> None:
    """Raises what storage refused, once: decoders take it for the end of the file, or for damage."""
    if media.faults:
        fault = media.faults[0]
        media.faults.clear()
        raise fault


def _kind_of(media: Media) -> FileKind | None:
    try:
        with media.open() as file:
            head = file.read(HEAD)
    except OSError:
        return None
    return kind_of(head)
