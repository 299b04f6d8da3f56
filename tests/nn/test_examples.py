"""The examples in the docstrings of branches and of what constructs them: on one device, without a mesh."""

import doctest

import pytest

from baichuan_omni_jax import sharding
from baichuan_omni_jax.audio import encoder
from baichuan_omni_jax.nn import param
from baichuan_omni_jax.vision import model


@pytest.mark.parametrize("module", [encoder, model, param, sharding])
def test_docstring_examples(module):
    done = doctest.testmod(module)
    assert done.attempted
    assert not done.failed
