"""What storage refuses is no damaged document: it is read again, and at last ends the worker."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from baichuan_omni_jax.errors import StorageError, exit_code
from data_pipelines.audio_codes.writer import write_codes
from data_pipelines.datasets.shards import ShardFile, ShardWriter, write_description
from data_pipelines.documents.document import Document
from tests.helpers.failing_disk import failing_disk
from tests.helpers.micro import REPOSITORY
from tests.helpers.small_media import write_audio, write_image, write_video

# Each read alone in a process whose disk works, fails for a second, and fails for good.
SCRIPT = """
import hashlib, json, sys, threading
from pathlib import Path
from data_pipelines.audio_codes.store import CodeStore
from data_pipelines.datasets.shards import open_dataset
from data_pipelines.datasets.sources import ManifestSource
from data_pipelines.media.audio import read_audio
from data_pipelines.media.images import load_image
from data_pipelines.media.location import MediaReference, MediaRoot, find_media
from data_pipelines.media.videos import read_video

root, switch = Path(sys.argv[1]), Path(sys.argv[2])

def reads(patience):
    media = lambda name: find_media(MediaReference(name), MediaRoot(root, patience=patience))
    manifest = ManifestSource("m.jsonl", root, root / "notes", MediaRoot(root, patience=patience))
    return {
        "shard": lambda: open_dataset(root / "set", patience).document(0, 1).text,
        "manifest": lambda: manifest.document(0, 1).text,
        "image": lambda: load_image(media("a.png")).tobytes(),
        "audio": lambda: read_audio(media("a.flac"), 16000).wave.tobytes(),
        "video": lambda: b"".join(frame.tobytes() for frame in read_video(media("a.mp4"), 1, 4)[1]),
        "codes": lambda: CodeStore(root / "codes", patience=patience).lookup(("0" * 64, 0)).tobytes(),
    }

def outcome(read):
    try:
        value = read()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return hashlib.sha256(value.encode() if isinstance(value, str) else value).hexdigest()

found = {}
for name, read in reads(60.0).items():
    works = outcome(read)
    switch.touch()
    threading.Timer(1.0, switch.unlink).start()
    found[name] = [works, outcome(reads(60.0)[name])]
    switch.touch()
    found[name].append(outcome(reads(0.6)[name]))
    switch.unlink()
print(json.dumps(found))
"""


@pytest.fixture
def root(tmp_path) -> Path:
    """One of everything that is read."""
    folder = tmp_path / "data"
    (folder / "set").mkdir(parents=True)
    (folder / "m.jsonl").write_text('{"text": "the cat"}\n')
    write_image(folder / "a.png", 64, 64)
    write_audio(folder / "a.flac", 1.0)
    write_video(folder / "a.mp4", 2.0)
    with ShardWriter(folder / "set" / "a.array_record") as writer:
        for number in range(3):
            writer.write(Document(f"{number}", "", f"text {number}", f"m.jsonl:{number}", {}), {})
    shard = ShardFile("a.array_record", 3, writer.path.stat().st_size, "-")
    write_description(folder / "set", [shard], {"documents": 3})
    codes = [(("0" * 64, 0), np.ones((5, 8), np.int64))]
    write_codes(folder / "codes", codes, fingerprint="f", codebook_sizes=(16,) * 8, window_rule={})
    return folder


def test_a_disk_that_fails_is_waited_for_and_never_costs_a_document(root, tmp_path):
    # The store's index is mapped into memory, where no read of ours can fail; frames are read.
    disk = failing_disk(tmp_path, f"{root}/")
    variables = os.environ | disk.variables | {"PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", SCRIPT, str(root), str(disk.switch)]
    done = subprocess.run(command, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) == 6
    for name, (works, mended, down) in found.items():
        assert "Error" not in works, (name, works)
        assert mended == works, name
        assert down.startswith("StorageError: "), (name, down)
        assert str(root) in down or "a.png" in down
        assert "Input/output error" in down


def test_a_storage_error_ends_a_command_with_a_code_that_is_tried_again(capsys):
    error = pickle.loads(pickle.dumps(StorageError("reading a.png failed")))

    def command():
        raise error

    # 2 and 3 tell a supervisor that starting again does not help.
    assert exit_code(command) == 1
    assert capsys.readouterr().err == "error: reading a.png failed\n"
