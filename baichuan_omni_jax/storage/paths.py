"""Paths that a user gives: of a file system, or the URL of a bucket. `parse_path` is the one door for both.

    parse_path("runs/tiny")           an absolute path, `~` and links resolved
    parse_path("gs://bucket/run")     Google Cloud Storage, by gcsfs (extra `gcs`); arrays by TensorStore
    parse_path("s3://bucket/run")     S3 and what speaks its language, by s3fs (extra `s3`)

pathlib takes a URL for a folder called `gs:`, and so would everything that is given one: what comes from a user becomes
a `Path` only after `parse_path`, or after `local_path`, which refuses URLs where none can be served.

Buckets have no folders, and neither renames nor appends: `mkdir` does nothing, an object appears as a whole, and
opening one to append would overwrite it. What needs more is in `mirror`.
"""

import errno
import logging
import os
import random
import re
import secrets
import shutil
import time
from collections.abc import Callable
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import TypeVar

import fsspec.config
from etils import epath

from baichuan_omni_jax.errors import ConfigError, storage_error

log = logging.getLogger(__name__)

T = TypeVar("T")
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)
# Scheme -> the package that serves it, and the extra that installs it.
_SERVED = {"gs": ("gcsfs", "gcs"), "s3": ("s3fs", "s3")}
# What pathlib makes of a URL.
_MANGLED = re.compile(rf"(?:.*/)?({'|'.join([*_SERVED, 'https?', 'file', 'hf', 'az'])}):/(?!/)(.*)", re.DOTALL)

# Roots of the packages that tell of network and server by exceptions of their own, which are no OSError.
_CLIENTS = {"gcsfs", "s3fs", "fsspec", "aiohttp", "requests", "urllib3", "google", "botocore", "aiobotocore"}
# Errors that may be gone a moment later: of the network (which have no number), or of a server behind a mounted folder.
_PASSING = {
    None,
    errno.EIO,
    errno.ESTALE,
    errno.ETIMEDOUT,
    errno.EAGAIN,
    errno.ECONNRESET,
    errno.ECONNREFUSED,
    errno.EPIPE,
    errno.ENOTCONN,
    errno.EREMOTEIO,
}
_LATER = (408, 429)  # answers of a server that ask for another try
_FINAL = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError)
# Seconds before the second try; each further pause is twice as long, up to the longest.
_TRIES, _PAUSE, _LONGEST = 4, 0.5, 20.0

_PROBE = ".storage-probe"
_ready: set[str] = set()


def parse_path(path: epath.PathLike) -> epath.Path:
    """Returns the path that a user means: absolute where it is of a file system, as it stands where it is a URL.

    >>> parse_path("gs://bucket/runs/tiny/").name
    'tiny'

    Raises ConfigError for no path at all (a variable of the shell that is not set), for a user's home that there is
    not, and for a URL that cannot be served: of another scheme, without a bucket, or where the package for it is not
    installed.
    """
    text = os.fspath(path)
    if not text.strip():
        raise ConfigError(f"{text!r} is no path and no URL: was a variable of the shell not set?")
    url = _URL.fullmatch(text)
    if url is None:
        refuse_mangled(text)
        return epath.Path(_expanded(text).resolve())
    scheme, rest = url[1].lower(), url[2]
    if scheme == "file" and rest.startswith("/"):
        return epath.Path(Path(rest).resolve())
    if scheme not in _SERVED:
        raise ConfigError(f"{text}: {scheme}:// cannot be read or written; a path, gs:// and s3:// can")
    parts = rest.rstrip("/").split("/")
    # An object may be called `..`, but nobody who writes it means that.
    if not all(parts) or {".", ".."} & {*parts}:
        raise ConfigError(f"{text} is not {scheme}://BUCKET/PATH")
    _serve(scheme, text)
    return epath.Path(f"{scheme}://{'/'.join(parts)}")


def local_path(path: epath.PathLike, what: str) -> Path:
    """Returns `path` as a pathlib Path, `~` expanded; raises ConfigError, which begins with `what`, for any URL."""
    text = os.fspath(path)
    if _URL.fullmatch(text) or _MANGLED.fullmatch(text):
        raise ConfigError(f"{what} {text} is a URL: this must be a folder or file of this machine, or mounted on it")
    return _expanded(text)


def _expanded(text: str) -> Path:
    """Expands `~`. Raises ConfigError for a user without a home, and for what no file can be called."""
    if "\0" in text:
        raise ConfigError(f"{text!r} cannot be a path: it has a zero byte")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"{text}: there is no user of the name {text.partition('/')[0]}") from error


def cache_home() -> Path:
    """Returns the folder of this user for what can be had again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "baichuan_omni_jax"


def is_url(path: epath.PathLike) -> bool:
    """Whether `path` is a URL and no path of a file system."""
    return "://" in os.fspath(path)


def refuse_mangled(text: str) -> None:
    """Raises ConfigError for a URL that went through pathlib, or lost a slash otherwise: `gs:/bucket` is no folder."""
    if found := _MANGLED.fullmatch(text):
        raise ConfigError(f"{text} looks like a URL that lost a slash: write {found[1]}://{found[2]}")


def _serve(scheme: str, url: str) -> None:
    """Makes a scheme ready to be used. Raises ConfigError where its package is missing."""
    if scheme in _ready:
        return
    package, extra = _SERVED[scheme]
    if find_spec(package) is None:
        raise ConfigError(f"{url} needs the package {package}: python -m pip install 'baichuan_omni_jax[{extra}]'")
    # Lists of objects would be kept for good, while TensorStore and other hosts write past them.
    for name in {"gs": ("gs", "gcs"), "s3": ("s3", "s3a")}[scheme]:
        fsspec.config.conf.setdefault(name, {}).update(use_listings_cache=False)
    _ready.add(scheme)


def is_final(error: BaseException) -> bool:
    """Whether storage answered: what was asked for is not there, of another kind, or not allowed."""
    return isinstance(error, _FINAL)


def may_pass(error: BaseException) -> bool:
    """Whether what storage raised may be gone a moment later; never for a file that is not there, or not allowed."""
    # gcsfs has no class of its own for what is not allowed.
    code = getattr(error, "code", None)
    if str(error).startswith("Forbidden") or (isinstance(code, int) and 400 <= code < 500 and code not in _LATER):
        return False
    if type(error).__module__.partition(".")[0] in _CLIENTS:
        return not isinstance(error, _FINAL)
    return isinstance(error, OSError) and not isinstance(error, _FINAL) and error.errno in _PASSING


def with_retries(work: Callable[[], T], doing: str, seconds: float = 0.0) -> T:
    """Returns `work()`, tried again with growing pauses while storage refuses it for what may pass.

    gcsfs and s3fs try again by themselves for half a minute; this is for what is longer, and for mounted folders.

    Args:
        work: may be called several times.
        doing: what it does, for the log: "writing gs://bucket/run/metrics.jsonl".
        seconds: for how long it is tried; 0: four times.

    Returns:
        What `work` returned.

    Raises:
        OSError: storage refused it for good, or every time. Other exceptions of `work` pass at once.
    """
    begun = time.monotonic()
    for tried in count(1):
        try:
            return work()
        except Exception as error:
            pause = min(_PAUSE * 2 ** (tried - 1), _LONGEST) * random.uniform(0.5, 1.0)
            last = time.monotonic() + pause > begun + seconds if seconds else tried == _TRIES
            if last or not may_pass(error):
                # One class for whatever a bucket's client raises, so that callers need not know it.
                if type(error).__module__.partition(".")[0] in _CLIENTS and not isinstance(error, OSError):
                    raise OSError(f"{type(error).__name__}: {str(error).partition(chr(10))[0]}") from error
                raise
            log.warning("%s failed (%s); trying again in %.1f s", doing, error, pause)
            time.sleep(pause)
    raise AssertionError("unreachable")


def remove(path: epath.Path) -> None:
    """Removes a file, or a folder with all that is in it; one that is not there is as good as removed.

    Raises OSError where storage refuses it.
    """

    def attempt() -> None:
        try:
            if path.is_dir():
                path.rmtree()
            else:
                path.unlink(missing_ok=True)
        except Exception:
            # Where a bucket's answer was lost, the client asks again and is told that there is nothing to remove.
            if path.exists():
                raise

    with_retries(attempt, f"removing {path}")


def check_writable(folder: epath.Path, what: str) -> None:
    """Writes an object into `folder`, reads and removes it: a missing bucket or permission is noticed at the start.

    Raises ConfigError, or StorageError where the bucket does not answer; both begin with `what` ("workdir").
    """
    probe = folder / f"{_PROBE}-{secrets.token_hex(8)}"
    try:
        with_retries(lambda: probe.write_text(_PROBE), f"writing {probe}")
        read = with_retries(probe.read_text, f"reading {probe}")
        remove(probe)
    except OSError as error:
        raise storage_error(error, f"{what} {folder} cannot be written") from error
    if read != _PROBE:
        raise ConfigError(f"{what} {folder} cannot be used: what is written there is not what is read")


def renames_folders(folder: epath.PathLike) -> bool:
    """Whether a folder that holds files can be renamed in `folder`, which is there. Found out by trying; never by URL.

    Cloud Storage FUSE refuses it in buckets without hierarchical namespace, or where a folder holds another.
    """
    if is_url(folder):
        return False
    probe = Path(folder) / f"{_PROBE}-{secrets.token_hex(8)}"
    renamed = probe.with_name(f"{probe.name}-renamed")
    try:
        (probe / "folder").mkdir(parents=True)
        (probe / "folder" / "file").write_text("")
        try:
            probe.rename(renamed)
        except OSError as error:
            log.info("%s: folders cannot be renamed there (%s)", folder, error.strerror or error)
            return False
        return (renamed / "folder" / "file").is_file() and not probe.exists()
    finally:
        for left in (probe, renamed):
            shutil.rmtree(left, ignore_errors=True)
