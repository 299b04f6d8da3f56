"""PyTorch state dicts as our conversion reads them."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from baichuan_omni_jax.convert.safetensors_io import TensorInfo

Tensors = dict[str, np.ndarray]


@dataclass(frozen=True)
class Arrays:
    """A state dict as a source of a conversion."""

    values: Tensors
    location: str = "the state dict"

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        return {name: TensorInfo(x.shape, x.dtype) for name, x in self.values.items()}

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        return self.values[name][slice(None) if rows is None else rows]
