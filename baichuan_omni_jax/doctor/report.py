"""What a check is and says, how hosts tell each other, and the order in which a machine is looked at.

A check is a function of `Setting` that yields lines. It may raise: that is a line too, so one broken part of a machine
never hides what the others have to say. Checks that run programs on devices come last, and are left out on every host
as soon as one host cannot start its devices, as the others would wait for it.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any, Literal

from baichuan_omni_jax.coordination import Hosts

Platform = Literal["cpu", "gpu", "tpu"]


class Verdict(StrEnum):
    """Of one line: as it should be, worth knowing, or in the way of a run."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True)
class Line:
    """One finding: what was looked at, the verdict and what was found; what to do about it; the numbers by name."""

    check: str
    verdict: Verdict
    text: str
    advice: str = ""
    values: Mapping[str, Any] = field(default_factory=dict)
    host: int = 0


@dataclass(frozen=True)
class Setting:
    """What checks are told: the workdir ("": none), the kind of device that must be there (None: what the machine looks
    like), and the hosts.
    """

    workdir: str = ""
    expect: Platform | None = None
    hosts: Hosts = field(default_factory=Hosts)


@dataclass(frozen=True)
class Check:
    """A check by its name. `on_devices`: runs programs on devices. `together`: on those of all hosts at once.

    `long` ones are left out by `doctor --short`.
    """

    name: str
    run: Callable[[Setting], Iterable[Line]]
    on_devices: bool = False
    together: bool = False
    long: bool = False


def examine(
    checks: Sequence[Check], setting: Setting, begin: Callable[[str], None] = lambda name: None
) -> Iterator[Line]:
    """Runs checks in order and yields their lines as they come.

    Args:
        checks: those on devices last, after the one called `devices`.
        setting: what they are told.
        begin: called with the name of each check that starts.

    Yields:
        Their lines, this host's. A check that raised is a line that fails.
    """
    usable = True
    for check in checks:
        if check.on_devices and not usable:
            continue
        begin(check.name)
        # Where the devices of all hosts work together, none may start alone: it would wait for the others without end.
        if check.together and (missing := silent_hosts(setting.hosts, f"before {check.name}")):
            yield Line(check.name, Verdict.FAIL, f"not tried: no word from {missing}", "look at that host's own report")
            continue
        failed = False
        for line in _lines_of(check, setting):
            failed |= line.verdict is Verdict.FAIL
            yield line
        # The devices either start on all hosts or are left alone on all.
        if check.name == "devices":
            told = setting.hosts.gather("devices", "no" if failed else "yes")
            bad = [f"host {host}" for host, text in enumerate(told) if text != "yes"]
            usable = not bad
            if bad:
                untried = join([later.name for later in checks if later.on_devices])
                where = f" on {join(bad)}" if setting.hosts.count > 1 else ""
                yield Line("devices", Verdict.WARN, f"not tried without devices{where}: {untried}")


def _lines_of(check: Check, setting: Setting) -> Iterator[Line]:
    try:
        yield from check.run(setting)
    # Whatever is wrong with a machine may show as any error; its first sentence is the finding.
    except Exception as error:
        yield Line(
            check.name,
            Verdict.FAIL,
            f"{type(error).__name__}: {first_sentence(error)}",
            "the check itself broke off: what it names is missing, broken or of a version that nobody has tried",
        )


def silent_hosts(hosts: Hosts, name: str) -> str:
    """Waits until every host is at this place; names those that did not come, "" where all did."""
    told = hosts.gather(name, "here")
    return join([f"host {host}" for host, text in enumerate(told) if text is None])


def lines_of_all_hosts(hosts: Hosts, lines: Sequence[Line]) -> list[Line]:
    """Collects every host's lines, by host; one that sent none has a line that fails."""
    found: list[Line] = []
    for host, text in enumerate(hosts.gather("lines", json.dumps([asdict(line) for line in lines]))):
        if text is None:
            advice = "see what it printed; start all hosts again once it is back"
            found.append(Line("hosts", Verdict.FAIL, f"host {host} sent no report", advice, host=host))
            continue
        for one in json.loads(text):
            found.append(Line(**{**one, "verdict": Verdict(one["verdict"]), "host": host}))
    return found


def first_sentence(error: BaseException) -> str:
    """Returns the first line of an error's message that says something, at most 300 characters of it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else "no message")[:300]


def join(names: Sequence[str]) -> str:
    """Joins names as a sentence has them.

    >>> join(["host 0", "host 2", "host 3"])
    'host 0, host 2 and host 3'
    """
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def sized(count: int | float) -> str:
    """Writes a number of bytes, or of bytes a second, with three digits and its unit.

    >>> sized(1536), sized(2.5e12)
    ('1.54 kB', '2.5 TB')
    """
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(count) < 1000 or unit == "TB":
            return f"{count:.3g} {unit}"
        count /= 1000
    raise AssertionError("unreachable")
