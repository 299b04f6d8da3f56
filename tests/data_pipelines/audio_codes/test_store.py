"""The store of audio codes: what is written is read, and what is damaged is reported by name."""

import hashlib
import json
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from baichuan_omni_jax.errors import ConfigError
from data_pipelines.audio_codes.store import ENTRY, REFERENCE, UNUSED, CodeStore, find, new_records, order_of
from data_pipelines.audio_codes.writer import part_bounds, write_codes, write_part
from data_pipelines.errors import SampleError

ROOT = Path(__file__).resolve().parents[3]
SIZES = (8192, 4096, 16)
PART = 1024


def clip(name: object) -> str:
    return hashlib.sha256(str(name).encode()).hexdigest()


def items(count=20, longest=500):
    rng = np.random.default_rng(0)
    return {(clip(i // 2), i % 2): rng.integers(0, SIZES, (int(rng.integers(1, longest)), 3)) for i in range(count)}


def write(path, pairs, fingerprint="abc"):
    rule = {"seconds": 30}
    write_codes(path, pairs, fingerprint=fingerprint, codebook_sizes=SIZES, window_rule=rule, part_frames=PART)


def test_what_is_written_is_read(tmp_path):
    written = items(40)
    write(tmp_path / "deep" / "store", written.items())
    store = CodeStore(tmp_path / "deep" / "store", "abc")
    assert store.meta["frames"] == sum(map(len, written.values()))
    assert len(store.meta["parts"]) > 4
    assert store.meta["window_rule"] == {"seconds": 30}
    assert len(store) == 40
    first = next(iter(written))
    assert store.lookup(first).dtype == np.int32
    for reader in (store, pickle.loads(pickle.dumps(store))):
        for key, codes in written.items():
            assert key in reader
            np.testing.assert_array_equal(reader.lookup(key), codes)
    store.verify()


def test_the_index_is_32_bytes_a_window_on_disk(tmp_path):
    """And nothing that grows with it is in a pickle."""
    write(tmp_path / "store", items(400, 4).items())
    store = CodeStore(tmp_path / "store")
    assert ENTRY.itemsize == 32
    assert isinstance(store.index, np.memmap)
    assert (tmp_path / "store" / store.meta["index"]).stat().st_size < 400 * 32 + 512
    assert len(pickle.dumps(store)) < 500


def test_an_empty_store(tmp_path):
    write(tmp_path / "store", [])
    assert (clip(0), 0) not in CodeStore(tmp_path / "store", "abc")


def test_a_clip_without_codes(tmp_path):
    write(tmp_path / "store", items(2).items())
    store = CodeStore(tmp_path / "store")
    for key in ((clip(0), 2), (clip("other"), 0)):
        assert key not in store
        with pytest.raises(KeyError, match=key[0]):
            store.lookup(key)


def test_tables_are_sorted_and_searched_by_all_of_the_key():
    keys = [(5, 1, 0), (5, 1, 2), (5, 1, 1), (5, 0, 9), (2**64 - 1, 7, 0), (0, 2**64 - 1, 3)]
    table = np.array([(*key, row, 0) for row, key in enumerate(keys)], ENTRY)
    table = table[order_of(table)]
    assert [record.item()[:3] for record in table] == sorted(keys)
    for row, (high, low, window) in enumerate(keys):
        assert find(table, (f"{high:016x}{low:016x}" + "0" * 32, window))[3] == row
    assert find(table, (f"{5:016x}{1:016x}" + "0" * 32, 3)) is None
    assert find(table[:0], (clip(0), 0)) is None


def test_new_records_are_the_first_with_a_key_that_is_not_known():
    known = np.array([(1, 1, 0, 5, 0), (2, 1, 0, 5, 0)], ENTRY)
    keys = [(1, 1, 0), (1, 1, 1), (3, 0, 0), (1, 1, 1), (2, 2, 0)]
    table = np.array([(*key, 5, 0, document) for document, key in enumerate(keys)], REFERENCE)
    assert table[new_records(table, known)]["document"].tolist() == [1, 2, 4]
    assert new_records(table[:0], known).tolist() == []
    assert new_records(table, known[:0]).tolist() == [True, True, True, False, True]


def test_no_window_lies_in_two_parts():
    lengths = np.array([300, 300, 500, 100, 1024, 1])
    assert part_bounds(lengths, 1024) == [(0, 2), (2, 4), (4, 5), (5, 6)]
    with pytest.raises(ConfigError, match=r"a window of 1025 code frames is longer than a part's 1024"):
        part_bounds(np.array([1, 1025]), 1024)


def test_the_same_codes_give_the_same_bytes(tmp_path):
    codes = np.random.default_rng(0).integers(0, SIZES, (700, 3))
    files = [write_part(tmp_path, number, codes, PART).read_bytes() for number in (0, 7)]
    assert files[0] == files[1]


def test_a_part_of_windows_without_codes_has_its_file(tmp_path):
    """All that was to be added is damaged: the store grows by a part that no entry names."""
    path = write_part(tmp_path, 2, np.full((5, 3), UNUSED, np.int32), PART)
    assert path == tmp_path / "c.2.0"
    assert path.stat().st_size > 0


def test_codes_that_int16_cannot_hold_are_refused(tmp_path):
    with pytest.raises(ValueError, match="codes from 0 to 40000 do not fit the store's int16"):
        write_part(tmp_path, 0, np.array([[0, 1, 40000]]), PART)
    with pytest.raises(ConfigError, match="codebooks of 40000 codes do not fit"):
        write_codes(tmp_path / "store", [], fingerprint="a", codebook_sizes=(40000,), window_rule={})


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
    (store / "meta.json").write_text(json.dumps({"format": 2, "codebook_sizes": SIZES}))


def cut_index(store):
    (path,) = store.glob("index-*.npy")
    path.write_bytes(path.read_bytes()[:-100])


def remove_index(store):
    next(store.glob("index-*.npy")).unlink()


def lose_a_part(store):
    (store / "frames" / "c.2.0").unlink()


def cut_a_part(store):
    path = store / "frames" / "c.2.0"
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_meta, "cannot be read: "),
        (list_meta, "cannot be read: meta.json is not of format 2"),
        (forget_the_fingerprint, "cannot be read: meta.json has no fingerprint"),
        (cut_index, "cannot be read: "),
        (remove_index, r"cannot be read: .*index-2\.npy"),
        (lose_a_part, r"frames/c\.2\.0 is missing"),
        (cut_a_part, r"frames/c\.2\.0 is damaged: it has \d+ of \d+ bytes"),
    ],
)
def test_a_damaged_store_is_refused(damage, message, tmp_path):
    write(tmp_path / "store", items().items())
    damage(tmp_path / "store")
    with pytest.raises(ConfigError, match=rf"audio code store .*store:? {message}"):
        CodeStore(tmp_path / "store", "abc")


@pytest.fixture
def flipped(tmp_path):
    """A store, one bit of whose part 2 is another one, and what was written."""
    written = items()
    write(tmp_path / "store", written.items())
    path = tmp_path / "store" / "frames" / "c.2.0"
    content = bytearray(path.read_bytes())
    content[40] ^= 4
    path.write_bytes(content)
    return CodeStore(tmp_path / "store"), written


def test_a_flipped_bit_costs_the_windows_that_lie_there(flipped):
    store, written = flipped
    lost = []
    for key, codes in written.items():
        try:
            np.testing.assert_array_equal(store.lookup(key), codes)
        except SampleError as error:
            lost.append(error)
    assert 0 < len(lost) <= 4  # of the chunk of 512 frames
    for error in lost:
        assert error.cause == "damaged_codes"
        assert "frames/c.2.0 is damaged: Digest mismatch" in str(error)


def test_verify_finds_a_flipped_bit(flipped):
    with pytest.raises(ConfigError, match=r"frames/c\.2\.0 is damaged: its checksum is another one"):
        flipped[0].verify()


def test_a_part_that_is_lost_while_the_store_is_open(tmp_path):
    written = items()
    write(tmp_path / "store", written.items())
    store = CodeStore(tmp_path / "store")
    (tmp_path / "store" / "frames" / "c.0.0").unlink()
    with pytest.raises(SampleError, match=r"frames/c\.0\.0 is missing") as error:
        store.lookup(next(iter(written)))
    assert error.value.cause == "damaged_codes"


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
        "from data_pipelines.audio_codes.writer import write_codes\n"
        "def items():\n"
        "    yield ('0' * 64, 0), np.zeros((5, 3), int)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "write_codes(Path(sys.argv[1]), items(), fingerprint='abc', codebook_sizes=(4, 4, 4), window_rule={})"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "store")], check=False, cwd=ROOT)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "store").exists()
    write(tmp_path / "store", items(2).items())
    assert [path.name for path in tmp_path.iterdir()] == ["store"]
    assert len(CodeStore(tmp_path / "store", "abc").lookup((clip(0), 0)))
