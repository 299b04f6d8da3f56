"""What was compiled once is found again, as long as program, devices and compilers are the same."""

import os
from types import SimpleNamespace

import pytest

from baichuan_omni_jax.train.preflight import program_cache
from baichuan_omni_jax.train.preflight.compile import CompiledProgram, Memory
from baichuan_omni_jax.train.preflight.hlo import Temporary
from baichuan_omni_jax.train.preflight.program_cache import keep_program, load_program, program_key

BUILT = CompiledProgram(Memory(1, 2, 3, 4, 5), "ENTRY %main", [Temporary(7, "f32[7]", "llm/mlp")], 12.5)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "baichuan_omni_jax" / "preflight"


def devices(count: int, kind: str = "TPU v5") -> list[SimpleNamespace]:
    return [SimpleNamespace(device_kind=kind, coords=(place, 0, 0)) for place in range(count)]


def test_what_is_kept_comes_back_whole(folder):
    assert load_program("a") is None
    keep_program("a", BUILT.to_json())
    kept = load_program("a")
    assert CompiledProgram.from_json(kept, 12.5) == BUILT
    assert [path.name for path in folder.iterdir()] == ["a.json.gz"]


@pytest.mark.parametrize("damage", [b"", b"\x1f\x8b cut", b"no gzip"])
def test_a_damaged_file_is_as_good_as_none(folder, damage):
    keep_program("a", BUILT.to_json())
    (folder / "a.json.gz").write_bytes(damage)
    assert load_program("a") is None


def test_the_key_is_of_program_and_devices():
    keys = [
        program_key("module @a", devices(4)),
        program_key("module @b", devices(4)),
        program_key("module @a", devices(8)),
        program_key("module @a", devices(4, "TPU v6 lite")),
    ]
    assert len(set(keys)) == 4
    assert program_key("module @a", devices(4)) == keys[0]


def test_those_that_were_not_used_for_longest_go(folder, monkeypatch):
    monkeypatch.setattr(program_cache, "KEPT", 2)
    for age, key in enumerate("ab"):
        keep_program(key, BUILT.to_json())
        os.utime(folder / f"{key}.json.gz", (age, age))
    load_program("a")
    keep_program("c", BUILT.to_json())
    assert sorted(path.name for path in folder.iterdir()) == ["a.json.gz", "c.json.gz"]


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(folder):
    folder.parent.mkdir(parents=True)
    folder.write_text("in the way")
    keep_program("a", BUILT.to_json())
    assert load_program("a") is None
