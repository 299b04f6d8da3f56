"""Where media are found: links and trusted folders, URLs, base64, and the same folder in every command and in a run."""

import base64
import json
import os
from argparse import ArgumentParser
from dataclasses import replace
from pathlib import Path
from urllib.parse import quote

import pytest

from baichuan_omni_jax.config import Budgets, DataConfig, SourceConfig, tiny
from baichuan_omni_jax.errors import ConfigError, RequestError
from data_pipelines.datasets.builder.build import main as build
from data_pipelines.datasets.shards import open_dataset
from data_pipelines.documents.chat_prompt import ChatPrompts
from data_pipelines.documents.processor import Processor
from data_pipelines.documents.prompts import parse_prompt
from data_pipelines.errors import SampleError
from data_pipelines.media.location import MediaReference, MediaRoot, decode_base64, find_media
from data_pipelines.pipeline import open_pipeline
from data_pipelines.synthesis.__main__ import main as synthesize
from data_pipelines.tokenizers.tokenizer import train_tokenizer
from data_pipelines.tools import visualize
from data_pipelines.tools.stats import main as stats
from tests.helpers.small_media import write_audio, write_image

ANY = (Path("/"),)
IMAGE = '<img_start_baichuan>{"local": "%s"}<img_end_baichuan><trainable_start>A cat.<trainable_end>'


def find(path: str, root: Path, trusted=ANY) -> Path:
    return find_media(MediaReference(path=path), MediaRoot(root, trusted)).path


def refused(path: str, root: Path, trusted=ANY) -> tuple[str, str]:
    with pytest.raises(SampleError) as caught:
        find(path, root, trusted)
    assert str(root) not in str(caught.value)
    assert "PosixPath" not in str(caught.value)
    return caught.value.cause, str(caught.value)


@pytest.fixture
def linked(tmp_path) -> Path:
    """`set/`: a folder and an image that are links out of it, a link within it, a broken one and a circle."""
    (tmp_path / "store/deep").mkdir(parents=True)
    (tmp_path / "set/own").mkdir(parents=True)
    for name in ("store/a.png", "store/deep/b.png", "set/own/c.png", "outside.png"):
        write_image(tmp_path / name, 40, 60)
    links = {"images": "../store", "one.png": "../store/a.png", "again": "own", "gone.png": "../none.png"}
    for name, target in (links | {"circle": "circle"}).items():
        (tmp_path / "set" / name).symlink_to(target)
    return tmp_path


class TestLinks:
    @pytest.mark.parametrize(
        ("path", "target"),
        [
            ("images/a.png", "store/a.png"),
            ("images/deep/b.png", "store/deep/b.png"),
            ("images/../one.png", "store/a.png"),
            ("one.png", "store/a.png"),
            ("again/c.png", "set/own/c.png"),
        ],
    )
    def test_are_followed_to_trusted_folders(self, linked, path, target):
        for trusted in (ANY, (linked / "store",), (linked,)):
            assert find(path, linked / "set", trusted) == (linked / target).resolve()

    def test_are_refused_elsewhere(self, linked):
        (linked / "other").mkdir()
        for trusted in ((), (linked / "other",), (linked / "set",), (linked / "store/deep",)):
            for path in ("images/a.png", "one.png", str(linked / "set/one.png")):
                cause, message = refused(path, linked / "set", trusted)
                assert (cause, message.partition(" ")[2]) == (
                    "outside_root",
                    "lies outside the trusted folders: a link leads there",
                )
            assert find("again/c.png", linked / "set", trusted), "a link within the folder leaves nothing"

    def test_what_is_written_stays_inside_whatever_is_trusted(self, linked):
        """Also `..` behind a link, which the system would take from the link's target."""
        outside = ("../outside.png", "own/../../outside.png", "images/../../outside.png", str(linked / "outside.png"))
        for path in (*outside, f"file://{linked}/outside.png", "../store/a.png"):
            cause, message = refused(path, linked / "set")
            assert (cause, "lies outside the folder that media are taken from" in message) == ("outside_root", True)
        (linked / "set/beyond").symlink_to("../store/deep")
        cause, _ = refused("beyond/../a.png", linked / "set")
        assert cause == "missing_file"

    def test_that_lead_nowhere(self, linked):
        assert refused("gone.png", linked / "set") == (
            "missing_file",
            "gone.png is a link to a file that does not exist",
        )
        assert refused("circle", linked / "set")[0] == "missing_file"
        assert refused("images", linked / "set") == ("missing_file", "images is a folder")
        os.mkfifo(linked / "store/pipe")
        assert refused("images/pipe", linked / "set") == ("missing_file", "images/pipe is no regular file")

    def test_root_that_is_itself_a_link(self, linked):
        (linked / "data").symlink_to("set")
        for path in ("own/c.png", str(linked / "data/own/c.png"), str(linked / "set/own/c.png")):
            found = find_media(MediaReference(path=path), MediaRoot(linked / "data", ()))
            assert (found.path, found.name) == ((linked / "set/own/c.png").resolve(), "own/c.png")
        assert find(str(linked / "data/one.png"), linked / "data") == (linked / "store/a.png").resolve()

    def test_strangers_messages_follow_none_unless_trusted(self, linked):
        processor = Processor(tiny(), train_tokenizer(["cat"], tiny().llm.vocab_size))
        question = [{"role": "user", "content": [{"type": "image", "path": "one.png"}]}]
        with pytest.raises(RequestError, match="outside the trusted folders"):
            ChatPrompts(processor, linked / "set").encode_messages(question)
        trusting = ChatPrompts(processor, linked / "set", trusted=[linked / "store"])
        assert trusting.encode_messages(question).patches.shape[1] == 588


class TestUrls:
    @pytest.mark.parametrize("form", ["{}", "file://{}", "file:{}", "file://localhost{}", "FILE://LocalHost{}"])
    def test_absolute_paths_and_file_urls_inside_the_root(self, tmp_path, form):
        folder = tmp_path / "a set" / "图"
        folder.mkdir(parents=True)
        write_image(folder / "100% a#b.png", 40, 60)
        path = str(folder / "100% a#b.png")
        found = find_media(MediaReference(path=form.format(quote(path) if form != "{}" else path)), tmp_path / "a set")
        assert (found.path, found.name) == ((folder / "100% a#b.png").resolve(), "图/100% a#b.png")

    @pytest.mark.parametrize(
        ("url", "message"),
        [
            ("https://example.org/a.png", "https:// is an address on the network: nothing is downloaded"),
            ("s3://bucket/a.png", "s3:// is an address on the network"),
            ("file://images/a.png", "file://images names another machine"),
            ("file:///a%ff.png", "is not a name in UTF-8"),
            ("file:///a%00.png", "no usable path"),
        ],
    )
    def test_others_are_told(self, tmp_path, url, message):
        cause, told = refused(url, tmp_path)
        assert cause == ("outside_root" if "usable" in message and "outside" in told else "missing_file")
        assert message in told

    def test_a_shard_names_files_by_their_place_in_the_root(self, tmp_path, capsys):
        write_image(tmp_path / "a.png", 40, 60)
        texts = [IMAGE % (tmp_path / "a.png"), IMAGE % (tmp_path / "a.png").as_uri(), IMAGE % "a.png"]
        lines = [json.dumps({"id": str(number), "text": text}) for number, text in enumerate([*texts, texts[0] * 2])]
        (tmp_path / "m.jsonl").write_text("\n".join(lines))
        assert build([str(tmp_path / "m.jsonl"), "--out", str(tmp_path / "out"), "--workers", "0"]) == 0
        for document in open_dataset(tmp_path / "out").documents_of(0):
            assert list(document.media) == ["a.png"]
            assert str(tmp_path) not in document.text
            assert find_media(parse_prompt(document.text)[0].reference, document.media).data


class TestBase64:
    DATA = bytes(range(256)) + b"\xfb\xff\xfe" * 7 + b"x"  # both letters in which the alphabets differ

    @pytest.mark.parametrize(
        "write",
        [
            lambda data: base64.b64encode(data).decode(),
            lambda data: base64.encodebytes(data).decode(),
            lambda data: base64.encodebytes(data).decode().replace("\n", "\r\n\t "),
            lambda data: base64.b64encode(data).decode().rstrip("="),
            lambda data: base64.urlsafe_b64encode(data).decode(),
            lambda data: "data:image/png;base64," + base64.b64encode(data).decode(),
            lambda data: "DATA:image/png;name=a.png;BASE64," + base64.encodebytes(data).decode(),
            lambda data: "data:;base64," + quote(base64.b64encode(data).decode(), safe=""),
            lambda data: "data:image/png," + quote(data),
        ],
        ids=["plain", "lines", "white space", "no padding", "url-safe", "data", "data lines", "data quoted", "percent"],
    )
    def test_forms_that_are_read(self, write):
        assert decode_base64(write(self.DATA)) == self.DATA

    @pytest.mark.parametrize(
        "text", ["???", "YWJj!", "YWJjZ", "YQ===", "YQ=", "Y=Q=", "YWJj\\n", "a-b+", "é", "data:x", "="]
    )
    def test_garbage_is_not(self, text):
        with pytest.raises(SampleError, match="base64 media cannot be decoded: ") as caught:
            decode_base64(text)
        assert caught.value.cause == "unreadable_media"

    def test_a_data_url_in_place_of_a_path(self):
        for key in ("local", "path", "base64"):
            content = json.dumps({key: "data:image/png;base64,YWJj"})
            (element,) = parse_prompt(f"<img_start_baichuan>{content}<img_end_baichuan>")
            assert find_media(element.reference, Path()).data == b"abc"


def run_config(top: Path, **source) -> DataConfig:
    mixture = (SourceConfig(name="main", **source),)
    budgets = Budgets(tokens=256, patches=256, audio_frames=16, audio_targets=16)
    return DataConfig(root=str(top), mixture=mixture, budgets=budgets, workers=0, max_bad_fraction=1.0)


class TestOneRule:
    """Media paths are relative to the manifest's folder, or to the root that is named, whoever reads it."""

    @pytest.fixture
    def corpus(self, tmp_path) -> Path:
        (tmp_path / "data/sub/images").mkdir(parents=True)
        write_image(tmp_path / "data/sub/images/a.png", 40, 60)
        (tmp_path / "data/sub/m.jsonl").write_text(json.dumps({"text": IMAGE % "images/a.png"}) + "\n")
        (tmp_path / "data/n.jsonl").write_text(json.dumps({"text": IMAGE % "a.png"}) + "\n")
        return tmp_path

    @pytest.mark.parametrize(
        ("manifest", "root"), [("sub/m.jsonl", None), ("n.jsonl", "sub/images"), ("sub/m.jsonl", "sub")]
    )
    def test_in_all_commands_and_in_a_run(self, corpus, manifest, root, monkeypatch):
        data = corpus / "data"
        given = [] if root is None else ["--root", str(data / root)]
        path = str(data / manifest)
        assert build([path, "--out", str(corpus / "built"), "--workers", "0", *given]) == 0
        assert stats([path, "--workers", "0", *given]) == 0
        parser = ArgumentParser()
        visualize.add_arguments(parser)
        shown = visualize._data_config(parser.parse_args([path, "--out", str(corpus / "row.png"), *given]))
        assert open_pipeline(shown, tiny()).causes() == {}
        assert synthesize(["filters", path, "--out", str(corpus / "kept"), "--workers", "0", *given]) == 0
        assert (corpus / "kept/kept.jsonl").read_text().count("\n") == 1
        monkeypatch.chdir(corpus)
        for top in (data, Path("data")):
            pipeline = open_pipeline(run_config(top, manifest=manifest, root=root or ""), tiny())
            assert (pipeline.documents, pipeline.causes()) == (1, {})

    @pytest.mark.parametrize(("manifest", "root"), [("n.jsonl", None), ("sub/m.jsonl", ".")])
    def test_and_so_are_refusals(self, corpus, manifest, root, capsys):
        data = corpus / "data"
        given = [] if root is None else ["--root", str(data / root)]
        for command in (build, stats):
            out = ["--out", str(corpus / "built")] if command is build else []
            assert command([str(data / manifest), "--workers", "0", *out, *given]) == 2
            error = capsys.readouterr().err
            assert f"can be used: 1 missing_file, the first: {Path(manifest).name}:1: " in error
            assert error.count("\n") == 1
        with pytest.raises(ConfigError, match="has no usable document: skipped 1 missing_file"):
            open_pipeline(run_config(data, manifest=manifest, root=root or ""), tiny())

    def test_another_root_is_measured_anew(self, corpus):
        data = corpus / "data"
        (data / "images").mkdir()
        write_image(data / "sub/images/a.png", 56, 84)
        write_image(data / "images/a.png", 84, 112)
        needs = [
            open_pipeline(run_config(data, manifest="sub/m.jsonl", root=root), tiny()).indexes[0].image_patches(0)
            for root in ("", ".")
        ]
        assert needs == [[4 * 6], [4 * 12]]  # patches of 14x14

    def test_trusted_roots_of_a_run(self, linked):
        (linked / "set/m.jsonl").write_text("".join(json.dumps({"text": IMAGE % "one.png"}) + "\n" for _ in "ab"))
        config = run_config(linked / "set", manifest="m.jsonl")
        assert open_pipeline(config, tiny()).causes() == {}
        with pytest.raises(ConfigError, match="2 outside_root"):
            open_pipeline(replace(config, trusted_roots=()), tiny())
        assert open_pipeline(replace(config, trusted_roots=(str(linked / "store"),)), tiny()).causes() == {}
        with pytest.raises(ConfigError, match=r"data\.trusted_roots .*nowhere is no folder"):
            open_pipeline(replace(config, trusted_roots=(str(linked / "nowhere"),)), tiny())

    def test_trust_of_a_command(self, linked, capsys):
        (linked / "set/m.jsonl").write_text(json.dumps({"text": IMAGE % "images/a.png"}) + "\n")
        arguments = [str(linked / "set/m.jsonl"), "--workers", "0", "--out"]
        assert build([*arguments, str(linked / "o1"), "--trust", str(linked / "set")]) == 2
        assert "1 outside_root, the first: m.jsonl:1: images/a.png lies outside the trusted" in capsys.readouterr().err
        assert build([*arguments, str(linked / "o2"), "--trust", str(linked / "store")]) == 0
        assert build([*arguments, str(linked / "o3")]) == 0
        assert build([*arguments, str(linked / "o4"), "--trust", str(linked / "none")]) == 2
        assert "none is no folder" in capsys.readouterr().err


class TestLinkedManifests:
    def test_media_beside_the_link_or_beside_what_it_leads_to(self, tmp_path):
        """A snapshot of the Hugging Face cache has media beside its links; a short cut to a set has them in the set."""
        (tmp_path / "real/images").mkdir(parents=True)
        write_image(tmp_path / "real/images/a.png", 40, 60)
        write_audio(tmp_path / "real/s.wav", 1)
        (tmp_path / "real/m.jsonl").write_text(json.dumps({"text": IMAGE % "images/a.png"}) + "\n")
        (tmp_path / "here").mkdir()
        (tmp_path / "here/m.jsonl").symlink_to("../real/m.jsonl")
        assert build([str(tmp_path / "here/m.jsonl"), "--out", str(tmp_path / "o1"), "--workers", "0"]) == 0
        assert open_pipeline(run_config(tmp_path / "here", manifest="m.jsonl"), tiny()).causes() == {}
        # What lies beside the link comes first.
        (tmp_path / "here/images").mkdir()
        write_image(tmp_path / "here/images/a.png", 80, 80)
        assert build([str(tmp_path / "here/m.jsonl"), "--out", str(tmp_path / "o2"), "--workers", "0"]) == 0
        (document,) = open_dataset(tmp_path / "o2").documents_of(0)
        assert document.media["images/a.png"].data == (tmp_path / "here/images/a.png").read_bytes()

    def test_two_splits_with_the_same_bytes_are_two_manifests(self, tmp_path):
        """The Hugging Face cache keeps one blob for them."""
        (tmp_path / "blob").write_text('{"text": "a"}\n')
        for name in ("train", "test"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "m.jsonl").symlink_to("../blob")
        manifests = [str(tmp_path / name / "m.jsonl") for name in ("train", "test")]
        assert build([*manifests, "--out", str(tmp_path / "out"), "--workers", "0"]) == 0
        assert [document.id for shard in (0, 1) for document in open_dataset(tmp_path / "out").documents_of(shard)] == [
            "train/m-1",
            "test/m-1",
        ]
        (tmp_path / "also").symlink_to("train")
        assert build([manifests[0], str(tmp_path / "also/m.jsonl"), "--out", str(tmp_path / "o2")]) == 2
