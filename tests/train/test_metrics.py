"""What becomes of a run's numbers: files, speeds, goodput over several starts, traces, W&B."""

import json
import math
import sys
from types import ModuleType, SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from baichuan_omni_jax.config import load_run_config, resolve_model
from baichuan_omni_jax.errors import ConfigError, StorageError
from baichuan_omni_jax.flops.terms import flops_by_branch, omni_terms
from baichuan_omni_jax.train import goodput
from baichuan_omni_jax.train.goodput import Goodput
from baichuan_omni_jax.train.hooks import NumberStack
from baichuan_omni_jax.train.metrics import MetricsWriter, Throughput, WandbWriter
from baichuan_omni_jax.train.profiling import StepTrace, parse_span
from tests.helpers.micro import CONFIG

COUNTS = {
    "tokens": 200.0,
    "causal_pairs": 5000.0,
    "text_targets": 150.0,
    "patches": 64.0,
    "patch_pairs": 2048.0,
    "audio_frames": 40.0,
    "audio_targets": 20.0,
}


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_numbers_that_are_not_finite_are_null(tmp_path):
    """Strict JSON knows no NaN; readers other than Python's refuse a file with one."""
    writer = MetricsWriter(tmp_path, 0)
    writer.write({"step": 1, "loss": math.nan, "gradient_norm": math.inf, "skipped": {"unreadable": 2}})
    writer.close()
    row = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail)
    assert row == {"step": 1, "loss": None, "gradient_norm": None, "skipped": {"unreadable": 2}}


@pytest.mark.parametrize(("step", "kept"), [(0, []), (1, [0, 1]), (2, [0, 1, 2])])
def test_rows_kept_by_a_resumed_run(tmp_path, step, kept):
    """Rows past the step, and half a row, are dropped; from step 0 everything is written anew."""
    rows = [{"step": number, "loss": 1.0 * number} for number in range(4)]
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join([*map(json.dumps, rows), '{"step": 4, "lo']))
    writer = MetricsWriter(tmp_path, step)
    writer.close()
    assert [row["step"] for row in writer.kept] == [row["step"] for row in lines(path)] == kept


@pytest.mark.parametrize(
    "damage",
    [
        b'{"step": 3, "lo',
        bytes(40),
        b"\xff\xfe\x80\x81\n",
        b'{"step": 3, "note": "\xe4\xbd',
        b"[" * 100_000,
        b'"step"\n[3]\n{"step": true}\n{"step": 3.0}\n',
    ],
    ids="cut zeros bytes character nested other".split(),
)
def test_what_a_crash_left_is_dropped_and_whole_rows_stay(tmp_path, damage):
    rows = [{"step": number, "loss": 1.0} for number in (1, 2)]
    whole = "".join(json.dumps(row) + "\n" for row in rows).encode("utf-8-sig")  # an editor's mark costs no row
    (tmp_path / "metrics.jsonl").write_bytes(whole + damage)
    writer = MetricsWriter(tmp_path, 9)
    writer.write({"step": 3, "loss": 2.0})
    writer.close()
    assert writer.kept == rows
    assert lines(tmp_path / "metrics.jsonl") == [*rows, {"step": 3, "loss": 2.0}]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("audio_scale", "audio_loss_scale"),
        ("handled", "oversize"),
        ("share/web", "loss_share/web"),
        ("codes_unquantised", "codes_unquantized"),
    ],
)
def test_keys_of_an_earlier_version_are_refused_with_their_new_name(tmp_path, old, new):
    """The file stays as it was; a run that starts over, or one whose lines are renamed, goes on."""
    path = tmp_path / "metrics.jsonl"
    text = "".join(json.dumps({"step": step, old: 1.0}) + "\n" for step in (1, 2))
    path.write_text(text)
    with pytest.raises(ConfigError, match=f"{path}: the key {old} is now {new}: rename it there"):
        MetricsWriter(tmp_path, 2)
    assert path.read_text() == text
    path.write_text(text.replace(old, new))
    MetricsWriter(tmp_path, 1).close()
    assert lines(path) == [{"step": 1, new: 1.0}]
    path.write_text(text)
    MetricsWriter(tmp_path, 0).close()
    assert path.read_text() == ""


def test_numbers_of_a_step_come_as_one_array():
    stack = NumberStack(lambda batch: {"tokens": batch["tokens"].sum(), "a": jnp.float32(7)})
    numbers = {"loss": jnp.float32(1.5), "gradient_norm": jnp.float32(np.nan), "nonfinite": jnp.float32(1)}
    stacked = stack(numbers, {"tokens": jnp.ones((2, 8))})
    assert stacked.shape == (5,)
    found, counts = stack.read(stacked)
    assert (found["loss"], found["nonfinite"]) == (1.5, 1)
    assert np.isnan(found["gradient_norm"])
    assert counts == {"tokens": 16, "a": 7}


def test_speed_and_mfu():
    """Two chips of 1e12 FLOP/s for half a second: shares of 1e12 FLOPs, by branch, and their sum."""
    omni = resolve_model("tiny")
    trainable = {"llm.layers.attention.q_proj.weight"}
    parts = omni_terms(omni)
    found = Throughput(parts, trainable, 2, 1e12).rates(COUNTS, 0.5)
    flops = flops_by_branch(parts, COUNTS, trainable)
    assert found["tokens_per_s_per_chip"] == 200.0
    for name, value in flops.items():
        assert found[f"flops_{name}"] == value > 0
        assert found[f"mfu_{name}"] == pytest.approx(value / 1e12)
    assert found["mfu"] == pytest.approx(sum(flops.values()) / 1e12)


def test_no_mfu_where_the_peak_is_not_known():
    found = Throughput(omni_terms(resolve_model("tiny")), set(), 1, None).rates(COUNTS, 0.5)
    assert not [name for name in found if name.startswith("mfu")]


@pytest.fixture
def clock(monkeypatch):
    """Time as `Goodput` sees it; a start of the process begins at `began`."""
    clock = SimpleNamespace(time=lambda: clock.now, now=1000.0)

    def start(began: float, now: float) -> None:
        clock.now = now
        monkeypatch.setattr(goodput, "_BEGAN", began)

    monkeypatch.setattr(goodput, "time", clock)
    clock.start = start
    return clock


def test_goodput_adds_up_over_starts(tmp_path, clock):
    """Two starts of 10 s, 20 s apart. The first is killed after steps 1 and 2 of 3 s; step 2 is lost and made again."""
    clock.start(1000.0, 1010.0)
    first = Goodput(tmp_path, [])
    assert first.note(3.0) == pytest.approx(3 / 10)
    assert first.note(3.0) == pytest.approx(6 / 10)
    clock.start(1030.0, 1040.0)
    second = Goodput(tmp_path, [{"step": 1, "productive_s": 3.0}])
    assert second.note(3.0) == pytest.approx(6 / 40)
    noted = json.loads((tmp_path / "goodput.json").read_text())
    assert (noted["elapsed_s"], noted["between_starts_s"], noted["starts"]) == (40.0, 20.0, 2)


def test_goodput_goes_on_from_a_file_of_an_earlier_version(tmp_path, clock):
    (tmp_path / "goodput.json").write_text('{"elapsed_s": 50.0}')
    clock.start(1000.0, 1010.0)
    assert Goodput(tmp_path, [{"productive_s": 30.0}]).note(3.0) == pytest.approx(33 / 60)


def test_a_full_disk_ends_tensorboard_and_not_the_run(tmp_path, caplog):
    """Its queue holds ten events: nobody would empty it once its thread had died."""
    writer = MetricsWriter(tmp_path, 0)
    writer._events.file_writer.event_writer._ev_writer._writer._py_recordio_writer._writer = open("/dev/full", "wb")  # noqa: SIM115
    for step in range(1, 40):
        writer.write({"step": step, "loss": 1.0})
        writer.flush()
    writer.close()
    assert caplog.text.count("gets no more numbers") == 1
    assert len(lines(tmp_path / "metrics.jsonl")) == 39


@pytest.mark.parametrize("refused", ["start_trace", "stop_trace"])
def test_a_trace_that_cannot_be_written_ends_no_run(tmp_path, caplog, monkeypatch, refused):
    def refuse(*_):
        raise RuntimeError("profile is not a directory")

    for name in ("start_trace", "stop_trace"):
        monkeypatch.setattr(jax.profiler, name, refuse if name == refused else lambda *_: None)
    trace = StepTrace(tmp_path, range(1, 2))
    trace.before(1)
    trace.after(1, jnp.ones(3))
    trace.close()
    assert caplog.text.count(f"steps could not be traced into {tmp_path}/profile: profile is not a directory") == 1


@pytest.mark.parametrize("name", ["goodput.json", "goodput.jsonl"])
def test_a_statistic_that_cannot_be_written_ends_no_run(tmp_path, clock, caplog, name):
    """As on a full disk: told once."""
    clock.start(1000.0, 1010.0)
    found = Goodput(tmp_path, [])
    (tmp_path / "goodput.json").mkdir()
    if name == "goodput.jsonl":
        found._events.close()
        found._events = open("/dev/full", "a")  # noqa: SIM115 closed by close()
    for _ in range(3):
        assert found.note(1.0) > 0
        found.tell(step_count=1)
    found.close()
    assert len([record for record in caplog.records if "cannot be written" in record.message]) == 1


def test_numbers_that_cannot_be_written_are_told_with_their_file(tmp_path):
    writer = MetricsWriter(tmp_path, 0)
    writer._file.close()
    writer._file = open("/dev/full", "a")  # noqa: SIM115 closed by close()
    with pytest.raises(StorageError, match=rf"^{tmp_path}/metrics.jsonl cannot be written: No space left on device$"):
        writer.write({"step": 1, "loss": 1.0})
    writer.close()


@pytest.mark.parametrize(
    "text", ["", "[" * 100_000, "[]", '{"began": NaN, "starts": NaN}', '{"starts": Infinity}', '{"began": "x"}']
)
def test_goodput_begins_anew_where_its_file_was_spoiled(tmp_path, clock, text):
    (tmp_path / "goodput.json").write_text(text)
    clock.start(1000.0, 1010.0)
    records = [{"productive_s": value} for value in ("x", None, [1], float("nan"), 2.0)]
    assert Goodput(tmp_path, records).note(3.0) == pytest.approx(5 / 10)


def test_goodput_s_events_are_those_of_the_library(tmp_path, clock):
    """Where it is installed, its calculator reads them: steps of 10 s, of which two are made twice, over two starts."""
    for began, first, last in ((1000.0, 1, 10), (1400.0, 9, 30)):
        clock.start(began, began + 50)
        found = Goodput(tmp_path, [], "a run")
        for step in range(first, last + 1):
            found.step(step, clock.now, 2.0)
            clock.now += 10
        with found.beside("saving"):
            clock.now += 5
        found.close()
    events = [json.loads(line) for line in (tmp_path / "goodput.jsonl").read_text().splitlines()]
    assert {event["job_name"] for event in events} == {"a run"}
    assert [event["job_start_time"] for event in events if "job_start_time" in event] == [1000.0, 1400.0]
    assert [event["step_count"] for event in events if "step_count" in event] == [*range(1, 11), *range(9, 31)]
    kinds = {event["custom_badput_event_type"] for event in events if "custom_badput_event_type" in event}
    assert kinds == {"saving"}
    library = pytest.importorskip("ml_goodput_measurement.goodput", reason="ml-goodput-measurement is not installed")
    reader = SimpleNamespace(read_cloud_logging_entries=lambda *_, **__: (events, None))
    calculator = library.GoodputCalculator("a run", "log", reader, cache_dir=str(tmp_path))
    share, _, step = calculator.get_job_goodput(include_badput_breakdown=True)
    # 8 + 22 steps of 10 s, the first of each start among the compiling, over 675 s; waits for rows are its badput.
    assert step == 30
    assert share == pytest.approx(45.2, abs=0.1)


@pytest.mark.parametrize("text", ["3", "3:3", "0:2", "a:b", "1:2:3", "-1:3"])
def test_a_span_that_is_none_is_refused(text):
    with pytest.raises(ConfigError, match=r"--profile '.*' is not START:STOP"):
        parse_span(text)


def test_a_trace_holds_the_steps_of_its_span(tmp_path):
    """Steps 2 and 3 of 4 leave one trace file, and operations in it carry the name of their scope."""

    @jax.jit
    def work(x):
        with jax.named_scope("some_layer"):
            return jnp.tanh(x @ x).sum()

    trace, running = StepTrace(tmp_path, parse_span("2:4")), []
    for step in range(1, 5):
        trace.before(step)
        running.append(trace._running)
        trace.after(step, work(jnp.ones((64, 64))))
    assert running == [False, True, True, False]
    (file,) = (tmp_path / "profile").rglob("*.xplane.pb")
    assert b"some_layer" in file.read_bytes()


class FakeWandb(ModuleType):
    """The package's three calls that are used; the first `init` fails as it does without a network."""

    def __init__(self):
        super().__init__("wandb")
        self.inits, self.rows, self.metrics = [], [], []

    def init(self, **settings):
        self.inits.append(settings)
        if settings.get("mode") != "offline":
            raise RuntimeError("no network")
        return self

    def define_metric(self, name, step_metric):
        self.metrics.append((name, step_metric))

    def log(self, row):
        self.rows.append(row)

    def finish(self):
        self.rows.append("finished")


def test_wandb_without_a_network(tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    writer = MetricsWriter(tmp_path, 0, WandbWriter("omni", load_run_config(CONFIG), tmp_path, str(tmp_path)))
    writer.write({"step": 1, "loss": 2.0, "skipped": {"bad_json": 1}})
    writer.close()
    assert [settings.get("mode") for settings in fake.inits] == [None, "offline"]
    assert fake.inits[0]["id"] == fake.inits[1]["id"]
    assert fake.inits[1]["config"]["name"] == "micro"
    assert fake.metrics == [("*", "step")]
    assert fake.rows == [{"step": 1, "loss": 2.0, "skipped/bad_json": 1}, "finished"]


def test_wandb_that_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"--wandb needs the package wandb: .*baichuan_omni_jax\[wandb\]"):
        WandbWriter("omni", load_run_config(CONFIG), tmp_path, str(tmp_path))
