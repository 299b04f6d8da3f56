"""A disk that refuses reads: a library that is loaded into a process first and stands between it and the system."""

import shutil
import subprocess
from pathlib import Path

import pytest

# Reads of files whose path holds $FAILING_PATH end with EIO for as long as the file $FAILING_SWITCH is there.
_SOURCE = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

static int refused(int fd) {
  const char *path = getenv("FAILING_PATH"), *on = getenv("FAILING_SWITCH");
  char link[64], name[4096];
  if (!path || !on || access(on, F_OK)) return 0;
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t size = readlink(link, name, sizeof name - 1);
  if (size < 0) return 0;
  name[size] = 0;
  return strstr(name, path) != NULL;
}
#define WRAP(result, name, types, names)                                   \
  result name types {                                                      \
    static result (*own) types;                                            \
    if (!own) own = (result(*) types)dlsym(RTLD_NEXT, #name);              \
    if (refused(fd)) { errno = EIO; return -1; }                           \
    return own names;                                                      \
  }
WRAP(ssize_t, read, (int fd, void *to, size_t n), (fd, to, n))
WRAP(ssize_t, pread, (int fd, void *to, size_t n, off_t at), (fd, to, n, at))
WRAP(ssize_t, pread64, (int fd, void *to, size_t n, off64_t at), (fd, to, n, at))
WRAP(ssize_t, readv, (int fd, const struct iovec *to, int n), (fd, to, n))
"""


class FailingDisk:
    """Refuses reads of files whose path holds `part` while `switch` exists; `variables` are for the process."""

    def __init__(self, folder: Path, part: str) -> None:
        self.switch = folder / "disk-fails"
        library = folder / "failing_disk.so"
        source = folder / "failing_disk.c"
        source.write_text(_SOURCE)
        subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
        self.variables = {"LD_PRELOAD": str(library), "FAILING_PATH": part, "FAILING_SWITCH": str(self.switch)}

    def fail(self) -> None:
        """Every read fails from now on."""
        self.switch.touch()

    def mend(self) -> None:
        """Reads work again."""
        self.switch.unlink(missing_ok=True)


def failing_disk(folder: Path, part: str) -> FailingDisk:
    """Makes one; skips the test where there is no C compiler."""
    if shutil.which("cc") is None:
        pytest.skip("a failing disk needs a C compiler")
    return FailingDisk(folder, part)
