"""Sweeps: every combination is tried, one that cannot be is a line of the table, and the fastest comes first."""

from importlib.util import find_spec

import pytest
from rich.console import Console

from baichuan_omni_jax.errors import ConfigError
from baichuan_omni_jax.flops.terms import TPUS
from baichuan_omni_jax.train.preflight.report import Report
from baichuan_omni_jax.train.preflight.step_time import Work, predict
from baichuan_omni_jax.train.preflight.sweep import Cell, parse_sweep, plot_sweep, sweep, sweep_table

V5P = TPUS["TPU v5"]


def report(seconds: float, fits: bool = True) -> Report:
    """A report of a step of 1000 tokens on one chip, of which all but a few fields are left open."""
    fields = dict.fromkeys(Report.__dataclass_fields__)
    time = predict(Work(product_flops=seconds * V5P.flops), V5P, V5P.flops)
    known = {"time": time, "fits": fits, "chips": 1, "counts": {"tokens": 1000.0}, "peak_bytes": 1, "hbm_bytes": 2}
    made = object.__new__(Report)
    for name, value in (fields | known).items():
        object.__setattr__(made, name, value)
    return made


def check(settings: dict[str, str]) -> Report:
    """Time is `a`; b=2 does not fit, b=3 cannot be."""
    if settings["b"] == "3":
        raise ConfigError("the mesh does not divide the rows")
    return report(float(settings["a"]), settings["b"] != "2")


CELLS = list(sweep(parse_sweep(["a=2,1", "b=1,2,3"]), check))


def test_every_combination_is_tried_in_order():
    assert [tuple(cell.settings.values()) for cell in CELLS] == [(a, b) for a in "21" for b in "123"]
    assert [cell.why for cell in CELLS] == ["", "", "the mesh does not divide the rows"] * 2


def test_the_fastest_comes_first_and_what_cannot_be_last():
    console = Console(width=200, record=True)
    console.print(sweep_table(CELLS))
    lines = [line.split("│") for line in console.export_text().splitlines() if line.count("│") > 3]
    places = [(line[1].strip(), line[2].strip()) for line in lines]
    assert places == [("1", "1"), ("2", "1"), ("2", "2"), ("1", "2"), ("2", "3"), ("1", "3")]
    assert "does not fit" in lines[2][-2]
    assert "divide the rows" in lines[-1][-2]


def test_a_report_becomes_json():
    assert Cell({"a": "1"}, None, "no").to_json() == {"settings": {"a": "1"}, "report": None, "why": "no"}


@pytest.mark.parametrize("item", ["mesh.fsdp", "=1,2", "mesh.fsdp=", "mesh.fsdp=1,,2"])
def test_other_forms_are_refused(item):
    with pytest.raises(ConfigError, match="--sweep"):
        parse_sweep([item])


def test_a_key_that_comes_twice_is_refused():
    with pytest.raises(ConfigError, match="twice"):
        parse_sweep(["a=1", "a=2"])


@pytest.mark.skipif(find_spec("matplotlib") is None, reason="matplotlib is not installed (extra `show`)")
@pytest.mark.parametrize("cells", [CELLS, CELLS[2:3]])
def test_a_figure_is_drawn_of_some_and_of_none(cells, tmp_path):
    plot_sweep(cells, tmp_path / "sweep.png")
    assert (tmp_path / "sweep.png").stat().st_size > 2000
