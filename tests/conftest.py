"""Fixtures that several test files share. The package is imported inside: the type checks' import hook comes later."""

import signal

import numpy as np
import pytest
from hypothesis import settings

from tests.helpers.proofs import built_once

# How long an example takes says more of the machine than of the code.
settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")
# A shell that starts tests in the background ignores SIGINT, and the programs that they start and interrupt would too.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def sample_dir(tmp_path_factory):
    """The sample data set of seed 0, built once for all tests; tests must not write into it."""
    from data_pipelines.sample.__main__ import build_sample

    return built_once(tmp_path_factory, "sample", lambda path: build_sample(path, progress=False))


@pytest.fixture(scope="session")
def micro_root(sample_dir, tmp_path_factory):
    """The data root of `micro.Command`."""
    from tests.helpers.micro import small_copy

    return built_once(tmp_path_factory, "micro", lambda path: small_copy(sample_dir, path))


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """Where the commands that tests start keep their compiled programs."""
    return built_once(tmp_path_factory, "xla", lambda path: path.mkdir())


@pytest.fixture(scope="session")
def pretrain(micro_root, compiled):
    """The training command; all its processes share their compiled programs."""
    from tests.helpers.micro import Command

    return Command(micro_root, compiled)


@pytest.fixture(scope="session")
def quick_pretrain(micro_root, compiled):
    """The training command compiled with few optimizations: for tests whose time would else be compilation."""
    from tests.helpers.micro import Command

    return Command(micro_root, compiled, quick=True)


@pytest.fixture(scope="session")
def finished(pretrain, tmp_path_factory):
    """The workdir of an uninterrupted run of the micro configuration, `micro.STEPS` steps.

    Tests copy it before they change anything.
    """
    from tests.helpers.micro import STEPS

    def run(workdir):
        done = pretrain(workdir, f"train.steps={STEPS}")
        assert done.returncode == 0, done.stderr

    return built_once(tmp_path_factory, "finished", run)


@pytest.fixture
def exact():
    """Products in fp32, so that two programs differ by the order of sums alone."""
    import jax

    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture
def rng():
    """The same numbers for each test, whichever ran before it."""
    return np.random.default_rng(0)
