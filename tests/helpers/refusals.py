"""Why a file is refused."""

import pytest

from data_pipelines.errors import SampleError

RATE = 16000


def refused(call, cause, message):
    with pytest.raises(SampleError, match=message) as caught:
        call()
    assert caught.value.cause == cause
