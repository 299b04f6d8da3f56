"""Draws packed rows and one document.

A manifest is a JSONL file, media beside it, or the folder of a built dataset; several lie side by side.
Rows are packed as a run would pack them: documents, what each token is, where there is loss, what is padding. Below
them one document: its prompt, its images put together again from the patches, the log mels of its audio. No audio
codes are needed. Needs matplotlib, which comes with the `show` extra.
"""

import argparse
import importlib
import sys
from pathlib import Path

from baichuan_omni_jax.config import Budgets, DataConfig, SourceConfig, resolve_model
from baichuan_omni_jax.errors import ConfigError, exit_code
from baichuan_omni_jax.storage.given import given_file, given_manifest
from data_pipelines.datasets.sources import trusted_folders
from data_pipelines.documents.manifest import manifest_stem
from data_pipelines.errors import file_errors
from data_pipelines.pipeline import Pipeline, open_pipeline
from data_pipelines.tools.commands import (
    add_media_arguments,
    root_from_options,
    run_command,
    trusted_from_options,
)
from data_pipelines.tools.row_views import find_document, richest_document, view_document, view_rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    add = parser.add_argument
    add(
        "manifests",
        metavar="MANIFEST",
        type=given_manifest,
        nargs="+",
        help="JSONL, media beside it, or the folder of a dataset",
    )
    add_media_arguments(parser)
    add("--out", metavar="FIGURE", type=given_file, required=True, help="where to write: .png, .pdf or .svg")
    add("--rows", type=int, default=3, help="rows to draw (default 3)")
    add("--document", metavar="ID", help="the document to draw (default: the first row's with most modalities)")
    add("--length", type=int, default=1024, help="tokens of a row (default 1024)")
    add("--patches", type=int, help="patches of a row (default: the row's length)")
    add("--audio-frames", type=int, help="code frames of a row (default: a quarter of the length)")
    add("--audio-targets", type=int, help="frames to predict in a row (default: an eighth of the length)")
    add("--text-targets", type=int, default=0, help="tokens of a row that predict text (default: no limit)")
    add("--model", default="tiny", help="tiny, baichuan_omni_7b or a config.json: sizes and limits of the media")
    add("--tokenizer", default="", help="a tokenizer.json (default: one trained on the manifests' text)")
    add("--seed", type=int, default=0, help="seed of the shuffle (default 0)")


def run(arguments: argparse.Namespace) -> int:
    """Returns the exit code: 0, or 2 with one sentence when something given cannot be used."""
    return exit_code(lambda: visualize(arguments))


def main(arguments: list[str] | None = None) -> int:
    """Runs the command by itself; returns the exit code."""
    return run_command("visualize", __doc__, add_arguments, run, arguments)


def visualize(options: argparse.Namespace) -> None:
    """Draws what `options` ask for and prints a line a row. Raises ConfigError."""
    try:
        importlib.import_module("matplotlib")
    except ImportError as error:
        raise ConfigError("drawing needs matplotlib: pip install baichuan_omni_jax[show]") from error
    if options.rows < 1 or options.length < 1:
        raise ConfigError(f"--rows {options.rows} and --length {options.length} must be at least 1")
    # Rows first, then one document of them: the richest, or the one that is named.
    with file_errors(options.out):
        pipeline = open_pipeline(_data_config(options), resolve_model(options.model))
        rows, failed = view_rows(pipeline, options.rows)
        chosen = find_document(pipeline, options.document) if options.document else richest_document(rows[0])
        document = view_document(chosen, pipeline.processor)
        from data_pipelines.tools.row_drawing import draw  # imports matplotlib

        draw(rows, document, options.out, notes=_notes(pipeline, failed))
    for line in failed:
        print(line, file=sys.stderr)
    for number, row in enumerate(rows):
        print(f"row {number}: {len(row.segments)} documents; {row.describe_fill()}")
    print(f"{options.out}: {len(rows)} rows and document {chosen.id} ({chosen.location})")


def _data_config(options: argparse.Namespace) -> DataConfig:
    # A run's data have one root: manifests of several folders could not be packed into one row.
    folders = {manifest.parent.resolve() for manifest in options.manifests}
    if len(folders) > 1:
        raise ConfigError(f"manifests must lie in one folder, not in {', '.join(sorted(map(str, folders)))}")
    if not options.out.parent.is_dir():
        raise ConfigError(f"--out {options.out}: the folder {options.out.parent} does not exist")
    root = root_from_options(options)
    # Budgets that are not given keep the released proportions to the row's length.
    length = options.length
    default = Budgets()  # the released proportions

    def budget(given: int | None, proportion: int) -> int:
        return length * proportion // default.tokens if given is None else given

    return DataConfig(
        root=str(folders.pop()),
        trusted_roots=tuple(map(str, trusted_folders(trusted_from_options(options), "--trust"))),
        mixture=tuple(
            SourceConfig(name=Path(manifest_stem(path.name)).name, manifest=path.name, root=str(root or ""))
            for path in options.manifests
        ),
        rows=options.rows,
        budgets=Budgets(
            tokens=length,
            patches=budget(options.patches, default.patches),
            audio_frames=budget(options.audio_frames, default.audio_frames),
            audio_targets=budget(options.audio_targets, default.audio_targets),
            text_targets=options.text_targets,
        ),
        seed=options.seed,
        workers=0,
        tokenizer=options.tokenizer,
        max_bad_fraction=1.0,  # a broken data set is worth a look
    )


def _notes(pipeline: Pipeline, failed: list[str]) -> list[str]:
    notes = []
    if causes := pipeline.causes():
        named = ", ".join(f"{count} {cause}" for cause, count in causes.most_common())
        notes.append(f"{sum(causes.values())} of {pipeline.documents} documents are skipped: {named}")
    if failed:
        notes.append(f"{len(failed)} documents of these rows could not be decoded and left padding")
    return notes


if __name__ == "__main__":
    sys.exit(main())
