"""Where the golden fixtures lie; tests that need them skip with a reason where they do not."""

import os
from pathlib import Path

import pytest


def golden_path(name: str) -> Path:
    """Path of `name` inside $OMNI_GOLDEN. Skips when absent."""
    path = Path(os.environ.get("OMNI_GOLDEN", "")) / name
    if "OMNI_GOLDEN" not in os.environ or not path.exists():
        pytest.skip(f"golden fixture {path} is not there (set OMNI_GOLDEN to the folder that holds it)")
    return path


def ranks_path() -> Path:
    """The released vocabulary's ranks, $QWEN_RANKS: too large to keep here. Skips when absent."""
    path = Path(os.environ.get("QWEN_RANKS", ""))
    if not path.is_file():
        pytest.skip("QWEN_RANKS names no file (resources/qwen.tiktoken of the PyPI package dashscope)")
    return path
