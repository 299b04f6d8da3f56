"""Fixtures that several test files share."""

import pytest


@pytest.fixture(scope="session")
def sample_dir(tmp_path_factory):
    """The sample data set of seed 0, built once for all tests; tests must not write into it."""
    from data_pipelines.sample import build_sample

    return build_sample(tmp_path_factory.mktemp("sample") / "data", progress=False)
