"""Stands in for `baichuan-omni train` where a test is about what is around it: no model, tens of milliseconds.

    python fake_train.py --config NAME --workdir DIR --set train.steps=4 ...

DIR may be a URL. Writes a line of metrics a step and a checkpoint's mark every second one; goes on where it was;
SIGTERM saves and ends it. FAKE_TRAIN is a JSON object of NAME -> how that run ends at its third step, once: `killed`,
`refused`, `stopped`, `broken`; or `slow`, which waits there.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path


def open_workdir(given: str):
    if "://" not in given:
        return Path(given)
    # Takes seconds, so only where it is needed.
    from baichuan_omni_jax.storage import parse_path

    return parse_path(given)


def main() -> None:
    arguments = sys.argv[1:]
    given = dict(zip(arguments[::2], arguments[1::2], strict=False))
    sets = dict(arguments[n + 1].split("=", 1) for n, word in enumerate(arguments) if word == "--set")
    workdir, steps = open_workdir(given["--workdir"]), int(sets["train.steps"])
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / "given.json").write_text(json.dumps(sets))
    metrics, trouble = workdir / "metrics.jsonl", workdir / "trouble"
    how = json.loads(os.environ.get("FAKE_TRAIN", "{}")).get(given["--config"], "")
    saved = max((int(path.name) for path in (workdir / "checkpoints").glob("*")), default=0)
    lines = metrics.read_text().splitlines(keepends=True)[:saved] if metrics.exists() else []
    metrics.write_text("".join(lines))
    asked: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))

    def save(step: int) -> None:
        folder = workdir / "checkpoints" / str(step)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "checksums.json").write_text("{}")

    print("begins at", saved, flush=True)
    for step in range(saved + 1, steps + 1):
        lines.append(json.dumps({"step": step, "loss": 1 / step, "step_time_s": 0.01}) + "\n")
        if isinstance(metrics, Path):
            with open(metrics, "a") as file:
                file.write(lines[-1])
        else:
            metrics.write_text("".join(lines))
        if step == 3 and how and not trouble.exists():
            trouble.write_text("")
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if how == "slow":
                while not asked:
                    time.sleep(0.01)
            else:
                print(f"error: it was {how}", file=sys.stderr)
                sys.exit({"refused": 2, "stopped": 3, "broken": 1}[how])
        if step % 2 == 0 or step == steps or asked:
            save(step)
        if asked:
            print("stopped by SIGTERM")
            return
    print("finished")


if __name__ == "__main__":
    main()
