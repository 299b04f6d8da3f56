"""Figures of mels and of what an audio tokenizer does to audio (matplotlib, the extra `show`)."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.figure
import numpy as np
from jaxtyping import Float


def draw_mels(mels: Mapping[str, Float[np.ndarray, "_ mels"]], seconds: float, out: Path) -> None:
    """Draws each mel (frames, mels) of `seconds` a frame under its name into the file `out`; NaN stays blank."""
    figure = matplotlib.figure.Figure(figsize=(10, 2.2 * len(mels)), layout="constrained")
    low, high = min(map(np.nanmin, mels.values())), max(map(np.nanmax, mels.values()))
    strips = figure.subplots(len(mels), sharex=True, squeeze=False)[:, 0]
    for axes, (name, mel) in zip(strips, mels.items(), strict=True):
        extent = (0, len(mel) * seconds, 0, mel.shape[1])
        axes.imshow(mel.T, origin="lower", aspect="auto", extent=extent, vmin=low, vmax=high, interpolation="nearest")
        axes.set_ylabel(f"{name}\nmel filter")
    strips[-1].set_xlabel("seconds")
    figure.savefig(out, dpi=100)


_BLUE, _ORANGE = "#3b6ea5", "#d98032"

# A clip's name, its mel as recorded and as it came back.
Pair = tuple[str, Float[np.ndarray, "_ mels"], Float[np.ndarray, "_ mels"]]


def draw_tokenizer(
    pairs: Sequence[Pair], seconds: float, numbers: Mapping[str, float], sizes: Sequence[int], out: Path
) -> None:
    """Draws what a tokenizer does to clips, and how its levels are used.

    Args:
        pairs: clips with their mels before and after.
        seconds: of one frame.
        numbers: the scores `codes_used_qN` (a share), `perplexity_qN` (of codes), `mel_mae_qN` (with N + 1 levels) of
            every level, and `mel_mae_unquantised`.
        sizes: codes of each level's codebook.
        out: the file, of a format that matplotlib writes.
    """
    # Two strips a clip on one color scale, what is lost shows as a difference; below them the levels of the quantizer.
    rows = 2 * len(pairs)
    figure = matplotlib.figure.Figure(figsize=(11, 1.6 * rows + 3.2), layout="constrained")
    grid = figure.add_gridspec(rows + 1, 2, height_ratios=[*[1.6] * rows, 3.2])
    for place, (name, *mels) in enumerate(pairs):
        low, high = min(mel.min() for mel in mels), max(mel.max() for mel in mels)
        for below, (mel, what) in enumerate(zip(mels, ("recorded", "from its codes"), strict=True)):
            axes = figure.add_subplot(grid[2 * place + below, :])
            extent = (0, len(mel) * seconds, 0, mel.shape[1])
            axes.imshow(
                mel.T, origin="lower", aspect="auto", extent=extent, vmin=low, vmax=high, interpolation="nearest"
            )
            axes.set_xlim(0, max(map(len, mels)) * seconds)
            axes.set_ylabel("mel filter")
            axes.set_title(f"{name}, {what}", loc="left", fontsize=9)
            if below:
                axes.set_xlabel("seconds")
    # How many of each level's codes are used, and how evenly.
    levels = np.arange(len(sizes))
    axes = figure.add_subplot(grid[rows, 0])
    share = [100 * numbers[f"codes_used_q{q}"] for q in range(len(sizes))]
    even = [100 * numbers[f"perplexity_q{q}"] / sizes[q] for q in range(len(sizes))]
    axes.bar(levels - 0.2, share, 0.4, color=_BLUE, label="used at least once")
    axes.bar(levels + 0.2, even, 0.4, color=_ORANGE, label="perplexity")
    axes.set_xticks(levels, [f"{q + 1}\n{sizes[q]}" for q in range(len(sizes))])
    axes.set_xlabel("level, and its codes")
    axes.set_ylabel("% of the codes")
    axes.legend(fontsize=8)
    axes = figure.add_subplot(grid[rows, 1])
    # What every further level wins, beside the error without quantizing.
    errors = [numbers[f"mel_mae_q{q}"] for q in range(len(sizes))]
    axes.plot(levels + 1, errors, "o-", color=_BLUE, label="from codes")
    axes.axhline(numbers["mel_mae_unquantized"], color=_ORANGE, linestyle="--", label="not quantized")
    axes.set_xticks(levels + 1)
    axes.set_ylim(0, 1.2 * max(*errors, numbers["mel_mae_unquantized"]))
    axes.set_xlabel("levels kept")
    axes.set_ylabel("mel error (mean absolute)")
    axes.legend(fontsize=8)
    figure.savefig(out, dpi=100)
