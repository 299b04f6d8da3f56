"""A fixtures folder: its configuration, its weights in our modules, its golden files, and what came of each tensor."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array

from baichuan_omni_jax.branches import VOCODER_BRANCH
from baichuan_omni_jax.checkpoint import abstract_branches
from baichuan_omni_jax.checkpoint.branches import CONFIG, VOCODER_CONFIG
from baichuan_omni_jax.config import MeshConfig, OmniConfig, read_hf
from baichuan_omni_jax.config.vocoder import VocoderConfig, read_vocoder_config
from baichuan_omni_jax.convert import (
    SafetensorsFile,
    branch_rules,
    load_branch_from_safetensors,
    open_weights,
    plan_to_jax,
)
from baichuan_omni_jax.convert.files import VOCODER
from baichuan_omni_jax.convert.safetensors_io import TensorInfo, TensorSource
from baichuan_omni_jax.errors import ConfigError
from baichuan_omni_jax.nn.param import ComputePolicy, split_as
from baichuan_omni_jax.sharding import make_mesh

# Of the reference's largest magnitude. fp32 in another order gives about 1e-6, a wrong epsilon 3e-6.
TOLERANCE = 2e-5


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What came of holding one tensor of ours against the reference: a line of the report."""

    check: str
    tensor: str
    max_abs_error: float
    relative_error: float  # of the reference's largest magnitude
    tolerance: float  # the largest relative error that passes
    note: str = ""

    @property
    def passed(self) -> bool:
        """Returns whether the error is within the tolerance; a NaN never is."""
        return self.relative_error <= self.tolerance


class Golden:
    """The tensors of one check. `comparisons` is the report, with a failure for each tensor that nothing looked at.

    Raises ConfigError when the file cannot be read.
    """

    def __init__(self, check: str, path: Path):
        self.check, self._file = check, SafetensorsFile(path)
        self._used: set[str] = set()
        self._comparisons: list[Comparison] = []

    @property
    def names(self) -> list[str]:
        """Lists the file's tensors."""
        return list(self._file.infos)

    def input(self, name: str) -> np.ndarray:
        """Reads an input of the check, fp32 or int32. Raises ConfigError when the file lacks it."""
        self._used.add(name)
        return self._read(name)

    def items(self, name: str) -> Iterable[int]:
        """Counts the tensors called `NAME_0`, `NAME_1`, … Raises ConfigError when there are none."""
        # Numbered from 0 without gaps.
        count = 0
        while f"{name}_{count}" in self._file.infos:
            count += 1
        if not count:
            raise ConfigError(f"{self._file.path} lacks tensor {name}_0")
        return range(count)

    def reference(self, name: str) -> np.ndarray:
        """Reads an output, for a check that goes on from it; it is still to be compared."""
        return self._read(name)

    def compare(self, name: str, ours: ArrayLike, tolerance: float = TOLERANCE, note: str = "") -> None:
        """Compares our values with tensor `name`."""
        self._used.add(name)
        self.compare_part(name, ours, self._read(name), tolerance, note)

    def compare_rows(self, name: str, ours: ArrayLike, rows: ArrayLike) -> None:
        """Compares as `compare` does, where the mask `rows` is true; elsewhere the reference means nothing."""
        self._used.add(name)
        # Shapes that differ are reported by `compare_part`; a mask of another shape could not be applied.
        rows, ours, reference = np.asarray(rows, bool), np.asarray(ours), self._read(name)
        if ours.shape != reference.shape:
            self.compare_part(name, ours, reference, TOLERANCE, "")
        else:
            self.compare_part(name, ours[rows], reference[rows], TOLERANCE, "")

    def equal(self, name: str, ours: ArrayLike, note: str = "") -> None:
        """Compares our whole numbers (codes, ids, lengths) with tensor `name`: they must be identical."""
        self.compare(name, ours, 0.0, note)

    def compare_part(self, label: str, ours: ArrayLike, reference: np.ndarray, tolerance: float, note: str) -> None:
        """Adds a comparison under any label."""
        self._comparisons.append(compared(self.check, label, ours, reference, tolerance, note))

    def comparisons(self) -> list[Comparison]:
        """Returns the report so far; a tensor that no check read or compared is a failure."""
        missed = [unchecked(self.check, name) for name in self._file.infos if name not in self._used]
        return [*self._comparisons, *missed]

    def _read(self, name: str) -> np.ndarray:
        if name not in self._file.infos:
            raise ConfigError(f"{self._file.path} lacks tensor {name}")
        x = self._file.read(name)
        return x.astype(np.int32 if x.dtype.kind in "iu" else np.float32)


def compared(
    check: str, tensor: str, ours: ArrayLike, reference: np.ndarray, tolerance: float = TOLERANCE, note: str = ""
) -> Comparison:
    """Compares our values with a reference."""
    ours = np.asarray(ours)
    row = Comparison(check=check, tensor=tensor, max_abs_error=0.0, relative_error=0.0, tolerance=tolerance, note=note)
    if ours.shape != reference.shape:
        shapes = f"shape {list(ours.shape)}, not {list(reference.shape)}"
        return replace(row, max_abs_error=np.inf, relative_error=np.inf, note=shapes)
    if not reference.size:
        return row
    # In double precision, so that whole numbers keep all their digits; a NaN of ours fails every tolerance.
    error = float(np.abs(ours.astype(np.float64) - reference.astype(np.float64)).max())
    largest = float(np.abs(reference.astype(np.float64)).max())
    return replace(row, max_abs_error=error, relative_error=error / largest if largest else error)


def unchecked(check: str, name: str) -> Comparison:
    """Returns the failure of a golden tensor that nothing was compared with."""
    return Comparison(
        check=check,
        tensor=name,
        max_abs_error=np.inf,
        relative_error=np.inf,
        tolerance=0.0,
        note="not checked",
    )


# Small blocks, so that short rows too are made of several.
COMPUTE = ComputePolicy(remat="none", attention_block=64)
_NOT_GOLDEN = (VOCODER, "model*.safetensors")


@contextmanager
def exact_arithmetic() -> Iterator[None]:
    """Sets one device and products in full fp32: what every check is run in."""
    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])), jax.default_matmul_precision("highest"):
        yield


def as_rows(*arrays: Array) -> list[Array]:
    """Places arrays (b, t, …) as the language model wants tokens; inside a jitted function."""
    return [split_as(x, COMPUTE, "batch", "length") for x in arrays]


def as_media(*arrays: Array) -> list[Array]:
    """Places arrays (b, m, …) as media and their slots are."""
    return [split_as(x, COMPUTE, "batch", "media") for x in arrays]


class Fixtures:
    """`config.json`, `model.safetensors`, `vocoder.safetensors`, `vocoder_config.json` and golden files of a folder.

    Modules are converted when they are first needed, and kept. Raises ConfigError naming the file that is missing,
    damaged, or does not fit the tables.
    """

    def __init__(self, folder: Path | str):
        self.folder = Path(folder)
        self.config: OmniConfig = read_hf(self.folder / CONFIG)
        self.vocoder_config: VocoderConfig = read_vocoder_config(self.folder / VOCODER_CONFIG)
        self._weights: TensorSource = open_weights(self.folder)
        self.vocoder_weights: TensorSource = SafetensorsFile(self.folder / VOCODER)
        # Refuses weights that the tables do not cover, which loading by branch would pass over.
        plan_to_jax(self.folder, self.folder / VOCODER)
        self._tables = branch_rules(self.config, self.vocoder_config)
        # Made on no mesh, so that parameters are placed on the one in use when they are loaded.
        self._abstract = abstract_branches(self.config, self.vocoder_config, compute=COMPUTE)
        self._modules: dict[str, Any] = {}

    def branch(self, name: str) -> Any:
        """Returns the branch's module with the folder's weights, fp32."""
        if name not in self._modules:
            source = self.vocoder_weights if name == VOCODER_BRANCH else self._weights
            self._modules[name] = self._load(name, source)
        return self._modules[name]

    def vocoder_with(self, replaced: Mapping[str, np.ndarray]) -> Any:
        """Returns the vocoder with some of its tensors (by their names in the file) replaced."""
        if not replaced:
            return self.branch(VOCODER_BRANCH)
        return self._load(VOCODER_BRANCH, _Overlay(self.vocoder_weights, replaced))

    def golden(self, name: str) -> Golden:
        """Opens the file `NAME.safetensors`. Raises ConfigError when it is missing or damaged."""
        return Golden(name, self.folder / f"{name}.safetensors")

    def golden_names(self) -> list[str]:
        """Lists every golden file of the folder, known or not."""
        paths = sorted(self.folder.glob("*.safetensors"))
        return [path.stem for path in paths if not any(path.match(pattern) for pattern in _NOT_GOLDEN)]

    def _load(self, name: str, source: TensorSource) -> Any:
        return load_branch_from_safetensors(
            source, self._tables[name], self._abstract[name], branch=name, dtype=jnp.float32
        )


class _Overlay:
    """Tensors of a source, some of them replaced."""

    def __init__(self, source: TensorSource, replaced: Mapping[str, np.ndarray]):
        self.location, self._source, self._replaced = source.location, source, replaced
        self.infos = {**source.infos, **{name: TensorInfo(x.shape, x.dtype) for name, x in replaced.items()}}

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        if name not in self._replaced:
            return self._source.read(name, rows)
        return self._replaced[name] if rows is None else self._replaced[name][rows]
