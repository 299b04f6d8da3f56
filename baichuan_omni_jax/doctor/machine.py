"""The machine: which devices are there and which JAX finds, their topology and memory; the host's memory and disks."""

import os
import resource
import shutil
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from baichuan_omni_jax.doctor.report import Line, Platform, Setting, Verdict, first_sentence, join, sized
from baichuan_omni_jax.flops.terms import chip_of

GIB = 2**30
# PCI: Google's number, and those of its TPUs; its network cards have others.
_GOOGLE, _TPUS = "0x1ae0", {"0x0027", "0x0056", "0x005e", "0x0062", "0x0063", "0x006f", "0x0076"}
# What JAX needs beside itself to drive the devices: any of these packages, and the extra that brings it.
_DRIVERS: dict[str, tuple[tuple[str, ...], str]] = {
    "tpu": (("libtpu",), "tpu"),
    "gpu": (("jax_cuda12_plugin", "jax_cuda13_plugin", "jax_rocm7_plugin"), "cuda"),
}
# Free space below which a run is soon in trouble: of the workdir's disk and of where temporary files go, and of the
# compilation cache; memory that loading a checkpoint and a few data workers take; what they hand rows over in.
ENOUGH_DISK, ENOUGH_SCRATCH, ENOUGH_MEMORY, ENOUGH_SHARED = 20 * GIB, 2 * GIB, 4 * GIB, GIB // 2
# Each data worker keeps up to 64 shards open.
ENOUGH_FILES = 1024


def expected_platform(expect: Platform | None, root: Path = Path("/")) -> tuple[Platform, str]:
    """Says what kind of device a run here would use, and how that is known. Starts no device.

    Args:
        expect: what the user says; None: `JAX_PLATFORMS`, else what the machine has.
        root: of the file system, where a machine's devices are listed.
    """
    if expect:
        return expect, "--expect"
    first = os.environ.get("JAX_PLATFORMS", "").partition(",")[0]
    if first:
        named: dict[str, Platform] = {"tpu": "tpu", "cuda": "gpu", "rocm": "gpu", "gpu": "gpu"}
        return named.get(first, "cpu"), f"JAX_PLATFORMS={os.environ['JAX_PLATFORMS']}"
    if chips := _tpu_chips(root):
        return "tpu", f"{chips} TPU chips on the PCI bus"
    if any((root / "dev" / name).exists() for name in ("nvidia0", "nvidiactl", "dxg", "kfd")):
        return "gpu", "a GPU among /dev"
    return "cpu", "no accelerator is to be seen"


def _tpu_chips(root: Path) -> int:
    """Counts TPU chips on the PCI bus; of older images, which hide it, the device files."""
    count = 0
    for vendor in root.glob("sys/bus/pci/devices/*/vendor"):
        try:
            count += vendor.read_text().strip() == _GOOGLE and (vendor.parent / "device").read_text().strip() in _TPUS
        except OSError:
            continue  # a device that went away, or that nobody may read
    return count or len(list(root.glob("dev/accel[0-9]*")))


def check_devices(setting: Setting) -> Iterator[Line]:
    """Starts JAX's devices; compares their kind with what the machine has, tells topology and memory."""
    expected, reason = expected_platform(setting.expect)

    # Before JAX, which would go on with the CPU in silence, or wait for its timeout.
    packages, extra = _DRIVERS.get(expected, ((), ""))
    missing = bool(packages) and not any(find_spec(name) for name in packages)
    told = setting.hosts.gather("drivers", "missing" if missing else "here")
    if missing:
        text = f"a {expected.upper()} is expected ({reason}), but {packages[0].replace('_', '-')} is not installed"
        yield Line("devices", Verdict.FAIL, text, f"pip install 'baichuan_omni_jax[{extra}]'")
        return
    # Devices of several hosts start together, and would wait for those that cannot.
    if without := [f"host {host}" for host, text in enumerate(told) if text != "here"]:
        advice = "look at the lines of that host"
        yield Line("devices", Verdict.FAIL, f"not started: {join(without)} cannot start devices", advice)
        return

    import jax

    try:
        devices = jax.devices()
    except RuntimeError as error:
        advice = "does another process use them (`fuser -v /dev/accel* /dev/vfio/* /dev/nvidia*`)? are there drivers?"
        yield Line("devices", Verdict.FAIL, f"JAX cannot start its devices: {first_sentence(error)}", advice)
        return
    found, kind = jax.default_backend(), devices[0].device_kind
    if found != expected:
        text = f"JAX runs on {found}, but a {expected.upper()} is expected ({reason})"
        yield Line(
            "devices", Verdict.FAIL, text, f"pip install 'baichuan_omni_jax[{extra}]', then look at JAX_PLATFORMS"
        )
        return

    # What they are and how they lie; peaks are known of listed chips alone.
    text = f"{len(devices)} x {kind} ({expected}){_topology(devices)}"
    values = {"platform": found, "kind": kind, "devices": len(devices), "local": jax.local_device_count()}
    if found == "cpu" or chip_of(kind):
        yield Line("devices", Verdict.OK, text, values=values)
    else:
        advice = "rates are told without a peak to hold them against; MFU is left out of a run's metrics"
        yield Line("devices", Verdict.WARN, f"{text}: a chip that is not listed", advice, values)
    yield from _memory_lines(jax.local_devices())


def _topology(devices: list) -> str:
    """Describes hosts, the chips' grid and slices, as far as there are any."""
    parts = []
    if len({device.process_index for device in devices}) > 1:
        parts.append(f"on {len({device.process_index for device in devices})} hosts")
    if coords := [device.coords for device in devices if getattr(device, "coords", None) is not None]:
        # Of one slice: coordinates of several slices repeat.
        parts.append("grid " + "x".join(str(1 + max(axis)) for axis in zip(*coords, strict=True)))
    slices = {getattr(device, "slice_index", 0) for device in devices}
    if len(slices) > 1:
        parts.append(f"{len(slices)} slices")
    return "".join(f", {part}" for part in parts)


def _memory_lines(devices: list) -> Iterator[Line]:
    """Each local device has its memory to itself, and as much as its kind should."""
    stats = [device.memory_stats() or {} for device in devices]
    limits = [each["bytes_limit"] for each in stats if "bytes_limit" in each]
    if not limits:
        return  # CPUs have none of their own
    chip = chip_of(devices[0].device_kind)
    text = f"{sized(min(limits))} each for programs"
    values = {"bytes_limit": limits, "bytes_in_use": [each.get("bytes_in_use", 0) for each in stats]}
    # JAX takes three quarters of a GPU's memory unless told otherwise: below that, somebody else is there.
    share = min(limits) / chip.hbm_bytes if chip else 1.0
    if share < (0.7 if devices[0].platform == "gpu" else 0.9):
        advice = "another process may hold the rest; on a GPU see nvidia-smi and XLA_PYTHON_CLIENT_MEM_FRACTION"
        yield Line("devices", Verdict.WARN, f"{text}, {share:.0%} of what the chip has", advice, values)
    else:
        yield Line("devices", Verdict.OK, text, values=values)


def check_host(setting: Setting) -> Iterator[Line]:
    """Tells cores and memory of this host, and whether data workers have what they hand rows over by."""
    cores, (total, available) = len(os.sched_getaffinity(0)), host_memory()
    text = f"{cores} cores, {sized(available)} of {sized(total)} memory free"
    values = {"cores": cores, "memory": total, "memory_available": available}
    if available < ENOUGH_MEMORY:
        advice = "reading a checkpoint takes as much as its largest tensors, each data worker a few rows of media"
        yield Line("host", Verdict.WARN, text, advice, values)
    else:
        yield Line("host", Verdict.OK, text, values=values)

    # Rows of worker processes come through shared memory, of which containers get 64 MB unless told otherwise.
    shared = Path("/dev/shm")
    if shared.is_dir() and (free := shutil.disk_usage(shared).free) < ENOUGH_SHARED:
        advice = "docker run --shm-size=8g (Kubernetes: an emptyDir of medium Memory at /dev/shm), or data.workers=0"
        yield Line(
            "host", Verdict.WARN, f"{sized(free)} free in /dev/shm, through which data workers send rows", advice
        )
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if 0 <= soft < ENOUGH_FILES:
        yield Line("host", Verdict.WARN, f"a process may open {soft} files", "ulimit -n 65536 before the run")
    # libtpu maps what it sends in huge pages: without them transfers and the start are slow.
    pages = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if expected_platform(setting.expect)[0] == "tpu" and pages.is_file() and "[always]" not in pages.read_text():
        advice = "sudo sh -c 'echo always > /sys/kernel/mm/transparent_hugepage/enabled'"
        yield Line("host", Verdict.WARN, "transparent huge pages are off: TPUs start and transfer slower", advice)


def host_memory(root: Path = Path("/")) -> tuple[int, int]:
    """Returns bytes of memory, and of it what is available: of a container's limit where that is less."""
    info = dict(line.split(":") for line in (root / "proc/meminfo").read_text().splitlines())
    total, available = (1024 * int(info[name].split()[0]) for name in ("MemTotal", "MemAvailable"))
    limit, used = root / "sys/fs/cgroup/memory.max", root / "sys/fs/cgroup/memory.current"
    if limit.is_file() and used.is_file() and (text := limit.read_text().strip()).isdigit() and int(text) < total:
        return int(text), min(available, max(int(text) - int(used.read_text()), 0))
    return total, available


def check_disks(setting: Setting) -> Iterator[Line]:
    """Tells the free space of the workdir, if it is on a disk, of temporary files and of the compilation cache."""
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR") or "~/.cache"
    places = [("temporary files", tempfile.gettempdir(), ENOUGH_SCRATCH), ("compiled programs", cache, ENOUGH_SCRATCH)]
    if setting.workdir:
        places.insert(0, ("the workdir", setting.workdir, ENOUGH_DISK))
    for what, name, enough in places:
        if "://" in name:
            continue  # a bucket has no end; the probe tells what it refuses
        # The folder that there already is: the workdir may be made by the run.
        path = Path(name).expanduser().absolute()
        path = next(folder for folder in (path, *path.parents) if folder.exists())
        usage = shutil.disk_usage(path)
        text = f"{sized(usage.free)} of {sized(usage.total)} free for {what} ({path})"
        values = {"path": str(path), "free": usage.free, "total": usage.total}
        if usage.free < enough:
            advice = "a checkpoint takes 12 bytes a parameter that trains, 4 for any other, and several are kept"
            advice = advice if what == "the workdir" else "make room: 2 GB are enough"
            yield Line("disk", Verdict.WARN, text, advice, values)
        else:
            yield Line("disk", Verdict.OK, text, values=values)
