"""Storage: paths that may be URLs, files that are whole or not there, locks, and a folder that mirrors itself.

paths     `parse_path`: what a user gives; trying again; what a file system can do
reads     reading that outlasts storage which fails for a while
files     stand-ins, JSON, atomic writes, folders that appear at once
locks     one program at a time
mirror    files that grow, for a workdir that is a URL
cache     a bucket's files on this machine, of bounded size
"""

from baichuan_omni_jax.storage.files import (
    atomic_write,
    check_target,
    describe_stand_in,
    read_json_object,
    refuse_stand_in,
    staged_folder,
    write_json,
)
from baichuan_omni_jax.storage.locks import FileLock, take_lock
from baichuan_omni_jax.storage.mirror import MirroredFolder, discard_scratch, scratch_folder
from baichuan_omni_jax.storage.paths import (
    cache_home,
    check_writable,
    is_url,
    local_path,
    may_pass,
    parse_path,
    remove,
    renames_folders,
    with_retries,
)
from baichuan_omni_jax.storage.reads import PATIENCE, open_patiently, patiently

__all__ = [
    "PATIENCE",
    "FileLock",
    "MirroredFolder",
    "atomic_write",
    "cache_home",
    "check_target",
    "check_writable",
    "describe_stand_in",
    "discard_scratch",
    "is_url",
    "local_path",
    "may_pass",
    "open_patiently",
    "parse_path",
    "patiently",
    "read_json_object",
    "refuse_stand_in",
    "remove",
    "renames_folders",
    "scratch_folder",
    "staged_folder",
    "take_lock",
    "with_retries",
    "write_json",
]
