"""`baichuan-omni train`, slow in one phase, which it tells: `phases.py PHASE FLAGS...`.

The file WORKDIR.PHASE appears when the phase begins: `prepare` (in Python), `native` (before the first step, where no
signal reaches Python), `evaluate` (after a step; on several hosts batch by batch), `save` (while files are written),
`steps` (each takes a third of a second).
"""

import hashlib
import sys
import time
from pathlib import Path

from baichuan_omni_jax.checkpoint import Workdir
from baichuan_omni_jax.cli import train as command
from baichuan_omni_jax.cli.main import main
from baichuan_omni_jax.evaluation.held_out import HeldOutEvaluation
from baichuan_omni_jax.train.trainer import Trainer

PHASE = sys.argv[1]
WORKDIR = sys.argv[sys.argv.index("--workdir") + 1]
# Seconds: longer than any test waits for the end of the process, but for a save, which has to end.
LONG, SAVE = 300.0, 5.0


def tell() -> None:
    Path(f"{WORKDIR}.{PHASE}").touch()


def prepare(*arguments):
    tell()
    time.sleep(LONG)


def native(*arguments):
    """As a compilation: outside of Python, which gets no signal before it is back."""
    tell()
    hashlib.pbkdf2_hmac("sha256", b"a", b"b", 2_000_000_000)


def evaluate(evaluation, parameters):
    if not Path(WORKDIR, "metrics.jsonl").exists() or not Path(WORKDIR, "metrics.jsonl").read_text().count('"loss"'):
        return EVALUATE(evaluation, parameters)  # before the first step
    tell()
    end = time.monotonic() + LONG
    while time.monotonic() < end:
        evaluation._check()
        time.sleep(0.1)
    return {}


def save(*arguments):
    tell()
    time.sleep(SAVE)
    SAVING(*arguments)


def steps(*arguments):
    time.sleep(0.3)
    return SEND(*arguments)


if __name__ == "__main__":
    SEND = Trainer._send
    EVALUATE, SAVING = HeldOutEvaluation.__call__, Workdir._finish
    places = {"prepare": (command, "open_run_data"), "native": (Trainer, "_send")}
    places |= {"evaluate": (HeldOutEvaluation, "__call__"), "save": (Workdir, "_finish")}
    places["steps"] = (Trainer, "_send")
    setattr(*places[PHASE], globals()[PHASE])
    sys.exit(main(["train", *sys.argv[2:]]))
