"""A run's numbers on Weights & Biases, for those who ask for it."""

import hashlib
import logging
from pathlib import Path
from types import ModuleType

from baichuan_omni_jax.config import RunConfig, to_dict
from baichuan_omni_jax.errors import ConfigError

log = logging.getLogger(__name__)


def load_wandb() -> ModuleType:
    """The package: an extra, so imported only where it is asked for. Raises ConfigError when it is not installed."""
    try:
        import wandb
    except ImportError as error:
        message = "--wandb needs the package wandb: python -m pip install 'baichuan_omni_jax[wandb]'"
        raise ConfigError(message) from error
    return wandb


class WandbWriter:
    """One W&B run a workdir: a run that is resumed goes on there.

    Without a network or an account the numbers are kept under `workdir/wandb` for `wandb sync`. Raises ConfigError
    when the package is not installed.
    """

    def __init__(self, project: str, run: RunConfig, workdir: Path) -> None:
        wandb = load_wandb()
        settings = {
            "project": project,
            "name": f"{run.name} {workdir.name}",
            "id": hashlib.sha256(str(workdir).encode()).hexdigest()[:16],
            "resume": "allow",
            "dir": str(workdir),
            "config": to_dict(run),
        }
        try:
            self._run = wandb.init(**settings)
        except Exception as error:  # whatever keeps W&B away must not keep the run from training
            log.warning("W&B cannot be reached (%s); numbers are kept in %s/wandb for `wandb sync`", error, workdir)
            self._run = wandb.init(**settings | {"mode": "offline"})
        # Steps that a killed run repeats come twice: W&B's own counter would refuse the second time.
        self._run.define_metric("*", step_metric="step")

    def write(self, numbers: dict[str, float | int]) -> None:
        self._run.log(numbers)

    def close(self) -> None:
        self._run.finish()
