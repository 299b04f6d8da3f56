"""A file of golden tensors: inputs that a check reads, outputs that it must compare, and what came of each."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jax.typing import ArrayLike

from baichuan_omni_jax.convert import SafetensorsFile
from baichuan_omni_jax.errors import ConfigError

# Of the reference's largest magnitude. fp32 in another order gives about 1e-6, a wrong epsilon 3e-6.
TOLERANCE = 2e-5


@dataclass(frozen=True, kw_only=True)
class Row:
    """A line of the report. `relative_error` is of the reference's largest magnitude and what `tolerance` bounds."""

    check: str
    tensor: str
    max_abs_error: float
    relative_error: float
    tolerance: float
    note: str = ""

    @property
    def passed(self) -> bool:
        return self.relative_error <= self.tolerance


class Golden:
    """The tensors of one check. `rows` is the report: one a comparison, one a tensor that nothing looked at.

    Raises ConfigError when the file cannot be read.
    """

    def __init__(self, check: str, path: Path):
        self.check, self._file = check, SafetensorsFile(path)
        self._seen: set[str] = set()
        self._rows: list[Row] = []

    @property
    def names(self) -> list[str]:
        return list(self._file.infos)

    def input(self, name: str) -> np.ndarray:
        """An input of the check, fp32 or int32. Raises ConfigError when the file lacks it."""
        self._seen.add(name)
        return self._read(name)

    def items(self, name: str) -> Iterable[int]:
        """The numbers of tensors called `NAME_0`, `NAME_1`, … Raises ConfigError when there are none."""
        count = 0
        while f"{name}_{count}" in self._file.infos:
            count += 1
        if not count:
            raise ConfigError(f"{self._file.path} lacks tensor {name}_0")
        return range(count)

    def reference(self, name: str) -> np.ndarray:
        """An output, for a check that starts again from it; it is still to be compared."""
        return self._read(name)

    def compare(self, name: str, ours: ArrayLike, tolerance: float = TOLERANCE, note: str = "") -> None:
        """Holds our values against tensor `name`."""
        self._seen.add(name)
        self.compare_part(name, ours, self._read(name), tolerance, note)

    def compare_rows(self, name: str, ours: ArrayLike, rows: ArrayLike) -> None:
        """As `compare`, where the mask `rows` is true; elsewhere the reference means nothing."""
        self._seen.add(name)
        rows, ours, reference = np.asarray(rows, bool), np.asarray(ours), self._read(name)
        if ours.shape != reference.shape:
            self.compare_part(name, ours, reference, TOLERANCE, "")
        else:
            self.compare_part(name, ours[rows], reference[rows], TOLERANCE, "")

    def equal(self, name: str, ours: ArrayLike, note: str = "") -> None:
        """Holds our whole numbers (codes, ids, lengths) against tensor `name`: they must be identical."""
        self.compare(name, ours, 0.0, note)

    def compare_part(self, label: str, ours: ArrayLike, reference: np.ndarray, tolerance: float, note: str) -> None:
        """A line of the report under any label."""
        self._rows.append(compared(self.check, label, ours, reference, tolerance, note))

    def rows(self) -> list[Row]:
        """The report so far; a tensor that no check read or compared is a failure."""
        missed = [unchecked(self.check, name) for name in self._file.infos if name not in self._seen]
        return [*self._rows, *missed]

    def _read(self, name: str) -> np.ndarray:
        if name not in self._file.infos:
            raise ConfigError(f"{self._file.path} lacks tensor {name}")
        x = self._file.read(name)
        return x.astype(np.int32 if x.dtype.kind in "iu" else np.float32)


def compared(
    check: str, tensor: str, ours: ArrayLike, reference: np.ndarray, tolerance: float = TOLERANCE, note: str = ""
) -> Row:
    """The line of our values held against a reference."""
    ours = np.asarray(ours)
    row = Row(check=check, tensor=tensor, max_abs_error=0.0, relative_error=0.0, tolerance=tolerance, note=note)
    if ours.shape != reference.shape:
        shapes = f"shape {list(ours.shape)}, not {list(reference.shape)}"
        return replace(row, max_abs_error=np.inf, relative_error=np.inf, note=shapes)
    if not reference.size:
        return row
    # In double precision, so that whole numbers keep all their digits; a NaN of ours fails every tolerance.
    error = float(np.abs(ours.astype(np.float64) - reference.astype(np.float64)).max())
    largest = float(np.abs(reference.astype(np.float64)).max())
    return replace(row, max_abs_error=error, relative_error=error / largest if largest else error)


def unchecked(check: str, name: str) -> Row:
    """The line of a golden tensor that nothing was compared with."""
    return Row(check=check, tensor=name, max_abs_error=np.inf, relative_error=np.inf, tolerance=0.0, note="not checked")
