"""Rates beside peaks and beside one another, and bits that must be the same on all devices."""

import pytest

from baichuan_omni_jax.doctor import Setting, Verdict, rates
from baichuan_omni_jax.doctor.rates import check_collectives, check_rates
from baichuan_omni_jax.flops.terms import GPUS, TPUS


def rate_line(*seconds: float, peak: float | None = 100e12):
    return rates._rate_line("matmul", "what", 1e12, list(seconds), peak, 0.6, "FLOP/s")


@pytest.mark.parametrize(
    ("seconds", "verdict", "share"),
    [(0.0125, Verdict.OK, "80%"), (0.02, Verdict.WARN, "50%"), (0.2, Verdict.FAIL, "5%")],
)
def test_a_rate_is_held_to_the_peak(seconds, verdict, share):
    line = rate_line(seconds)
    assert line.verdict is verdict
    assert f"{share} of 100 TFLOP/s" in line.text


def test_a_slow_device_is_named():
    line = rate_line(0.0125, 0.0125, 0.025, 0.0125)
    assert line.verdict is Verdict.WARN
    assert "slower than the others: device 2 (40 TFLOP/s)" in line.text


def test_without_a_peak_a_rate_is_told():
    line = rate_line(5.0, peak=None)
    assert (line.verdict, line.text) == (Verdict.OK, "matmul, what: 0.2 TFLOP/s")


def test_a_device_with_other_bits_is_named():
    line = rates._bits_line([b"same", b"same", b"samf"])
    assert line.verdict is Verdict.FAIL
    assert "other bits on device 2" in line.text


def test_the_cpu_is_measured(monkeypatch):
    monkeypatch.setattr(rates, "_PRODUCTS", 1)
    lines = list(check_rates(Setting()))
    assert [line.verdict for line in lines] == [Verdict.OK] * 3
    assert lines[0].values["matmul_rates"][0] > 0
    assert lines[2].values["memory_rates"][0] > 0


def test_one_device_exchanges_nothing():
    (line,) = check_collectives(Setting())
    assert line.text == "one device: nothing is exchanged"


def test_a_collective_is_held_to_the_links():
    fast = rates._exchange_line("all-reduce", 3e11, 2e11, 1.0, 8, TPUS["TPU v5"])
    slow = rates._exchange_line("all-reduce", 3e10, 2e10, 1.0, 8, TPUS["TPU v5"])
    assert (fast.verdict, slow.verdict) == (Verdict.OK, Verdict.WARN)
    assert "50% of all links' 600 GB/s" in fast.text


def test_peaks_of_every_chip_are_plausible():
    """Between PCIe and what no chip has; links send less than memory gives."""
    for chip in (*TPUS.values(), *GPUS.values()):
        assert 5e11 < chip.hbm_rate < 1e13
        assert 2e10 < chip.link_rate < chip.hbm_rate
