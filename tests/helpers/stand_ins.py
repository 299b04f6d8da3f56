"""Stand-ins of gcloud, xpk, docker, srun and what else the recipes call, which run the commands of "hosts" for real.

A `Cloud` is a folder: `bin/` holds the programs of the user's machine, `host_bin/` those of the machines that are
requested, whose homes lie in `slices/NAME/HOST/`. Commands run there in bare environments. `uv` and what it installs
are stubs in shell, unless the cloud is `real`, where a test puts uv itself into `host_bin/`. The stub trainer does what
the lines of `outcomes` say, one a start of a host: `finish`, `crash`, `refuse`, `nonfinite`, or `train`, which ends
with `finish()` or SIGTERM.
"""

import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
RECIPES = REPOSITORY / "launch" / "recipes"
# Seconds that no recipe takes unless it hangs.
HANG = 600
LOGIN = ("gcloud", "xpk", "docker", "srun", "scontrol", "nvidia-smi")
HOST = ("curl", "gcloud", "gcsfuse", "sudo", "mountpoint")

TRAINER = """#!/bin/bash
if [ "$1" = doctor ]; then
  printf '%s ' "$@" >> "$CLOUD/doctors/$WHO"
  echo >> "$CLOUD/doctors/$WHO"
  exit "$(cat "$CLOUD/ill" 2>/dev/null || echo 0)"
fi
number=$(ls "$CLOUD/starts" | grep -c "^$WHO-")
printf '%s\\n' "$@" > "$CLOUD/starts/$WHO-$number.new"
env | grep ^MEGASCALE >> "$CLOUD/starts/$WHO-$number.new"
mv "$CLOUD/starts/$WHO-$number.new" "$CLOUD/starts/$WHO-$number"
outcome=$(sed -n "$((number + 1))p" "$CLOUD/outcomes")
trap 'echo saved; exit 75' TERM
case ${outcome:-finish} in
  finish) exit 0 ;;
  crash) exit 1 ;;
  refuse) exit 2 ;;
  nonfinite) exit 3 ;;
  train) until [ -f "$CLOUD/finish" ]; do sleep 0.05; done ;;
esac
"""
UV = f"""#!/bin/bash
printf '%s\\n' "uv $*" >> "$CLOUD/uv/$WHO"
[ ! -f "$CLOUD/no_uv" ] || {{ echo "no matching version" >&2; exit 1; }}
case $1 in
  venv) mkdir -p "${{!#}}/bin" ;;
  pip) cat > .venv/bin/baichuan-omni <<'STUB'
{TRAINER}STUB
    chmod +x .venv/bin/baichuan-omni ;;
esac
"""


class Cloud:
    """The test's side of the stand-ins in the folder `path`."""

    def __init__(self, path: Path, *, hosts: int = 1, real: bool = False):
        self.path = path
        for name in ("bin", "doctors", "host_bin", "slices", "starts", "uv"):
            (path / name).mkdir(parents=True)
        for folder, programs in (("bin", (*LOGIN, "curl")), ("host_bin", HOST)):
            for program in programs:
                # The real uv stands there itself.
                if real and program == "curl":
                    continue
                file = path / folder / program
                file.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S {__file__} {program} "$@"\n')
                file.chmod(0o755)
        (path / "uv_stub").write_text(UV)
        (path / "outcomes").write_text("")
        (path / "settings.json").write_text(json.dumps({"hosts": hosts}))

    def set(self, **settings: object) -> None:
        """Changes what the stand-ins do: `create_state`, `namespace`, `variables` of hosts, ..."""
        file = self.path / "settings.json"
        file.write_text(json.dumps(read_settings(self.path) | settings))

    def outcomes(self, *words: str) -> None:
        (self.path / "outcomes").write_text("".join(f"{word}\n" for word in words))

    def finish(self) -> None:
        (self.path / "finish").touch()

    def environment(self, **variables: str) -> dict[str, str]:
        """Of the user's machine: no Python, no environment of the tests'."""
        home = self.path / "login"
        home.mkdir(exist_ok=True)
        path = f"{self.path / 'bin'}:/usr/bin:/bin"
        return {"PATH": path, "HOME": str(home), "CLOUD": str(self.path), "WHO": "login", "POLL": "0.1"} | variables

    def start(self, recipe: str, *arguments: str, cwd: Path | None = None, **variables: str) -> subprocess.Popen:
        """Starts a script of launch/recipes/."""
        command, pipe = ["bash", str(RECIPES / recipe), *arguments], subprocess.PIPE
        variables = self.environment(**variables)
        return subprocess.Popen(
            command, env=variables, cwd=cwd or self.path, stdout=pipe, stderr=pipe, text=True, start_new_session=True
        )

    def run(self, recipe: str, *arguments: str, cwd: Path | None = None, **variables: str) -> tuple[int, str]:
        """Runs a script to its end; returns its code and all that it said."""
        return ended(self.start(recipe, *arguments, cwd=cwd, **variables))

    def calls(self, program: str) -> list[list[str]]:
        """The arguments of every call of a stand-in so far."""
        file = self.path / "calls.jsonl"
        calls = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        return [arguments for name, *arguments in calls if name == program]

    def starts(self, who: str) -> list[list[str]]:
        """The lines of every start of the stub trainer on a host, `NAME-HOST`: arguments, then MEGASCALE variables."""
        files = [file for file in (self.path / "starts").glob(f"{who}-*") if file.suffix != ".new"]
        return [file.read_text().splitlines() for file in sorted(files, key=lambda file: int(file.name.split("-")[-1]))]

    def doctors(self, who: str) -> list[str]:
        """The words of every doctor that a host has run; all leave with what the file `ill` says."""
        file = self.path / "doctors" / who
        return [line.strip() for line in file.read_text().splitlines()] if file.exists() else []

    def slices(self) -> list[str]:
        return sorted(folder.name for folder in (self.path / "slices").iterdir())

    def preempt(self, name: str, *, grace: float = 0.0) -> None:
        """Takes a slice away as Google does: a signal to everything on it, and after `grace` seconds power off."""
        folder = self.path / "slices" / name
        (folder / "state").write_text("SUSPENDING")
        if grace:
            kill_all(folder, signal.SIGTERM)
            end = time.monotonic() + grace
            while any(processes(folder)) and time.monotonic() < end:
                time.sleep(0.1)
        kill_all(folder, signal.SIGKILL)
        (folder / "state").write_text("SUSPENDED")

    def drain_pods(self) -> None:
        """Takes the nodes of all pods away: SIGTERM to each container's first process, and to nothing else."""
        for process, _ in processes(self.path / "pods"):
            if (process / "cmdline").read_bytes().split(b"\0")[2].startswith(b"_sigterm"):
                os.kill(int(process.name), signal.SIGTERM)

    def close(self) -> None:
        kill_all(self.path, signal.SIGKILL)


def ended(process: subprocess.Popen) -> tuple[int, str]:
    out, err = process.communicate(timeout=HANG)
    return process.returncode, out + err


def wait_for(happened: Callable[[], object], seconds: float = 60.0) -> None:
    """Waits until `happened()`; AssertionError when it does not."""
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


def read_settings(cloud: Path) -> dict:
    return json.loads((cloud / "settings.json").read_text())


def processes(folder: Path) -> Iterator[tuple[Path, Path]]:
    """Yields the entry in /proc and the home of every process whose home lies in `folder`: started by the stand-ins."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            variables = (process / "environ").read_bytes().split(b"\0")
        except OSError:  # it ended meanwhile, or is another user's
            continue
        home = next((Path(os.fsdecode(line[5:])) for line in variables if line.startswith(b"HOME=")), None)
        if home and (home == folder or folder in home.parents):
            yield process, home


def kill_all(folder: Path, number: signal.Signals) -> None:
    for process, _ in processes(folder):
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(process.name), number)


def flag(arguments: Sequence[str], name: str, default: str = "") -> str:
    """The value of `--name value` or `--name=value`."""
    for place, argument in enumerate(arguments):
        if argument == name:
            return arguments[place + 1]
        if argument.startswith(f"{name}="):
            return argument.partition("=")[2]
    return default


def shell(cloud: Path, home: Path, who: str, command: str, **variables: str) -> int:
    """Runs a command on a host: nothing of the caller's environment, the host's own home and programs."""
    settings = read_settings(cloud)
    home.mkdir(parents=True, exist_ok=True)
    path = f"{cloud / 'host_bin'}:/usr/bin:/bin"
    bare = (
        {"PATH": path, "HOME": str(home), "CLOUD": str(cloud), "WHO": who} | settings.get("variables", {}) | variables
    )
    cwd = settings.get("cwd") or home
    return subprocess.run(["bash", "-c", command], env=bare, cwd=cwd, stdin=subprocess.DEVNULL, check=False).returncode


# Programs.


def gcloud(cloud: Path, arguments: list[str]) -> int:
    if said := read_settings(cloud).get("login"):
        print(f"the login {said}", file=sys.stderr)
        return 1
    match arguments:
        case ["storage", "buckets", "describe", *_]:
            print(read_settings(cloud).get("namespace", ""))
            return 0
        case ["storage", "rsync", "--recursive", source, target]:
            shutil.copytree(cloud / source.replace("gs://", "buckets/"), target, dirs_exist_ok=True)
            return 0
        case ["compute", "tpus", "queued-resources", action, name, *rest]:
            return queued_resource(cloud, action, cloud / "slices" / name, rest)
        case ["compute", "tpus", "tpu-vm", "scp", source, target, *_]:
            name, _, place = target.partition(":")
            for home in sorted((cloud / "slices" / name).glob("[0-9]*")):
                shutil.copy(source, home / place)
            return 0
        case ["compute", "tpus", "tpu-vm", "ssh", name, *rest]:
            folder, worker = cloud / "slices" / name, flag(rest, "--worker", "0")
            homes = sorted(folder.glob("[0-9]*")) if worker == "all" else [folder / worker]
            if not folder.exists() or (folder / "state").read_text() != "ACTIVE":
                print(f"{name} cannot be reached", file=sys.stderr)
                return 255
            command = flag(rest, "--command")
            settings = read_settings(cloud).get("host_variables", {})
            codes = [
                shell(cloud, home, f"{name}-{home.name}", command, **settings.get(home.name, {})) for home in homes
            ]
            return max(codes)
        case ["compute", "tpus", "tpu-vm", "describe", *_]:
            print("10.0.0.2")
            return 0
    print(f"gcloud has no {arguments}", file=sys.stderr)
    return 2


def queued_resource(cloud: Path, action: str, folder: Path, arguments: Sequence[str]) -> int:
    settings = read_settings(cloud)
    if action == "create":
        if folder.exists():
            print(f"{folder.name} exists already", file=sys.stderr)
            return 1
        for host in range(settings["hosts"]):
            (folder / str(host)).mkdir(parents=True)
        # Some requests are not met at once: each look at one of these takes the next of its states.
        (folder / "state").write_text(settings.get("create_state", "WAITING_FOR_RESOURCES"))
        return 0
    if not folder.exists():
        print(f"{folder.name} was not found", file=sys.stderr)
        return 1
    if action == "delete":
        kill_all(folder, signal.SIGKILL)
        shutil.rmtree(folder)
        return 0
    state = (folder / "state").read_text()
    print(state)
    if state == "WAITING_FOR_RESOURCES":
        (folder / "state").write_text("ACTIVE")
    return 0


def xpk(cloud: Path, arguments: list[str]) -> int:
    """Runs the workload's hosts as processes, and starts them anew as xpk's JobSet does."""
    if arguments[:2] != ["workload", "create"]:
        return 0
    settings, command = read_settings(cloud), flag(arguments, "--command")
    for _ in range(int(flag(arguments, "--max-restarts", "0")) + 1):
        # As xpk's container does: a shell around the command that hands SIGTERM on.
        wrapped = f"_sigterm() {{ kill -SIGTERM $! 2>/dev/null; }}; trap _sigterm SIGTERM; ({command}) & P=$!; "
        wrapped += "while kill -0 $P 2>/dev/null; do sleep 0.05; done; wait $P"
        programs = [sys.executable, "-I", "-S", __file__, "pod"]
        pods = [subprocess.Popen([*programs, str(host), wrapped], env=os.environ) for host in range(settings["hosts"])]
        codes = [pod.wait() for pod in pods]
        print(f"codes {codes}")
        if not any(codes):
            return 0
        # Any other code ends the workload.
        if any(code and code != 42 and not 127 <= code <= 255 for code in codes):
            return 1
    return 1


def pod(cloud: Path, arguments: list[str]) -> int:
    """One container of the image that the docker stand-in built; `cwd` of the settings is its WORKDIR."""
    host, command = arguments
    settings = read_settings(cloud).get("host_variables", {})
    return shell(cloud, cloud / "pods" / host, f"pod-{host}", command, **settings.get(host, {}))


def docker(cloud: Path, arguments: list[str]) -> int:
    """Builds an image as a folder: the Dockerfile's COPY and RUN lines for real, but for packages of the system."""
    if arguments[0] != "build":
        return 0
    image, values = cloud / "image", dict(pair.split("=", 1) for pair in all_flags(arguments, "--build-arg"))
    for line in Path(flag(arguments, "--file")).read_text().splitlines():
        word, _, rest = line.partition(" ")
        if word == "COPY":
            ignored = shutil.ignore_patterns(".git", ".venv", "data", "runs", "__pycache__", ".ruff_cache")
            shutil.copytree(arguments[-1], image, ignore=ignored, dirs_exist_ok=True)
        elif word == "WORKDIR":
            Cloud.set(_at(cloud), cwd=str(image))
        elif word == "RUN" and not rest.startswith("apt-get"):
            for name, value in values.items():
                rest = rest.replace(f"${{{name}}}", value)
            if code := shell(cloud, cloud / "builder", "builder", rest):
                return code
    return 0


def _at(cloud: Path) -> Cloud:
    """The cloud of a folder that exists."""
    found = object.__new__(Cloud)
    found.path = cloud
    return found


def all_flags(arguments: Sequence[str], name: str) -> list[str]:
    return [arguments[place + 1] for place, argument in enumerate(arguments) if argument == name]


def srun(cloud: Path, arguments: list[str]) -> int:
    """Starts the tasks of a step on this machine, hands SIGTERM on, and leaves with the highest code."""
    while arguments and arguments[0].startswith("--"):
        del arguments[0]
    settings = read_settings(cloud)
    tasks = []
    for task in range(settings["hosts"]):
        own = {"WHO": f"task-{task}", "SLURM_PROCID": str(task), "SLURM_LOCALID": str(task)}
        own |= {"SLURM_NTASKS": str(settings["hosts"]), "SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_NUM_TASKS": "2"}
        tasks.append(subprocess.Popen(arguments, env=os.environ | own | settings.get("variables", {})))
    signal.signal(signal.SIGTERM, lambda number, frame: [task.terminate() for task in tasks])
    return max(task.wait() for task in tasks)


def gcsfuse(cloud: Path, arguments: list[str]) -> int:
    Path(os.environ["HOME"], "mounted").write_text(" ".join(arguments))
    return 0


def sudo(cloud: Path, arguments: list[str]) -> int:
    # /mnt is not the tests' to change.
    return 0


def mountpoint(cloud: Path, arguments: list[str]) -> int:
    return 0 if Path(os.environ["HOME"], "mounted").exists() else 1


def curl(cloud: Path, arguments: list[str]) -> int:
    """The installer of uv: a script that puts the stub where it is told."""
    print(f'mkdir -p "$UV_INSTALL_DIR" && cp {cloud / "uv_stub"} "$UV_INSTALL_DIR/uv" && chmod +x "$UV_INSTALL_DIR/uv"')
    return 0


def nvidia_smi(cloud: Path, arguments: list[str]) -> int:
    print("\n".join(f"GPU {number}: a stand-in" for number in range(4)))
    return 0


def scontrol(cloud: Path, arguments: list[str]) -> int:
    return 0


def main() -> int:
    """One call of a stand-in: the program's name, then its arguments."""
    program, *arguments = sys.argv[1:]
    cloud = Path(os.environ["CLOUD"])
    # Two programs may write at once.
    with (cloud / "calls.jsonl").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(json.dumps([program, *arguments]) + "\n")
    return globals()[program.replace("-", "_")](cloud, arguments)


if __name__ == "__main__":
    sys.exit(main())
