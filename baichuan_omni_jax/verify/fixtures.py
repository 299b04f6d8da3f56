"""A fixtures folder: its configuration, its golden files, and its weights in our modules, by the conversion tables."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from baichuan_omni_jax.branches import VOCODER_BRANCH, abstract_branches
from baichuan_omni_jax.checkpoint.branches import CONFIG, VOCODER_CONFIG
from baichuan_omni_jax.config import MeshConfig, OmniConfig, read_hf
from baichuan_omni_jax.convert import (
    SafetensorsFile,
    branch_rules,
    load_branch_from_safetensors,
    open_weights,
    plan_to_jax,
)
from baichuan_omni_jax.convert.files import VOCODER
from baichuan_omni_jax.convert.safetensors_io import TensorInfo, TensorSource
from baichuan_omni_jax.nn.param import ComputePolicy, split_as
from baichuan_omni_jax.sharding import make_mesh
from baichuan_omni_jax.verify.golden import Golden
from baichuan_omni_jax.vocoder.config import VocoderConfig, read_vocoder_config

# Small blocks, so that short rows too are made of several.
COMPUTE = ComputePolicy(remat="none", attention_block=64)
_NOT_GOLDEN = (VOCODER, "model*.safetensors")


@contextmanager
def exact_arithmetic() -> Iterator[None]:
    """One device, products in full fp32: what every check is run in."""
    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])), jax.default_matmul_precision("highest"):
        yield


def as_rows(*arrays: Array) -> list[Array]:
    """Arrays (b, t, …) placed as the language model wants tokens; inside a jitted function."""
    return [split_as(x, COMPUTE, "batch", "length") for x in arrays]


def as_media(*arrays: Array) -> list[Array]:
    """Arrays (b, m, …) placed as media and their slots are."""
    return [split_as(x, COMPUTE, "batch", "media") for x in arrays]


class Fixtures:
    """`config.json`, `model.safetensors`, `vocoder.safetensors`, `vocoder_config.json` and golden files of a folder.

    Modules are converted when they are first asked for, and kept. Raises ConfigError naming the file that is missing,
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
        """The branch's module with the folder's weights, fp32."""
        if name not in self._modules:
            source = self.vocoder_weights if name == VOCODER_BRANCH else self._weights
            self._modules[name] = self._load(name, source)
        return self._modules[name]

    def vocoder_with(self, replaced: Mapping[str, np.ndarray]) -> Any:
        """The vocoder with some of its tensors (by their names in the file) replaced."""
        if not replaced:
            return self.branch(VOCODER_BRANCH)
        return self._load(VOCODER_BRANCH, _Overlay(self.vocoder_weights, replaced))

    def golden(self, name: str) -> Golden:
        """The file `NAME.safetensors`. Raises ConfigError when it is missing or damaged."""
        return Golden(name, self.folder / f"{name}.safetensors")

    def golden_names(self) -> list[str]:
        """Every golden file of the folder, known or not."""
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
