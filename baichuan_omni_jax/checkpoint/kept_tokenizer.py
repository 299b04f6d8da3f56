"""The audio tokenizer that made a run's code frames, kept in the run's workdir: what the model hears and says means
nothing without it. It is written once, when the run begins, whichever tokenizer it is: a seeded random one too.

    DIR/audio_tokenizer/          a checkpoint with the branch audio_encoder, and origin.json: where it came from
    DIR/checkpoints/STEP/         finds it there as if it were one of its own branches
"""

import json
from dataclasses import asdict, dataclass
from typing import Any

from etils import epath

from baichuan_omni_jax.checkpoint.branches import (
    KEPT,
    RANDOM,
    branch_home,
    find_checkpoint,
    parse_spec,
    read_branch_info,
    save_branches,
)
from baichuan_omni_jax.checkpoint.parent import newest_checkpoint
from baichuan_omni_jax.config import OmniConfig, RunConfig
from baichuan_omni_jax.errors import ConfigError, RunStoppedError

TOKENIZER_BRANCH = "audio_encoder"
_CODED = "audio_head"  # the branch whose tables and heads belong to the codes
_ORIGIN = "origin.json"


@dataclass(frozen=True)
class TokenizerOrigin:
    """`checkpoint` is where a tokenizer was read from; "": it was drawn from the run's seed. `untrained` says whether
    it holds its first random weights.
    """

    checkpoint: str
    untrained: bool


def find_tokenizer(run: RunConfig, workdir: epath.PathLike | None = None) -> epath.Path | None:
    """Returns the checkpoint with the audio tokenizer that a run's code frames are made by; None: the seeded one.

    That is what the run's workdir keeps, else `data.audio_tokenizer`, else the one that the codes of
    `checkpoint.init_from` were made by. Every host must call it. Raises ConfigError where there is none in
    `data.audio_tokenizer`, and for one that is damaged.
    """
    if workdir is not None and (epath.Path(workdir) / KEPT).exists():
        return find_checkpoint(epath.Path(workdir) / KEPT)
    if run.data.audio_tokenizer:
        given = parse_spec(run.data.audio_tokenizer, (TOKENIZER_BRANCH,))[TOKENIZER_BRANCH]
        home = branch_home(find_checkpoint(given), TOKENIZER_BRANCH)
        if home is None:
            raise ConfigError(f"data.audio_tokenizer {given} has no branch {TOKENIZER_BRANCH}")
        return home
    sources = parse_spec(run.checkpoint.init_from, run.branches) if run.checkpoint.init_from else {}
    given = sources.get(_CODED, RANDOM)
    folder = None if given == RANDOM else newest_checkpoint(given)
    home = None if folder is None else branch_home(folder, TOKENIZER_BRANCH)
    return None if home is None else find_checkpoint(home)


def keep_tokenizer(workdir: epath.PathLike, tokenizer: Any, config: OmniConfig, origin: TokenizerOrigin) -> None:
    """Writes `tokenizer` into the workdir, whole or not at all. Every host must call it, with the same values as numpy.

    Raises RunStoppedError when it cannot be written.
    """
    path, trained = epath.Path(workdir) / KEPT, 0
    if origin.checkpoint:
        info = read_branch_info(origin.checkpoint).get(TOKENIZER_BRANCH)
        trained = info.trained if info else 0
    texts = {_ORIGIN: json.dumps(asdict(origin), indent=1)}
    try:
        save_branches(path, {TOKENIZER_BRANCH: tokenizer}, config, trained={TOKENIZER_BRANCH: trained}, texts=texts)
    except OSError as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise RunStoppedError(f"saving the audio tokenizer in {path} failed: {reason}") from error


def read_origin(folder: epath.PathLike) -> TokenizerOrigin | None:
    """Returns where a kept tokenizer came from; None for any other checkpoint. Raises ConfigError."""
    path = epath.Path(folder) / _ORIGIN
    if not path.exists():
        return None
    try:
        return TokenizerOrigin(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
