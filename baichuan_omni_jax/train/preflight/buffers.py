"""The largest temporaries of a compiled program, read off the files that XLA dumps beside its HLO text."""

import re
from collections import defaultdict
from dataclasses import dataclass

_VALUE = re.compile(r"^ value: <\d+ ([\w.\-]+)[^>]*> \(size=(\d+),offset=(\d+)\): (\w+\[[\d,]*\])")


@dataclass(frozen=True)
class Temporary:
    """A place in the space of temporaries and its largest user: array, and the operation's name in the program."""

    bytes: int
    array: str
    scope: str


def largest_temporaries(assignment: str, hlo: str, count: int = 12) -> list[Temporary]:
    """The largest arrays of the temporaries' space that share no byte with each other, largest first.

    `assignment` is XLA's `*buffer-assignment.txt`; arrays at one place live at different times, the largest is named.
    Empty where the text is of another form.
    """
    found, taken, places = [], [], defaultdict(list)
    for size, start, array, name in _values(assignment):
        places[size, start].append((array, name))
    for size, start in sorted(places, reverse=True):
        if all(start + size <= low or start >= high for low, high in taken):
            taken.append((start, start + size))
            users = places[size, start]
            # Buffers that a loop fills are allocated by operations without a name: another user has one.
            scopes = [scope for _, name in users if (scope := _scope(hlo, name))]
            found.append(Temporary(size, users[0][0], scopes[0] if scopes else ""))
            if len(found) == count:
                break
    return found


def _values(assignment: str) -> list[tuple[int, int, str, str]]:
    """(bytes, offset, array, instruction) of what lies in the temporaries' space of the main memory."""
    values, inside = [], False
    for line in assignment.splitlines():
        if line.startswith("allocation "):
            inside = "preallocated-temp" in line and ", color" not in line
        elif inside and (match := _VALUE.match(line)):
            values.append((int(match[2]), int(match[3]), match[4], match[1]))
    return values


def _scope(hlo: str, instruction: str) -> str:
    line = re.search(rf"^\s*(?:ROOT )?%?{re.escape(instruction)} = .*$", hlo, re.MULTILINE)
    name = re.search(r'op_name="([^"]*)"', line[0]) if line else None
    return name[1] if name else ""
