"""Rows on several hosts: what one of them cannot decode, or decodes otherwise, is padding on all. Two real hosts:
tests/multidevice/test_two_hosts.py.
"""

import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import numpy as np
import pytest
from PIL import Image

from baichuan_omni_jax.config import Budgets, DataConfig, SourceConfig, tiny
from data_pipelines.held_out import HeldOutMixture
from data_pipelines.packing.rows import RowShard
from data_pipelines.packing.shared_rows import Agreement
from data_pipelines.pipeline import open_pipeline
from tests.data_pipelines.conftest import with_config
from tests.helpers.small_media import noise_image

IMAGE = '<img_start_baichuan>{"local": "%s"}<img_end_baichuan><trainable_start>the cat<trainable_end>'
IMAGES = 6


class Texts:
    """What hosts in threads tell each other."""

    def __init__(self, texts: dict[str, str], told: threading.Condition, index: int, count: int):
        self.texts, self.told, self.index, self.count, self.meetings = texts, told, index, count, 0

    def put(self, key: str, text: str) -> None:
        with self.told:
            assert key not in self.texts
            self.texts[key] = text
            self.told.notify_all()

    def wait(self, key: str) -> str:
        with self.told:
            assert self.told.wait_for(lambda: key in self.texts, 60), key
            return self.texts[key]

    def meet(self, text: str) -> list[str]:
        self.meetings += 1
        self.put(f"met/{self.meetings}/{self.index}", text)
        return [self.wait(f"met/{self.meetings}/{host}") for host in range(self.count)]

    def remove(self, folder: str) -> None:
        with self.told:
            for key in [key for key in self.texts if key.startswith(folder)]:
                del self.texts[key]


def texts_of(count: int) -> list[Texts]:
    shared: dict[str, str] = {}
    told = threading.Condition()
    return [Texts(shared, told, index, count) for index in range(count)]


@pytest.fixture
def roots(tmp_path):
    """Two folders with the same documents: an image each, and some text."""
    first = tmp_path / "0"
    first.mkdir()
    lines = []
    for number in range(IMAGES):
        Image.fromarray(noise_image(56, 84, number)).save(first / f"{number}.png")
        lines.append({"text": IMAGE % f"{number}.png"})
        lines.append({"text": f"<trainable_start>the mat {number}<trainable_end>"})
    (first / "m.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    return [first, shutil.copytree(first, tmp_path / "1")]


def pipeline_of(root, rows=2, **changes):
    config = DataConfig(
        root=str(root),
        mixture=(SourceConfig(name="main", manifest="m.jsonl"),),
        rows=rows,
        budgets=Budgets(tokens=64, patches=96, audio_frames=0, audio_targets=0),
        workers=0,
        context_block=8,
    )
    return with_config(open_pipeline(config, tiny()), **changes)


def read_together(pipelines, held, texts, count=4, state=None, agreements=None):
    """The first steps of every host, read at the same time."""
    agreements = agreements or [Agreement(held, one) for one in texts]

    def read(host):
        shard = RowShard(held[host], agreements[host].shared, agreements[host])
        steps = pipelines[host].steps(None, shard=shard, state=state, context_shards=2)
        found = list(islice(steps, count))
        steps.close()
        return found

    with ThreadPoolExecutor(len(pipelines)) as threads:
        return list(threads.map(read, range(len(pipelines))))


def assert_same_rows(one, other):
    assert one.keys() == other.keys()
    for name, values in one.items():
        np.testing.assert_array_equal(values, other[name], err_msg=name)


def lost_alone(root, count=4, state=None):
    """The steps of one host that has lost the same documents."""
    steps = pipeline_of(root).steps(None, state=state, context_shards=2)
    found = list(islice(steps, count))
    steps.close()
    return found


BOTH = {0: (0, 1), 1: (0, 1)}


@pytest.mark.parametrize("workers", [0, 1])
def test_what_one_host_cannot_decode_is_padding_on_both(workers, roots):
    pipelines = [pipeline_of(root, workers=workers) for root in roots]
    (roots[1] / "2.png").unlink()
    (roots[0] / "4.png").write_bytes((roots[0] / "4.png").read_bytes()[:120])
    found = read_together(pipelines, BOTH, texts_of(2))
    for name in ("2.png", "4.png"):
        for root in roots:
            (root / name).unlink(missing_ok=True)
    for whole, *steps in zip(lost_alone(roots[0]), *found, strict=True):
        for step in steps:
            assert_same_rows(step.batch, whole.batch)
            assert step.state == whole.state
            assert step.failed.keys() == whole.failed.keys()
    failed = [{key: why for step in steps for key, why in step.failed.items()} for steps in found]
    assert [{key: why[:2] for key, why in one.items()} for one in failed] == [
        {(0, 4): ("m.jsonl:5", "missing_file"), (0, 8): ("m.jsonl:9", "unreadable_media")}
    ] * 2
    assert failed[0][0, 4][2].startswith("host 1: ")
    assert not failed[0][0, 8][2].startswith("host ")


def test_what_hosts_decode_differently_is_padding_on_both(roots):
    pipelines = [pipeline_of(root) for root in roots]
    Image.fromarray(noise_image(56, 84, 99)).save(roots[1] / "1.png")
    found = read_together(pipelines, BOTH, texts_of(2))
    for step, other in zip(*found, strict=True):
        assert_same_rows(step.batch, other.batch)
    lost = {key: why for steps in found for step in steps for key, why in step.failed.items()}
    message = "hosts 0 and 1, which share its row, decode it to different values"
    assert lost == {(0, 2): ("m.jsonl:3", "differs", message)}


def test_documents_that_are_lost_while_rows_are_decoded_again(roots, monkeypatch):
    """Host 0 loses one more document when it looks again: the hosts go on until they agree."""
    (lost, also), _ = images_of_first_row(roots[0])
    pipelines = [pipeline_of(root, rows=1) for root in roots]
    (roots[1] / f"{lost}.png").unlink()
    encode, times = type(pipelines[0].processor).encode, []

    def fail_later(self, document, *args, **options):
        if self is pipelines[0].processor and f"{also}.png" in document.text:
            times.append(document)
            if len(times) == 2:
                (roots[0] / f"{also}.png").unlink()
        return encode(self, document, *args, **options)

    monkeypatch.setattr(type(pipelines[0].processor), "encode", fail_later)
    held = {0: (0,), 1: (0,)}
    first, second = (steps[0] for steps in read_together(pipelines, held, texts_of(2), count=1))
    assert {(0, 2 * lost), (0, 2 * also)} == set(first.failed) == set(second.failed)
    assert_same_rows(first.batch, second.batch)


def images_of_first_row(root):
    """The first two images of the first row, and all of its documents."""
    row = next(iter(pipeline_of(root, rows=1).plan()))
    images = [document.number // 2 for document in row if document.number % 2 == 0]
    return images[:2], row


def test_a_run_resumed_amid_lost_documents_has_the_same_rows(roots):
    pipelines = [pipeline_of(root) for root in roots]
    (roots[1] / "2.png").unlink()
    whole = read_together(pipelines, BOTH, texts_of(2))
    state = json.loads(json.dumps(whole[0][0].state))
    again = read_together(pipelines, BOTH, texts_of(2), count=3, state=state)
    for steps, parts in zip(whole, again, strict=True):
        for step, part in zip(steps[1:], parts, strict=True):
            assert_same_rows(step.batch, part.batch)
            assert (step.failed, step.state) == (part.failed, part.state)


def test_hosts_that_share_a_row_with_a_third_each(roots, tmp_path):
    """Host 0 and host 2 share no row; host 1 has one with each of them."""
    roots.append(shutil.copytree(roots[0], tmp_path / "2"))
    pipelines = [pipeline_of(root, rows=3) for root in roots]
    held = {0: (0, 1), 1: (1, 2), 2: (2,)}
    for root, name in zip(roots, ("0.png", "2.png", "4.png"), strict=True):
        (root / name).unlink()
    steps = read_together(pipelines, held, texts_of(3))
    for first, second, third in zip(*steps, strict=True):
        for name, values in second.batch.items():
            np.testing.assert_array_equal(first.batch[name][1], values[0], err_msg=name)
            np.testing.assert_array_equal(third.batch[name][0], values[1], err_msg=name)


def test_hosts_without_common_rows_tell_each_other_nothing(roots):
    texts = texts_of(2)
    agreements = [Agreement({0: (0,), 1: (1,)}, one) for one in texts]
    assert [one.shared for one in agreements] == [(), ()]
    steps = iter(())
    assert agreements[0].agree(steps, pipeline_of(roots[0]).decoder(None)) is steps


@pytest.mark.parametrize("workers", [0, 1])
def test_what_was_told_is_removed(workers, roots):
    """Also that of a reading that has ended, as an evaluation does each time."""
    texts, pipelines = texts_of(2), [pipeline_of(root, workers=workers) for root in roots]
    agreements = [Agreement(BOTH, one) for one in texts]
    left = []
    for _ in range(3):
        read_together(pipelines, BOTH, texts, agreements=agreements, count=5)
        left.append(len(texts[0].texts))
    assert left[2] <= left[0] <= 2 * (2 + 2 * workers)


def test_media_are_exchanged_among_documents_that_all_hosts_can_read(roots):
    held, pipelines = {0: (0,), 1: (1,)}, [pipeline_of(root) for root in roots]
    (roots[1] / "3.png").unlink()
    agreements = [Agreement(held, one) for one in texts_of(2)]

    def plan(host):
        shard = RowShard(held[host], agreements[host].shared, agreements[host])
        media = HeldOutMixture(pipelines[host], None, shard).exchanged_media(4)
        return len(list(media.own())), len(list(media.exchanged())), media.left_out

    with ThreadPoolExecutor(2) as threads:
        first, second = threads.map(plan, range(2))
    assert first == second
    assert first[2]["missing_file"] == 1
