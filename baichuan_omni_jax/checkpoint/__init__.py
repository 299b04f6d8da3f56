"""Branch checkpoints and workdirs: what they hold, how they are written, and how they are read back.

    CKPT/config.json              the model's configuration, as Hugging Face writes it
    CKPT/branches.json            branch -> parameters, dtype, steps trained
    CKPT/processor/tokenizer.json
    CKPT/params/BRANCH/           the branch's arrays (`arrays`), to Orbax nested dicts: no classes
    CKPT/checksums.json           file -> crc32c; of arrays, which carry their own, size (`checksums`)

    DIR/.lock                     locked while a run works in this workdir
    DIR/run_config.json           the run that owns this workdir
    DIR/parent.json               the checkpoints it started from
    DIR/kept_steps.json           steps that stay whatever is saved later (`Workdir.keep_newest`)
    DIR/audio_tokenizer/          a CKPT: the audio tokenizer that made the run's code frames
    DIR/checkpoints/STEP/         a CKPT, opt_state/ (arrays) and data.json (the data plan's state)

A checkpoint appears by one rename after every file and its checksum is written, so there is a whole one or none. In a
bucket (DIR may be a URL), or where folders cannot be renamed, it counts once `checksums.json`, the last file, is there.
"""

from baichuan_omni_jax.checkpoint.branches import (
    BranchInfo,
    abstract_branches,
    branch_home,
    find_checkpoint,
    load_branches,
    parse_spec,
    read_branch_info,
    save_branches,
)
from baichuan_omni_jax.checkpoint.checksums import verify_checksums, write_checksums
from baichuan_omni_jax.checkpoint.provenance import (
    MAY_DIFFER,
    Parent,
    TokenizerOrigin,
    check_run_config,
    find_parent,
    find_tokenizer,
    initial_tokenizer,
    keep_tokenizer,
    parent_data_state,
    read_origin,
    record_parent,
    stored_tokenizer,
    with_text_tokenizer,
)
from baichuan_omni_jax.checkpoint.steps import kept_steps
from baichuan_omni_jax.checkpoint.trees import read_tree, with_shardings
from baichuan_omni_jax.checkpoint.workdir import Restored, Workdir

__all__ = [
    "MAY_DIFFER",
    "BranchInfo",
    "Parent",
    "Restored",
    "TokenizerOrigin",
    "Workdir",
    "abstract_branches",
    "branch_home",
    "check_run_config",
    "find_checkpoint",
    "find_parent",
    "find_tokenizer",
    "initial_tokenizer",
    "keep_tokenizer",
    "kept_steps",
    "load_branches",
    "parent_data_state",
    "parse_spec",
    "read_branch_info",
    "read_origin",
    "read_tree",
    "record_parent",
    "save_branches",
    "stored_tokenizer",
    "verify_checksums",
    "with_shardings",
    "with_text_tokenizer",
    "write_checksums",
]
