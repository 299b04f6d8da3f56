"""What the tests of training share."""

import jax
import pytest


@pytest.fixture(scope="module")
def quick_compile():
    """Compiles with few optimizations: for tests whose time would else be compilation."""
    # Not readable as an attribute, and off by default.
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
