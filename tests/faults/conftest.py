"""What the tests of faults share: a run that nothing happened to."""

from pathlib import Path

import pytest

pytest.register_assert_rewrite("uninterrupted")

from uninterrupted import STEPS  # noqa: E402 its assertions are to be explained too


@pytest.fixture(scope="session")
def finished(pretrain, tmp_path_factory) -> Path:
    """The workdir of an uninterrupted run of `STEPS` steps. Tests copy it before they change anything."""
    workdir = tmp_path_factory.mktemp("uninterrupted") / "run"
    done = pretrain(workdir, f"train.steps={STEPS}")
    assert done.returncode == 0, done.stderr
    return workdir
