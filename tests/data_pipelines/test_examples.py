"""The examples in docstrings are true."""

import doctest
import importlib
import pkgutil

import pytest

import data_pipelines

FOLDERS = ("documents", "media", "packing", "text", "tokenizers")
MODULES = ["data_pipelines.errors"] + [
    module.name
    for folder in FOLDERS
    for module in pkgutil.iter_modules([f"{data_pipelines.__path__[0]}/{folder}"], f"data_pipelines.{folder}.")
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_are_true(name):
    if name == "data_pipelines.text.fonts":
        pytest.importorskip("matplotlib", reason="needs the extra show")
    assert doctest.testmod(importlib.import_module(name)).failed == 0
