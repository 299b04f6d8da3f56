"""Kernels against their references: right ones pass, wrong ones are named. Released widths, few heads."""

import jax
import jax.numpy as jnp
import pytest

from baichuan_omni_jax.doctor import Line, Setting, Verdict, kernels
from baichuan_omni_jax.doctor.kernels import check_kernels, compare_attention, compare_lookup
from baichuan_omni_jax.flops.terms import TPUS
from baichuan_omni_jax.kernels.flash_attention import xla
from baichuan_omni_jax.kernels.flash_attention.cases import LLM, Case, Heads
from baichuan_omni_jax.kernels.rvq_lookup import xla as lookup_xla

FEW = Heads(2, 1, 128, causal=True)
WIDTHS = {"llm": 128, "vit": 80, "whisper": 64}
CASE = Case("llm", FEW, 64, 32, ((40, 10),), permuted=True)


@pytest.fixture(scope="module", autouse=True)
def quick_compile():
    """Compiles with few optimizations: the tests' time would else be compilation."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def test_attention_that_is_right_passes():
    line = compare_attention(CASE, "float32")
    assert line.verdict is Verdict.OK
    assert line.text.startswith("attention llm 2/1 heads of 128, float32, xla: ")
    assert set(line.values) == {"values", "log-sum-exp", "gradient of q", "gradient of k", "gradient of v"}
    assert max(line.values.values()) < 1e-5


def test_a_wrong_kernel_is_named(monkeypatch):
    """Its scores are a hundredth too large."""
    right = xla.attention

    def wrong(q, k, v, *, segments, plan, scale):
        return right(q, k, v, segments=segments, plan=plan, scale=1.01 * scale)

    monkeypatch.setattr(xla, "attention", wrong)
    line = compare_attention(CASE, "float32")
    assert line.verdict is Verdict.FAIL
    assert line.text.startswith("attention llm 2/1 heads of 128, float32, xla: WRONG by values ")
    assert "compute.attention=xla" in line.advice


def test_a_wrong_gradient_alone_is_named(monkeypatch):
    right = xla.attention

    def wrong(q, k, v, *, segments, plan, scale):
        # The value of v, with 1.1 of its gradient.
        v = 1.1 * v - jax.lax.stop_gradient(0.1 * v)
        return right(q, k, v, segments=segments, plan=plan, scale=scale)

    monkeypatch.setattr(xla, "attention", wrong)
    line = compare_attention(CASE, "float32")
    assert line.verdict is Verdict.FAIL
    assert "WRONG by gradient of v 1.0e-01" in line.text
    assert "values" not in line.text


def test_numbers_that_are_none_are_wrong(monkeypatch):
    right = xla.attention

    def wrong(q, k, v, *, segments, plan, scale):
        out, lse = right(q, k, v, segments=segments, plan=plan, scale=scale)
        return out * jnp.nan, lse

    monkeypatch.setattr(xla, "attention", wrong)
    assert "WRONG by values inf" in compare_attention(CASE, "float32").text


def test_a_better_back_end_that_refuses_is_told(monkeypatch):
    monkeypatch.setitem(kernels.PREFERRED, "cpu", ("pallas_tpu", "xla"))
    line = compare_attention(Case("llm", Heads(2, 1, 72, causal=True), 64, 32, ((40,),)), "float32")
    assert line.verdict is Verdict.WARN
    assert "pallas_tpu: " in line.text


def test_a_wrong_lookup_is_named(monkeypatch):
    nearest = lookup_xla.nearest
    monkeypatch.setattr(lookup_xla, "nearest", lambda residual, level: (nearest(residual, level) + 1) % 4)
    line = compare_lookup(small=True)
    assert line.verdict is Verdict.FAIL
    assert line.text.startswith("RVQ lookup, 8 levels, width 5120, float32, xla: WRONG by codes ")


@pytest.mark.parametrize(("platform", "block"), [("cpu", 64), ("tpu", 512)])
def test_the_check_has_all_heads_at_their_widths_and_the_lookup(platform, block, monkeypatch):
    """What is computed is proved above; on an accelerator in the type of training, and once in fp32."""
    tried: list[tuple[str, int, int, str]] = []

    def compare(case: Case, dtype: str) -> Line:
        tried.append((case.name, case.heads.head_dim, case.block, dtype))
        return Line("kernels", Verdict.OK, "")

    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    monkeypatch.setattr(kernels, "compare_attention", compare)
    monkeypatch.setattr(kernels, "compare_lookup", lambda small: Line("kernels", Verdict.OK, f"small: {small}"))
    lines = list(check_kernels(Setting()))
    assert lines[-1].text == f"small: {platform == 'cpu'}"
    wanted = {("llm", 128, block, "float32")}
    wanted |= {(name, width, block, "float32" if platform == "cpu" else "bfloat16") for name, width in WIDTHS.items()}
    assert set(tried) == wanted


@pytest.mark.parametrize(("slower", "verdict"), [(1.2, Verdict.OK), (2.0, Verdict.WARN)])
def test_times_are_held_to_the_prediction_where_there_is_one(slower, verdict):
    """A v5p: 4 groups of heads on 2 cores, 5.6 + 6.6 + 8.5 µs each a pair of blocks."""
    case = Case("llm", LLM, 16384, 512, ((16384,),))
    forward, backward = (slower * 1e-6 * 100 * 2 * each for each in (5.6, 6.6 + 8.5))
    line = kernels._time_line(case, 100, (forward, forward + backward), TPUS["TPU v5"])
    assert line.verdict is verdict
    assert "predicted 1120 and 3020 µs" in line.text


def test_times_without_a_prediction_are_held_to_the_peak():
    case = Case("vit", kernels.VIT, 16384, 512, ((16384,),))
    # 9 products of 2 x 512 x 512 x 16 x 80 FLOPs, 100 times, at a tenth of 918 TFLOP/s.
    seconds = 9 * 2 * 512**2 * 16 * 80 * 100 / 91.8e12
    line = kernels._time_line(case, 100, (seconds / 3, seconds), TPUS["TPU v6 lite"])
    assert line.verdict is Verdict.WARN
    assert line.values["share_of_peak"] == pytest.approx(0.1)
