"""How fast do data workers read, decode and pack documents with real media?

    python benchmarks/input.py [--json] [--data DIR] [--workers 2] [--epochs 6] [--repeats 3]

The sample data set's documents with media (photographs, films, speech), built into shards, read as a run would whose
step has the audio tokenizer in it: text, patches and log mels, with the released model's sizes of pictures and mels,
in rows of 2048 tokens, two a step. Peer: the same rows by a plain PyTorch DataLoader over the loose files
(`input_peer.py`), as many workers; what it gives is compared with ours. Its mels are once Whisper's, of the clip padded
to 30 s, and once only as long as the clip. Both are timed from the fifth batch on, by
turns, so that starting and importing do not count. Shares of the stages are from one process.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import wraps
from pathlib import Path
from unittest.mock import patch

import numpy as np
from rows import emit, row

from baichuan_omni_jax.config import Budgets, DataConfig, OmniConfig, SourceConfig, baichuan_omni_7b, tiny
from data_pipelines.datasets.builder.build import build_dataset
from data_pipelines.datasets.jobs.runners import LocalRunner
from data_pipelines.documents import processor
from data_pipelines.packing.index import Index
from data_pipelines.pipeline import Pipeline, open_pipeline

MANIFESTS = ("image", "video", "audio", "omni")
BUDGETS = Budgets(tokens=2048, patches=6144, audio_frames=1024, audio_targets=768, mel_windows=24)
MEL_FRAMES = (400, 800, 1600, 3000)
WARM = 4  # steps
GOAL = 1.5
NOTES = {
    "padded": "peer: loose files, only wanted frames converted, Whisper's mel of clips padded to 30 s, rows given",
    "trimmed": "as the peer above, its mels only as long as the clip; it checks no file, makes no targets and no slots",
}
STAGES = {  # what of the processor belongs to which stage; what is left is packing, with text and layout
    "decode": ("load_image", "read_video", "probe_audio", "read_audio"),
    "resize": ("resize_image",),
    "patchify": ("patchify",),
    "mel": ("log_mel",),
}


def sizes() -> OmniConfig:
    """The released limits of pictures and the released mel, with the tokens of a vocabulary that is trained here."""
    released, small = baichuan_omni_7b(), tiny()
    names = ("image_limits", "frame_limits", "max_frames", "frames_per_second")
    vision = replace(small.vision, **{name: getattr(released.vision, name) for name in names})
    return replace(small, vision=vision, audio=replace(small.audio, num_mel_bins=released.audio.num_mel_bins))


def open_shards(data: Path, folder: Path, workers: int) -> Pipeline:
    build_dataset([data / f"{name}.jsonl" for name in MANIFESTS], folder / "built", None, 256, 2**28, LocalRunner(0))
    config = DataConfig(
        root=str(folder),
        mixture=(SourceConfig(name="all", manifest="built"),),
        rows=2,
        budgets=BUDGETS,
        workers=workers,
        mel_frames=MEL_FRAMES,
    )
    return open_pipeline(config, sizes())


def seconds_a_step(steps: Iterable) -> float:
    """Over all steps but the first ones."""
    for number, _ in enumerate(steps, start=1):
        if number == WARM:
            begun = time.perf_counter()
    return (time.perf_counter() - begun) / (number - WARM)


def stage_seconds(pipeline: Pipeline) -> dict[str, float]:
    """Of one epoch in this process, by stage; "pack" is what is in no other."""
    spent: dict[str, float] = defaultdict(float)

    def timed(stage: str, function):
        @wraps(function)
        def call(*arguments, **options):
            begun = time.perf_counter()
            try:
                found = function(*arguments, **options)
            finally:
                spent[stage] += time.perf_counter() - begun
            if isinstance(found, tuple) and isinstance(found[1], Iterator):  # frames are decoded as they are taken
                return found[0], each_timed(stage, found[1])
            return found

        return call

    def each_timed(stage: str, items: Iterator):
        while True:
            begun = time.perf_counter()
            item = next(items, None)
            spent[stage] += time.perf_counter() - begun
            if item is None:
                return
            yield item

    with ExitStack() as patches:
        patches.enter_context(patch.object(Index, "document", timed("read", Index.document)))
        for stage, names in STAGES.items():
            for name in names:
                patches.enter_context(patch.object(processor, name, timed(stage, getattr(processor, name))))
        alone = replace(pipeline, config=replace(pipeline.config, workers=0))
        begun = time.perf_counter()
        for _ in alone.steps(None, epochs=1):
            pass
        total = time.perf_counter() - begun
    return dict(spent) | {"pack": total - sum(spent.values())}


def open_peers(data: Path, pipeline: Pipeline, epochs: int) -> dict[str, Iterable]:
    """DataLoaders of the same rows, with mels padded as Whisper's or trimmed; none without PyTorch."""
    try:
        from input_peer import loader, manifest_lines
    except ImportError:
        return {}
    lines = manifest_lines([data / f"{name}.jsonl" for name in MANIFESTS])
    decoder, (index,) = pipeline.decoder(None), pipeline.indexes
    rows, frames = [], []
    for step in pipeline.step_plan(epochs=epochs):
        frames += [decoder.mel_frames(step)] * len(step)
        rows += [[lines[index.document(number).location] for _, number in row] for row in step]
    tokenizer = pipeline.processor.tokenizer.to_str()
    return {name: loader(rows, frames, tokenizer, pipeline, name == "trimmed") for name in ("padded", "trimmed")}


def largest_difference(pipeline: Pipeline, peer) -> float:
    """Between the mels of the first steps. Raises AssertionError when pixels or lengths differ."""
    worst = 0.0
    with closing(pipeline.steps(None, epochs=1)) as steps:
        for _, ours, theirs in zip(range(6), steps, peer, strict=False):
            for name in ("patches", "mel_lengths"):
                np.testing.assert_array_equal(ours.batch[name], theirs[name].numpy(), err_msg=name)
            worst = max(worst, float(np.abs(ours.batch["mel"] - theirs["mel"].numpy()).max()))
    return worst


def measure(options: argparse.Namespace, data: Path, folder: Path) -> list[dict]:
    pipeline = open_shards(data, folder, options.workers)
    plan = list(pipeline.step_plan(epochs=options.epochs))
    documents = sum(len(row) for step in plan for row in step) / len(plan)
    rows = sum(map(len, plan)) / len(plan)
    size = statistics.mean(
        sum(values.nbytes for values in step.batch.values()) for step in pipeline.steps(None, epochs=1)
    )
    peers = open_peers(data, pipeline, options.epochs)
    differs = max((largest_difference(pipeline, peer) for peer in peers.values()), default=0.0)
    times: dict[str, list[float]] = defaultdict(list)
    for _ in range(options.repeats):
        times["ours"].append(seconds_a_step(pipeline.steps(None, epochs=options.epochs)))
        for name, peer in peers.items():
            times[name].append(seconds_a_step(peer))
    seconds = {name: statistics.median(found) for name, found in times.items()}
    own = seconds["ours"]

    def compared(name: str, goal: float | None = None) -> dict:
        if name not in seconds:
            return {"note": "no peer: PyTorch is not installed"}
        ratio = seconds[name] / own
        asked = {} if goal is None else {"goal": f">= {goal}", "ok": ratio >= goal}
        peer = {"peer": f"PyTorch DataLoader, {name} mels", "peer_value": documents / seconds[name], "ratio": ratio}
        return peer | asked | {"note": NOTES[name] + f"; patches equal, mels to {differs:.1g}"}

    spent = stage_seconds(pipeline)
    total = sum(spent.values())
    return [
        row("documents_per_s", documents / own, "documents/s", **compared("padded", GOAL)),
        row("documents_per_s_trimmed", documents / own, "documents/s", **compared("trimmed")),
        row("rows_per_s", rows / own, "rows/s", note=f"of {BUDGETS.tokens} tokens, {BUDGETS.patches} patches"),
        row("mb_per_s", size / own / 1e6, "MB/s", note="of arrays handed to the training process"),
        *(
            row(f"share_{stage}", 100 * spent.get(stage, 0.0) / total, "%", note="of one process, one epoch")
            for stage in ("read", *STAGES, "pack")
        ),
    ]


def sample_data(given: Path | None, folder: Path) -> Path:
    """Returns the sample data set that was given, or builds one in `folder`."""
    from data_pipelines.sample.__main__ import build_sample

    return (given or build_sample(folder / "sample", progress=False)).resolve()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--data", type=Path, help="the sample data set (default: built anew)")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        return emit(measure(options, sample_data(options.data, Path(folder)), Path(folder)), options.json)


if __name__ == "__main__":
    sys.exit(main())
