"""Fixtures that several test files share. The package is imported inside: the type checks' import hook comes later."""

import pytest
from hypothesis import settings

# How long an example takes says more of the machine than of the code.
settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")


@pytest.fixture(scope="session")
def sample_dir(tmp_path_factory):
    """The sample data set of seed 0, built once for all tests; tests must not write into it."""
    from data_pipelines.sample import build_sample

    return build_sample(tmp_path_factory.mktemp("sample") / "data", progress=False)


@pytest.fixture(scope="session")
def micro_root(sample_dir, tmp_path_factory):
    """The data root of `micro.Command`."""
    from micro import small_copy

    return small_copy(sample_dir, tmp_path_factory.mktemp("micro") / "data")


@pytest.fixture(scope="session")
def pretrain(micro_root, tmp_path_factory):
    """The training command; all its processes share their compiled programs."""
    from micro import Command

    return Command(micro_root, tmp_path_factory.mktemp("xla"))


@pytest.fixture(scope="session")
def quick_pretrain(micro_root, tmp_path_factory):
    """The training command compiled with few optimizations: for tests whose time would else be compilation."""
    from micro import Command

    return Command(micro_root, tmp_path_factory.mktemp("quick"), quick=True)
