"""What the tests of training share: few documents, and one finished run of the micro configuration."""

from pathlib import Path

import jax
import pytest
from micro import STEPS, Command, small_copy


@pytest.fixture(scope="session")
def micro_root(sample_dir, tmp_path_factory) -> Path:
    return small_copy(sample_dir, tmp_path_factory.mktemp("micro") / "data")


@pytest.fixture(scope="session")
def pretrain(micro_root, tmp_path_factory) -> Command:
    """The training command; all its processes share their compiled programs."""
    return Command(micro_root, tmp_path_factory.mktemp("xla"))


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
