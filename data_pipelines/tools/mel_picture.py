"""Pictures of mels, one above the other on the same scales. Imports matplotlib (the show extra)."""

from collections.abc import Mapping
from pathlib import Path

import matplotlib.figure
import numpy as np
from jaxtyping import Float


def draw_mels(mels: Mapping[str, Float[np.ndarray, "_ mels"]], seconds: float, out: Path) -> None:
    """Draws each mel (frames, mels) of `seconds` a frame under its name into the file `out`; NaN stays blank."""
    figure = matplotlib.figure.Figure(figsize=(10, 2.2 * len(mels)), layout="constrained")
    low, high = min(map(np.nanmin, mels.values())), max(map(np.nanmax, mels.values()))
    for axes, (name, mel) in zip(
        figure.subplots(len(mels), sharex=True, squeeze=False)[:, 0], mels.items(), strict=True
    ):
        extent = (0, len(mel) * seconds, 0, mel.shape[1])
        axes.imshow(mel.T, origin="lower", aspect="auto", extent=extent, vmin=low, vmax=high, interpolation="nearest")
        axes.set_ylabel(f"{name}\nmel filter")
    axes.set_xlabel("seconds")
    figure.savefig(out, dpi=100)
