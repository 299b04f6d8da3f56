"""Imports follow the contracts of pyproject.toml, and no files import in a circle. `lint-imports` checks chains too."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def house() -> ModuleType:
    """tools/house.py, which is a script."""
    spec = importlib.util.spec_from_file_location("house", ROOT / "tools" / "house.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["house"] = module
    spec.loader.exec_module(module)
    return module


def test_no_import_breaks_a_contract(house):
    assert house.broken_imports(house.read_tree()) == []


def test_no_files_import_in_a_circle(house):
    assert house.find_cycles(house.read_tree()) == []


@pytest.mark.parametrize(
    ("importer", "imported", "contracts"),
    [
        ("baichuan_omni_jax.nn.norm", "baichuan_omni_jax.omni.model", ["layers"]),
        ("baichuan_omni_jax.vision.model", "baichuan_omni_jax.audio.model", ["layers"]),
        ("baichuan_omni_jax.train.step", "baichuan_omni_jax.convert", ["converter"]),
        ("data_pipelines.media.audio", "jax", ["jax-free"]),
        ("data_pipelines.media.audio", "baichuan_omni_jax.nn.norm", ["data"]),
        ("baichuan_omni_jax.omni.model", "data_pipelines.pipeline", ["model"]),
        ("baichuan_omni_jax.omni.model", "baichuan_omni_jax.nn.norm", []),
        ("data_pipelines.media.features", "baichuan_omni_jax.config.architecture", []),
    ],
)
def test_each_contract_forbids_what_it_names(house, importer, imported, contracts):
    module = house.Module("", importer, 1, 0, (), frozenset({imported}), bare=False)
    assert [contract for contract, *_ in house.broken_imports([module])] == contracts


def test_a_circle_is_found(house):
    modules = [
        house.Module("", name, 1, 0, (), frozenset(imports), bare=False)
        for name, imports in {"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": set()}.items()
    ]
    assert house.find_cycles(modules) == [["a", "b", "c"]]
