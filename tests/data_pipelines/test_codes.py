"""The store of audio codes."""

import json
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from baichuan_omni_jax.config import ConfigError
from data_pipelines.codes import CodeStore, write_codes

ROOT = Path(__file__).resolve().parents[2]
SIZES = (8192, 4096, 16)


def items(count=20, longest=500):
    rng = np.random.default_rng(0)
    return {(f"clip{i // 2}", i % 2): rng.integers(0, SIZES, (int(rng.integers(1, longest)), 3)) for i in range(count)}


def write(path, pairs, fingerprint="abc"):
    write_codes(path, pairs, fingerprint=fingerprint, codebook_sizes=SIZES, window_rule={"seconds": 30})


def test_what_is_written_is_read(tmp_path):
    written = items(40)
    write(tmp_path / "deep" / "store", written.items())
    store = CodeStore(tmp_path / "deep" / "store", "abc")
    assert store.meta["frames"] == sum(map(len, written.values())) > 4096  # more than one chunk
    assert store.meta["window_rule"] == {"seconds": 30}
    first = next(iter(written))
    assert store.lookup(first).dtype == np.int32
    for reader in (store, pickle.loads(pickle.dumps(store))):
        for key, codes in written.items():
            assert key in reader
            np.testing.assert_array_equal(reader.lookup(key), codes)


def test_an_empty_store(tmp_path):
    write(tmp_path / "store", [])
    assert ("clip0", 0) not in CodeStore(tmp_path / "store", "abc")


def test_a_clip_without_codes(tmp_path):
    write(tmp_path / "store", items(2).items())
    store = CodeStore(tmp_path / "store")
    for key in (("clip0", 2), ("other", 0)):
        assert key not in store
        with pytest.raises(KeyError, match=key[0]):
            store.lookup(key)


def test_another_tokenizer_is_refused(tmp_path):
    write(tmp_path / "store", items(2).items())
    with pytest.raises(ConfigError, match="was written by tokenizer abc, not by xyz, the one in use"):
        CodeStore(tmp_path / "store", "xyz")


def test_a_store_is_never_overwritten(tmp_path):
    write(tmp_path / "store", items(2).items())
    with pytest.raises(ConfigError, match=r"store exists already"):
        write(tmp_path / "store", items(4).items(), fingerprint="new")
    assert CodeStore(tmp_path / "store", "abc").meta["fingerprint"] == "abc"


def break_meta(store):
    (store / "meta.json").write_text("{")


def list_meta(store):
    (store / "meta.json").write_text("[]")


def forget_the_fingerprint(store):
    (store / "meta.json").write_text(json.dumps({"codebook_sizes": SIZES}))


def cut_index(store):
    content = (store / "index.npz").read_bytes()
    (store / "index.npz").write_bytes(content[: len(content) // 2])


def remove_index(store):
    (store / "index.npz").unlink()


@pytest.mark.parametrize("damage", [break_meta, list_meta, forget_the_fingerprint, cut_index, remove_index])
def test_a_damaged_store_is_told(tmp_path, damage):
    write(tmp_path / "store", items(2).items())
    damage(tmp_path / "store")
    with pytest.raises(ConfigError, match=r"audio code store .*store cannot be read: "):
        CodeStore(tmp_path / "store", "abc")


def test_no_store(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot be read: .*No such file"):
        CodeStore(tmp_path / "store", "abc")


def test_a_writer_that_fails_leaves_nothing(tmp_path):
    def failing():
        yield from list(items(2).items())
        raise RuntimeError("the tokenizer failed")

    with pytest.raises(RuntimeError, match="the tokenizer failed"):
        write(tmp_path / "store", failing())
    assert list(tmp_path.iterdir()) == []


def test_a_killed_writer_leaves_no_store_and_the_next_one_succeeds(tmp_path):
    script = (
        "import os, signal, sys; from pathlib import Path; import numpy as np;"
        "from data_pipelines.codes import write_codes\n"
        "def items():\n"
        "    yield ('clip0', 0), np.zeros((5, 3))\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "write_codes(Path(sys.argv[1]), items(), fingerprint='abc', codebook_sizes=(4, 4, 4), window_rule={})"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "store")], check=False, cwd=ROOT)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "store").exists()
    write(tmp_path / "store", items(2).items())
    assert [path.name for path in tmp_path.iterdir()] == ["store"]
    assert len(CodeStore(tmp_path / "store", "abc").lookup(("clip0", 0)))
