"""A `.pt` file of tensors: what the released vocoder comes as. Needs torch (the extra `parity`)."""

from pathlib import Path

import numpy as np

from baichuan_omni_jax.convert.safetensors_io import DTYPES, SafetensorsFile, TensorInfo
from baichuan_omni_jax.errors import ConfigError
from baichuan_omni_jax.storage import refuse_stand_in


class TorchFile:
    """The tensors of a flat state dict. Read with `weights_only=True`: no code of it runs. Raises ConfigError."""

    def __init__(self, path: Path):
        self.where = str(path)
        refuse_stand_in(path)
        try:
            import torch
        except ImportError as error:
            raise ConfigError(
                f"{path} needs torch: pip install 'baichuan_omni_jax[parity]', or give safetensors"
            ) from error
        try:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises whatever its parts raise
            first = str(error).strip().splitlines()[:1] or [type(error).__name__]
            raise ConfigError(f"{path} cannot be loaded with weights_only=True: {first[0]}") from error
        odd = [name for name, x in tensors.items() if not torch.is_tensor(x)] if isinstance(tensors, dict) else ["it"]
        if odd:
            raise ConfigError(f"{path} is not a flat dict of tensors: {', '.join(map(str, odd))}")
        self._arrays = {name: _to_numpy(tensor, torch) for name, tensor in tensors.items()}
        self.infos = {name: TensorInfo(x.shape, x.dtype) for name, x in self._arrays.items()}

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        return self._arrays[name][slice(None) if rows is None else rows]


def open_vocoder(path: Path) -> SafetensorsFile | TorchFile:
    """The vocoder's weights, by the file's ending. Raises ConfigError."""
    if path.suffix == ".safetensors":
        return SafetensorsFile(path)
    if path.suffix not in (".pt", ".pth"):
        raise ConfigError(f"vocoder {path} is neither .safetensors nor .pt")
    if not path.is_file():
        raise ConfigError(f"vocoder {path} is not there")
    return TorchFile(path)


def _to_numpy(tensor, torch) -> np.ndarray:
    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(DTYPES["BF16"])
    return tensor.numpy()
