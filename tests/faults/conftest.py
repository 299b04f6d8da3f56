"""The assertions of a module that several tests of faults share are to be explained too."""

import pytest

pytest.register_assert_rewrite("uninterrupted")
