"""What the tests of training share: one finished run of the micro configuration."""

from pathlib import Path

import jax
import pytest
from micro import STEPS


@pytest.fixture(scope="session")
def finished(pretrain, tmp_path_factory) -> Path:
    """The workdir of an uninterrupted run of `STEPS` steps. Tests copy it before they change anything."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    done = pretrain(workdir, f"train.steps={STEPS}")
    assert done.returncode == 0, done.stderr
    return workdir


@pytest.fixture(scope="module")
def quick_compile():
    """Compiles with few optimizations: for tests whose time would else be compilation."""
    # Not readable as an attribute, and off by default.
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
