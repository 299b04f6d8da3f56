"""Which share of the loss does each source of a mixture have?

    python benchmarks/loss_shares.py [--json] [--root data/sample]

For configs/tiny.py and the tiny stages from the index of the sample data (built at --root where it is missing): what a
run's start table and `baichuan-omni data stats --config` tell. For the released sizes, whose data are
yours, from the lengths in `ASSUMED`. The peer is the same mixture as 0.1.0 weighed it: shares of documents, each
counting by its tokens, the audio loss in full whatever there is of it. Value: the most that a source's share of the
loss is away from its share in the configuration, in points of a hundred; a goal only where the configuration gives
shares of the loss. `note` has all shares and, of released sizes, the part of visual tokens beside what a row has room
for. Pure arithmetic.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from rows import emit, row

from baichuan_omni_jax.config import DataConfig, RunConfig, load_run_config, resolve_model
from baichuan_omni_jax.config.loss_shares import POWERS, LossShare, SourceMeans, predict_shares
from data_pipelines.pipeline import open_pipeline, prepare_sample

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
STAGES = ("image_text_1", "image_text_2", "image_audio_text_1", "image_audio_text_2", "omni_64k", "sft")
CLOSE = 1.0
"""Points that a share may be off: the audio levels above the first have no end frames."""
# Of one document: text targets, other text, audio frames to predict, frames heard, visual tokens.
ASSUMED = {
    "image_captions": (60, 10, 0, 0, 600),
    "ocr": (250, 20, 0, 0, 1200),
    "charts": (150, 20, 0, 0, 900),
    "image_qa": (40, 30, 0, 0, 600),
    "interleaved": (900, 0, 0, 0, 1500),
    "text": (1200, 0, 0, 0, 0),
    "asr": (40, 10, 0, 125, 0),
    "tts": (2, 40, 126, 0, 0),
    "aqa": (60, 10, 0, 100, 0),
    "intlv": (150, 0, 0, 300, 0),
    "itts": (100, 50, 250, 0, 0),
    "image_audio_text": (60, 10, 60, 80, 600),
    "video_audio_text": (60, 10, 60, 80, 2400),
    "video_captions": (120, 10, 0, 0, 2400),
    "video_qa": (30, 30, 0, 0, 2400),
    "sft_text": (250, 100, 0, 0, 0),
    "sft_image": (150, 50, 0, 0, 600),
    "sft_video": (80, 50, 0, 0, 2400),
    "sft_audio": (60, 20, 130, 80, 0),
    "sft_omni": (80, 30, 65, 80, 1500),
}


def before(run: RunConfig) -> RunConfig:
    """The run as 0.1.0 weighed it."""
    sources = tuple(replace(source, loss_weight=1.0) for source in run.data.mixture)
    data = replace(run.data, mixture=sources, weights_by="documents")
    return replace(run, data=data, train=replace(run.train, audio_full_ratio=0.0, document_weighting="token"))


def assumed_means(run: RunConfig) -> list[SourceMeans]:
    """The sources with every document of the assumed length."""
    power, means = POWERS[run.train.document_weighting], []
    for source in run.data.mixture:
        text, other, audio, heard, visual = ASSUMED[source.name]
        weigh = lambda count: source.loss_weight * count ** (1.0 - power) if count else 0.0  # noqa: B023, E731
        tokens = text + other + audio + heard + visual
        means.append(SourceMeans(source.name, source.weight, tokens, text + audio, weigh(text), weigh(audio)))
    return means


def visual_share(shares: list[LossShare]) -> float:
    """Visual tokens of all tokens, of assumed lengths."""
    lengths = [
        (share.documents * ASSUMED[share.name][4], share.documents * sum(ASSUMED[share.name])) for share in shares
    ]
    return sum(visual for visual, _ in lengths) / sum(tokens for _, tokens in lengths)


def measured(run: RunConfig, root: Path) -> list[LossShare]:
    """From the index of the sample data."""
    data: DataConfig = replace(run.data, root=str(root), workers=0)
    prepare_sample(data)
    weighting = run.train.document_weighting
    return open_pipeline(data, resolve_model(run.model), weighting=weighting).loss_shares(run.train)


def furthest(shares: list[LossShare], run: RunConfig) -> float:
    """Points between a source's share of the loss and its weight in the mixture, of the source furthest off."""
    whole = sum(source.weight for source in run.data.mixture)
    pairs = zip(shares, run.data.mixture, strict=True)
    return 100 * max(abs(share.loss - source.weight / whole) for share, source in pairs)


def told(shares: list[LossShare]) -> str:
    return ", ".join(f"{share.name} {100 * share.loss:.1f}" for share in shares)


def compare(name: str, run: RunConfig, root: Path | None) -> dict:
    def shares_of(run: RunConfig) -> list[LossShare]:
        return measured(run, root) if root else predict_shares(assumed_means(run), run.data.weights_by, run.train)

    now, old = shares_of(run), shares_of(before(run))
    note = f"before: {told(old)}; now: {told(now)}"
    if root is None and "vision" in run.branches:
        budgets = run.data.budgets
        room = budgets.patches / 4 / budgets.tokens
        note += f"; visual of all tokens {visual_share(old):.2f} before, {visual_share(now):.2f} now, room {room:.2f}"
    value, peer = furthest(now, run), furthest(old, run)
    kind = "assumed lengths" if root is None else "sample data"
    compared = {"peer": "0.1.0", "peer_value": round(peer, 2), "note": note}
    if run.data.weights_by == "trainable":
        compared |= {"goal": f"<= {CLOSE:g}", "ok": value <= CLOSE}
    return row(f"{name} ({kind})", round(value, 2), "points off", **compared)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--root", type=Path, default=Path("data/sample"))
    options = parser.parse_args()
    load = lambda name: load_run_config(CONFIGS / f"{name}.py")  # noqa: E731
    rows = [compare(name, load(name), options.root) for name in ("tiny", *(f"{stage}_tiny" for stage in STAGES))]
    rows += [compare(stage, load(stage), None) for stage in STAGES]
    return emit(rows, options.json)


if __name__ == "__main__":
    sys.exit(main())
