"""The long proofs at their full size: does what CI shows a little of hold for all of it?

    python benchmarks/long_tests.py [--json] [PROOF ...]

CI runs some of these and `pytest -m slow` all, at a small size (`sized` in tests/helpers/proofs.py); here hundreds of
kills, thousands of damaged files, every shape of every kernel and the chain of trainings take an hour or more. Needs
the extra `test`, and libtpu (extra `preflight`) for `aot`. The value is the number of tests that passed; a failing or
missing one makes `ok` false.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from rows import emit, row

ROOT = Path(__file__).resolve().parents[1]
# Test files by what they prove.
PROOFS = {
    "kills": (
        "faults/test_kills.py faults/test_build_kills.py faults/test_tokenize_kills.py faults/test_synthesis.py "
        "checkpoint/test_processes.py"
    ),
    "damage": "faults/test_damage.py faults/test_full_disk.py faults/test_media.py faults/test_requests.py",
    "meshes": "multidevice faults/test_other_meshes.py",
    "kernels": "kernels/test_attention_tpu.py kernels/test_attention_gpu.py kernels/test_rvq_pallas.py",
    "aot": (
        "kernels/test_attention_aot.py generation/test_decode_aot.py train/test_preflight.py "
        "multidevice/test_two_slices.py"
    ),
    "trainings": "train/test_stages.py train/test_survival.py train/test_trainer.py train/test_audio_tasks.py",
}


def prove(name: str) -> dict:
    """Runs the slow tests of one proof at full size, in a process of its own."""
    files = [str(Path("tests") / file) for file in PROOFS[name].split()]
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-m", "slow", f"--junitxml={report}", *files]
        done = subprocess.run(
            command, cwd=ROOT, env=os.environ | {"PROOFS": "full"}, capture_output=True, text=True, check=False
        )
        if not report.exists():
            return row(name, 0, "tests passed", goal=">= 1", ok=False, note=(done.stdout + done.stderr)[-300:])
        suite = ElementTree.parse(report).getroot().find("testsuite")
    counts = {key: int(suite.get(key)) for key in ("tests", "failures", "errors", "skipped")}
    passed = counts["tests"] - counts["failures"] - counts["errors"] - counts["skipped"]
    failed = [
        case.get("name") for case in suite.iter("testcase") if any(child.tag in ("failure", "error") for child in case)
    ]
    skipped = {skip.get("message") for skip in suite.iter("skipped")}
    note = f"{time.perf_counter() - begun:.0f} s, {counts['skipped']} skipped"
    note += f" ({'; '.join(sorted(skipped))})" if skipped else ""
    note += f", failed: {', '.join(failed)}" if failed else ""
    return row(name, passed, "tests passed", goal="none fails", ok=not failed and passed > 0, note=note)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("proofs", nargs="*", metavar="PROOF", help=f"of {', '.join(PROOFS)}; all when left out")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.proofs if name not in PROOFS]:
        parser.error(f"{unknown[0]!r} is not one of {', '.join(PROOFS)}")
    return emit([prove(name) for name in arguments.proofs or PROOFS], arguments.json)


if __name__ == "__main__":
    sys.exit(main())
