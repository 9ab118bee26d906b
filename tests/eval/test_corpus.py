"""`plt-eval data`: what is read, what is kept, where it goes, and that an interrupted build is no different."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import multiprocessing
import os
import runpy
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from plt_eval.cli.main import main
from plt_eval.corpus import build, build_recipe_data, encoders, parse_source, parse_source_option
from plt_eval.corpus import installed as installed_module
from plt_eval.corpus.builder import WORK, BuildInterrupted
from plt_eval.corpus.documents import Document, Package, digest, normalised, split_of
from plt_eval.corpus.encoders import ByteEncoder, FolderEncoder
from plt_eval.corpus.licences import is_permissive, package_licence
from plt_eval.corpus.progress import BuildProgress
from plt_eval.corpus.sources import Source
from plt_eval.errors import UserError
from plt_model.tokenizer import byte_tokenizer
from plt_model.training.shards import MANIFEST, SPLITS, Manifest, ShardWriter, TokenData


def quiet() -> Console:
    return Console(file=io.StringIO())


def built(sources: list[Source] | Source, out: Path, **options: Any) -> Manifest:
    many = sources if isinstance(sources, list) else [sources]
    options = {"tokenizer": "bytes", "name": "toy", "console": quiet()} | options
    return build(many, options.pop("tokenizer"), out, **options)


def texts(folder: Path, split: str) -> list[str]:
    """The documents of a split by the byte tokenizer, as text."""
    data = TokenData.open(folder, split)  # type: ignore[arg-type]
    data.verify()
    found = []
    for index in range(data.documents):
        ids = data.read_document(index)
        assert (ids[0], ids[-1]) == (1, 2)
        found.append(bytes((ids[1:-1] - 3).tolist()).decode())
    assert [len(text.encode()) for text in found] == data.document_bytes().tolist()
    return found


def all_texts(folder: Path) -> list[str]:
    return [text for split in SPLITS for text in texts(folder, split)]


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".bin", ".jsonl")}


def folder_source(path: Path, **fields: Any) -> Source:
    return parse_source({"kind": "folder", "path": str(path)} | fields, "here")


@pytest.fixture
def sentences(tmp_path: Path) -> Path:
    """A JSON lines file of 400 documents."""
    path = tmp_path / "sentences.jsonl"
    path.write_text("".join(json.dumps({"text": f"sentence {i} é\n" * (1 + i % 7)}) + "\n" for i in range(400)))
    return path


@pytest.fixture
def bpe(tmp_path: Path) -> Path:
    """A folder with a small trained tokenizer that has an end of sequence and no beginning."""
    raw = Tokenizer(models.BPE(unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.train_from_iterator(
        ["the end of the line is near"] * 3, trainers.BpeTrainer(vocab_size=60, special_tokens=["<unk>", "<end>"])
    )
    folder = tmp_path / "bpe"
    PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<end>", unk_token="<unk>").save_pretrained(folder)
    return folder


# --- sources ------------------------------------------------------------------------------------------


def test_a_folder_gives_the_files_that_match(tmp_path: Path) -> None:
    root = tmp_path / "in"
    (root / "deep").mkdir(parents=True)
    (root / "b.py").write_text("b = 1\n")
    (root / "deep" / "a.py").write_text("a = 'é'\n")
    (root / "deep" / "n.md").write_text("# no\n")
    (root / "bad.py").write_bytes(b"\xff\xfe")
    (root / "bom.py").write_bytes(b"\xef\xbb\xbfbom = 1\n")
    manifest = built(folder_source(root, glob="**/*.py", licence="MIT"), tmp_path / "out", held_out=0)
    assert all_texts(tmp_path / "out") == ["b = 1\n", "bom = 1\n", "a = 'é'\n"]
    source = manifest.sources[0]
    assert (source.read, source.kept.documents, source.rejected) == (4, 3, {"not UTF-8": 1})
    assert {name: amount.documents for name, amount in source.licences.items()} == {"MIT": 3}
    assert manifest.splits["train"].bytes == sum(map(len, ("b = 1\n", "bom = 1\n", "a = 'é'\n"))) + 1


def test_a_build_below_its_own_source_does_not_read_itself(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("alpha\n")
    built(folder_source(tmp_path), tmp_path / "out", held_out=0)
    assert all_texts(tmp_path / "out") == ["alpha\n"]
    (tmp_path / "out" / MANIFEST).unlink()
    assert built(folder_source(tmp_path), tmp_path / "out", held_out=0).splits["train"].documents == 1


@pytest.mark.parametrize("packed", [False, True])
def test_json_lines_plain_and_packed(tmp_path: Path, packed: bool) -> None:
    rows = [{"body": "one", "by": "MIT"}, {"body": None, "by": "MIT"}, {"body": "\ud800", "by": "MIT"}]
    rows += [{"body": "  \n", "by": "MIT"}, {"body": "two", "by": ["ISC", "BSD"]}, {"body": "three", "by": None}]
    data = "\n\n".join(json.dumps(row) for row in rows).encode()
    path = tmp_path / ("x.jsonl.gz" if packed else "x.jsonl")
    path.write_bytes(gzip.compress(data) if packed else data)
    source = parse_source({"kind": "jsonl", "path": str(path), "text": "body", "licence_field": "by"}, "here")
    record = built(source, tmp_path / "out", held_out=0).sources[0]
    assert all_texts(tmp_path / "out") == ["one", "two", "three"]
    assert record.rejected == {"empty": 1, "lone surrogates": 1, "no text": 1}
    assert set(record.licences) == {"MIT", "BSD AND ISC", "unknown"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{oops", "x.jsonl:2: not JSON"),
        ("[1]", "x.jsonl:2: expected a JSON object, found list"),
        ('{"other": "a"}', "x.jsonl:2: no field text, it has other"),
        ('{"text": 3}', "x.jsonl:2: field text: expected a string, found int"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(UserError, match=".*" + message.replace("[", r"\[")):
        built(parse_source({"kind": "jsonl", "path": str(path)}, "here"), tmp_path / "out")
    path.write_text('{"text": "fine"}\n{"text": "mended"}\n')
    with pytest.raises(UserError, match="changed since the build"):
        built(parse_source({"kind": "jsonl", "path": str(path)}, "here"), tmp_path / "out")


def test_a_torn_gzip_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "fine"}\n' * 1000)[:-20])
    with pytest.raises(UserError, match=r"x\.jsonl\.gz: damaged gzip file"):
        built(parse_source({"kind": "jsonl", "path": str(path)}, "here"), tmp_path / "out")


def test_parquet_rows_from_any_place_on(tmp_path: Path) -> None:
    for number, size in enumerate((3, 700, 2)):
        rows = [f"row {number}.{i}" for i in range(size)]
        parquet.write_table(pa.table({"text": rows, "other": rows}), tmp_path / f"{number}.parquet", row_group_size=100)
    source = parse_source({"kind": "parquet", "path": str(tmp_path / "*.parquet")}, "here")
    reading = source.open(tmp_path / "out", None)
    every = list(reading.records(0))
    assert [record.text for record in every if isinstance(record, Document)][2:5] == ["row 0.2", "row 1.0", "row 1.1"]
    assert (len(every), reading.total) == (705, 705)
    for start in (1, 3, 4, 300, 703, 704, 705):
        assert list(reading.records(start)) == every[start:]
    with pytest.raises(UserError, match="no column body, it has text, other"):
        built(
            parse_source({"kind": "parquet", "path": str(tmp_path / "*.parquet"), "text": "body"}, "x"), tmp_path / "o"
        )
    (tmp_path / "3.parquet").write_text("no")
    with pytest.raises(UserError, match=r"3\.parquet: not a Parquet file"):
        source.open(tmp_path / "out", None)


def test_a_dataset_folder_is_streamed_as_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = tmp_path / "set"
    folder.mkdir()
    for split in ("train", "test"):
        rows = [json.dumps({"content": f"{split} {i}", "license": "MIT"}) for i in range(5)]
        (folder / f"{split}.jsonl").write_text("\n".join(rows))
    fields = {"kind": "hub", "dataset": str(folder), "split": "test", "text": "content", "licence_field": "license"}
    record = built(parse_source(fields, "here"), tmp_path / "out", held_out=0).sources[0]
    assert all_texts(tmp_path / "out") == [f"test {i}" for i in range(5)]
    assert record.licences["MIT"].documents == 5
    reading = parse_source(fields, "here").open(tmp_path / "out", None)
    assert [one.name for one in reading.records(3)] == [f"{folder}#3", f"{folder}#4"]
    with pytest.raises(UserError, match="cannot be opened"):
        built(parse_source(fields | {"split": "nosuch"}, "here"), tmp_path / "out2")
    with pytest.raises(UserError, match=r"no field (body|text)"):
        built(parse_source(fields | {"text": "body"}, "here"), tmp_path / "out3")


def test_the_commit_of_a_hub_dataset_is_looked_up_once_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets
    import huggingface_hub

    asked: list[str | None] = []

    class Api:
        def dataset_info(self, name: str, revision: str | None) -> Any:
            assert name == "org/set"
            asked.append(revision)
            return SimpleNamespace(sha="c0ffee")

    def load(name: str, config: str | None, *, split: str, revision: str, streaming: bool) -> Any:
        assert (name, config, split, revision, streaming) == ("org/set", "small", "train", "c0ffee", True)
        return datasets.Dataset.from_dict({"text": ["a", "b"]}).to_iterable_dataset()

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(datasets, "load_dataset", load)
    source = parse_source({"kind": "hub", "dataset": "org/set", "config": "small"}, "here")
    assert built(source, tmp_path / "out", held_out=0).sources[0].revision == "c0ffee"
    assert asked == [None]
    source.open(tmp_path, "c0ffee")
    assert asked == [None]


def test_trace_programs_are_held_out_as_programs(tmp_path: Path) -> None:
    from plt_benchmarks.trace.programs import canonical, training_documents

    def program(text: str) -> str:
        return canonical("".join(line for line in text.splitlines(True) if not line.startswith("assert")))

    source = parse_source({"kind": "trace", "seed": 3, "programs": 600}, "here")
    built(source, tmp_path / "out", held_out=0.2)
    train, heldout = ({program(text) for text in texts(tmp_path / "out", split)} for split in SPLITS)
    assert not train & heldout
    assert 60 < len(texts(tmp_path / "out", "heldout")) < 180
    assert set(all_texts(tmp_path / "out")) == set(training_documents(3, 600))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "folders"}, "kind must be one of folder, jsonl, .*found 'folders'"),
        ({}, "kind must be one of"),
        ({"kind": "folder"}, "folder: path: Field required"),
        ({"kind": "folder", "path": "x", "blob": "y"}, "folder: blob: Extra inputs"),
        ({"kind": "trace", "programs": "many"}, "trace: programs: .*found 'many'"),
        ({"kind": "installed", "held_out": 1.5}, "installed: held_out"),
        ("installed", "expected a mapping with a kind, found str"),
    ],
)
def test_a_bad_source_is_one_line(fields: object, message: str) -> None:
    with pytest.raises(UserError, match=f"^recipe: entry a: {message}") as caught:
        parse_source(fields, "recipe: entry a")
    assert "\n" not in str(caught.value)


def test_the_source_option() -> None:
    source = parse_source_option("kind=folder,path=a=b, glob=*.py,glob=*.pyi")
    assert source.model_dump() == {
        "kind": "folder",
        "path": "a=b",
        "glob": ("*.py", "*.pyi"),
        "licence": "unknown",
    }
    assert parse_source_option("kind=trace,programs=5,seed=2").model_dump() == {
        "kind": "trace",
        "programs": 5,
        "seed": 2,
    }
    with pytest.raises(UserError, match="expected name=value, found 'installed'"):
        parse_source_option("installed")


# --- licences and installed packages ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("licence", "permissive"),
    [
        ("MIT", True),
        ("mit", True),
        ("Apache 2.0", True),
        ("BSD", True),
        ("MPL-2.0 AND MIT", False),
        ("MIT AND MPL-2.0", False),
        ("Apache-2.0 OR GPL-3.0-only", True),
        ("(MIT OR GPL-2.0) AND LGPL-2.1", False),
        ("(MIT OR GPL-2.0) AND ISC", True),
        ("MIT OR GPL-2.0 AND LGPL-2.1", True),
        ("GPL-2.0 WITH Classpath-exception-2.0", False),
        ("Apache-2.0 WITH LLVM-exception AND BSD-2-Clause", True),
        ("Proprietary", False),
        ("MIT BUT NOT REALLY", False),
        ("(MIT", False),
        ("", False),
        ("MIT AND", False),
    ],
)
def test_permissive_licences(licence: str, permissive: bool) -> None:
    assert is_permissive(licence) is permissive


class Declared:
    """Package metadata of the given headers."""

    def __init__(self, *headers: tuple[str, str]) -> None:
        self._headers = headers

    def get_all(self, name: str, failobj: None = None) -> list[str] | None:  # noqa: ARG002
        return [value for header, value in self._headers if header == name] or None


OSI = "License :: OSI Approved :: "


@pytest.mark.parametrize(
    ("headers", "licence"),
    [
        ([("License-Expression", "MIT"), ("License", "GPL")], "MIT"),
        ([("Classifier", OSI + "MIT License"), ("License", "GPL")], "MIT"),
        ([("Classifier", OSI + "MIT License"), ("Classifier", OSI + "Apache Software License")], "MIT AND Apache-2.0"),
        ([("Classifier", "License :: OSI Approved"), ("License", "Apache 2.0")], "Apache-2.0"),
        (
            [("Classifier", OSI + "Mozilla Public License 2.0 (MPL 2.0)")],
            "LicenseRef-Mozilla-Public-License-2.0-MPL-2.0",
        ),
        (
            [("Classifier", "License :: Other/Proprietary License"), ("License", "MIT")],
            "LicenseRef-Other-Proprietary-License",
        ),
        ([("License", "Copyright 2020\nPermission is hereby granted")], None),
        ([], None),
    ],
)
def test_the_licence_that_a_package_declares(headers: list[tuple[str, str]], licence: str | None) -> None:
    assert package_licence(Declared(*headers)) == licence


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three made-up installed packages: one permissive, one not, one that declares nothing."""
    root = tmp_path / "site"
    packages = {
        "Good_Pkg": ("License-Expression: MIT", ["good/a.py", "good/b.py", "good/_vendor/v.py", "good/made.py"]),
        "copyleft": ("License-Expression: GPL-3.0-only", ["copyleft/a.py"]),
        "silent": ("Summary: nothing", ["silent/a.py"]),
        "evalplus": ("License-Expression: Apache-2.0", ["evalplus_/a.py"]),
    }
    for name, (header, files) in packages.items():
        info = root / f"{name}-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.4\nName: {name}\nVersion: 1.0\n{header}\n")
        (info / "RECORD").write_text("".join(f"{file},,\n" for file in [*files, "../../bin/x.py"]))
        for file in files:
            path = root / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"# {file} of {name}\n")
    (root / "good" / "made.py").write_text("# Generated by the protocol buffer compiler.  DO NOT EDIT!\nx = 1\n")
    from importlib import metadata

    monkeypatch.setattr(metadata, "distributions", lambda: metadata.Distribution.discover(path=[str(root)]))
    return root


def test_only_permissive_packages_are_read(site: Path, tmp_path: Path) -> None:
    (site / "good" / "wide.py").write_text("x = '" + "y" * 2000 + "'\n")
    (site / "good" / "big.py").write_text("x = 1\n" * 40_000)
    with (site / "Good_Pkg-1.0.dist-info" / "RECORD").open("a") as stream:
        stream.write("good/wide.py,,\ngood/big.py,,\n")
    listing = installed_module.list_files(None, 10**9)
    names = [file.name for file in listing.files if file.package.name != installed_module.STANDARD_LIBRARY]
    assert names == ["good-pkg/good/a.py", "good-pkg/good/b.py", "good-pkg/good/made.py", "good-pkg/good/wide.py"]
    assert listing.skipped == {
        "copyleft": "licence is not certainly permissive: GPL-3.0-only",
        "evalplus": "holds the problems of an evaluation suite",
        "silent": "declares no licence",
    }
    manifest = built(parse_source({"kind": "installed", "packages": "good.pkg"}, "x"), tmp_path / "out")
    assert sorted(all_texts(tmp_path / "out")) == ["# good/a.py of Good_Pkg\n", "# good/b.py of Good_Pkg\n"]
    assert manifest.sources[0].rejected == {"generated": 1, "lines too long": 1}
    rows = [json.loads(line) for line in (tmp_path / "out" / "files.jsonl").read_text().splitlines()]
    assert rows[0] == {
        "file": "good-pkg/good/a.py",
        "package": "good-pkg",
        "version": "1.0",
        "licence": "MIT",
        "sha256": hashlib.sha256(b"# good/a.py of Good_Pkg\n").hexdigest(),
        "bytes": 24,
        "split": rows[1]["split"],
    }
    assert manifest.files is not None
    assert (manifest.files.rows, len(rows)) == (2, 2)
    assert manifest.files.sha256 == hashlib.sha256((tmp_path / "out" / "files.jsonl").read_bytes()).hexdigest()


@pytest.mark.usefixtures("site")
@pytest.mark.parametrize(
    ("package", "message"),
    [("nosuch", "nosuch is not installed"), ("copyleft", "GPL"), ("evalplus", "evaluation suite")],
)
def test_an_unusable_package_that_is_named_is_refused(tmp_path: Path, package: str, message: str) -> None:
    with pytest.raises(UserError, match=f"source installed: package {package}.*{message}|package {message}"):
        built(parse_source({"kind": "installed", "packages": [package]}, "x"), tmp_path / "out")


def test_the_limit_of_bytes_a_package(site: Path, tmp_path: Path) -> None:
    for i in range(50):
        (site / "good" / f"f{i}.py").write_text(f"# file {i:02d}\n" * 10)
    with (site / "Good_Pkg-1.0.dist-info" / "RECORD").open("a") as stream:
        stream.writelines(f"good/f{i}.py,,\n" for i in range(50))
    fields = {"kind": "installed", "packages": ["good-pkg"], "max_bytes_per_package": 1000}
    manifest = built(parse_source(fields, "x"), tmp_path / "out")
    package = manifest.sources[0].packages[0]
    assert 800 < package.bytes <= 1000
    assert package.documents + package.left_out == 52
    assert manifest.request["sources"][0]["max_bytes_per_package"] == 1000


def test_the_standard_library_is_split_by_module(tmp_path: Path) -> None:
    source = parse_source({"kind": "installed", "packages": "python-stdlib", "held_out": 0.2}, "x")
    manifest = built(source, tmp_path / "out")
    rows = [json.loads(line) for line in (tmp_path / "out" / "files.jsonl").read_text().splitlines()]
    splits: dict[str, set[str]] = {}
    for row in rows:
        splits.setdefault(row["file"].split("/")[1].removesuffix(".py"), set()).add(row["split"])
    assert all(len(found) == 1 for found in splits.values())
    assert {"json", "asyncio", "dataclasses"} <= splits.keys()
    assert not {"test", "idlelib", "lib2to3", "site-packages"} & splits.keys()
    held = sum(found == {"heldout"} for found in splits.values())
    assert 0.1 < held / len(splits) < 0.3
    assert {row["licence"] for row in rows} == {"PSF-2.0"}
    by_package = {row.package: row for row in manifest.sources[0].packages}
    assert by_package["python-stdlib/json"].split == next(iter(splits["json"]))
    assert sum(row.bytes for row in by_package.values()) == sum(record.bytes for record in manifest.splits.values())


# --- duplicates and held-out documents ----------------------------------------------------------------


def test_a_text_is_kept_once_over_sources_and_splits(tmp_path: Path) -> None:
    a, b = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    a.write_text("".join(json.dumps({"text": text}) + "\n" for text in ["x = 1\ny\n", "x = 1  \r\ny", "z"]))
    b.write_text("".join(json.dumps({"text": text}) + "\n" for text in ["z\n\n", "  z", "x = 1\n\ny"]))
    sources = [parse_source({"kind": "jsonl", "path": str(path)}, "x") for path in (a, b)]
    manifest = built(sources, tmp_path / "out", held_out=0.5)
    assert sorted(all_texts(tmp_path / "out")) == ["  z", "x = 1\n\ny", "x = 1\ny\n", "z"]
    assert [source.duplicates for source in manifest.sources] == [1, 1]


def test_the_hash_of_everything_read(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name, text in (("a", b"one"), ("b", b"\xff"), ("c", b"one"), ("d", b"two")):
        (tmp_path / "in" / name).write_bytes(text)
    manifest = built(folder_source(tmp_path / "in"), tmp_path / "out", held_out=0)

    def sha256(data: bytes) -> bytes:
        return hashlib.sha256(data).digest()

    expected = bytes(32)
    for name, text in ((b"a", b"one"), (b"b", b""), (b"c", b"one"), (b"d", b"two")):
        expected = sha256(expected + sha256(name) + sha256(text))
    assert manifest.sources[0].sha256 == expected.hex()


def test_no_other_document_moves_one_between_the_splits(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"document {i}"}) for i in range(300)]
    path = tmp_path / "x.jsonl"
    source = parse_source({"kind": "jsonl", "path": str(path)}, "x")
    path.write_text("\n".join(lines[:200]))
    built(source, tmp_path / "some", held_out=0.1)
    path.write_text("\n".join(reversed(lines)))
    built(source, tmp_path / "more", held_out=0.1)
    built(source, tmp_path / "wider", held_out=0.3)
    some, more, wider = (
        {split: set(texts(tmp_path / n, split)) for split in SPLITS} for n in ("some", "more", "wider")
    )
    assert some["train"] < more["train"]
    assert some["heldout"] < more["heldout"] < wider["heldout"]
    assert 12 <= len(more["heldout"]) <= 50


@given(st.text(max_size=40), st.sampled_from(["", " ", "\n", "\t \n\n"]))
def test_white_space_at_ends_does_not_matter(text: str, tail: str) -> None:
    assume_utf8 = text.encode("utf-8", "replace").decode()
    assert normalised(assume_utf8 + tail) == normalised(assume_utf8)
    assert normalised(assume_utf8.replace("\n", "\r\n")) == normalised(assume_utf8)


def test_the_split_of_a_document_is_fixed() -> None:
    """Pinned: another rule would put documents that models were trained on into the held-out text."""

    def split(text: str, **more: Any) -> str:
        return split_of(Document("n", text, "MIT", 1, **more), digest(normalised(text)), 0.5)

    assert "".join(split(f"document {i}")[0] for i in range(16)) == "hthhtthhhthhtthh"
    package = Package("p", "1", "python-stdlib/json")
    assert {split(f"document {i}", package=package) for i in range(16)} == {"train"}
    assert {split(f"document {i}", key=b"same") for i in range(16)} == {split("x", key=b"same")}
    assert {split(f"document {i}", held_out=0.0) for i in range(16)} == {"train"}


# --- tokenizers ---------------------------------------------------------------------------------------


@given(st.lists(st.text(max_size=30), min_size=1, max_size=4))
@settings(max_examples=50)
def test_byte_ids_are_those_of_the_byte_tokenizer(some: list[str]) -> None:
    some = [text.encode("utf-8", "replace").decode() for text in some]
    tokenizer = byte_tokenizer()
    for text, ids in zip(some, ByteEncoder().encode(some), strict=True):
        assert ids.tolist() == [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    assert ByteEncoder().record.vocab_size == len(tokenizer)


def test_a_text_cannot_forge_the_end_of_a_document(tmp_path: Path) -> None:
    byte_tokenizer().save_pretrained(tmp_path)
    text = "a</s>b<s><pad>"
    folder = FolderEncoder(tmp_path)
    expected = [1, *(byte + 3 for byte in text.encode()), 2]
    assert ByteEncoder().encode([text])[0].tolist() == expected
    assert folder.encode([text, ""])[0].tolist() == expected
    assert folder.encode([text, ""])[1].tolist() == [1, 2]


def test_a_tokenizer_folder(tmp_path: Path, bpe: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("the end <end> of the line")
    manifest = built(folder_source(tmp_path / "in"), tmp_path / "out", tokenizer=str(bpe), held_out=0)
    record = manifest.tokenizer
    assert (record.kind, record.bos, record.eos) == ("folder", None, 1)
    ids = TokenData.open(tmp_path / "out", "train").read_document(0)
    assert ids[-1] == 1
    assert (ids[:-1] != 1).all()
    assert int(ids.max()) < record.vocab_size
    (bpe / "tokenizer.json").write_text((bpe / "tokenizer.json").read_text() + " ")
    with pytest.raises(UserError, match="holds another build: tokenizer is"):
        built(folder_source(tmp_path / "in"), tmp_path / "out", tokenizer=str(bpe), held_out=0)


@pytest.mark.parametrize("what", ["nosuch", "empty", "no_eos"])
def test_an_unusable_tokenizer_folder_is_named(tmp_path: Path, what: str) -> None:
    folder = tmp_path / what
    if what != "nosuch":
        folder.mkdir()
    if what == "no_eos":
        PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, "a"))).save_pretrained(folder)
    with pytest.raises(UserError, match=f"--tokenizer {folder}"):
        built(parse_source({"kind": "trace", "programs": 1}, "x"), tmp_path / "out", tokenizer=str(folder))


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_batches_come_back_in_order_however_long_they_take(monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    """With threads for processes, which take seconds to start; the slow test below has the real ones."""

    class Uneven(ByteEncoder):
        def encode(self, texts: Sequence[str]) -> list[Any]:
            time.sleep(0.01 if texts[0] in ("0", "4") else 0)
            return super().encode(texts)

    def threads(count: int, encoder: Any) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(count, initializer=encoders._start_worker, initargs=(encoder,))

    monkeypatch.setattr(encoders, "_pool", threads)
    taken = 0

    def batches() -> Iterator[tuple[int, list[str]]]:
        nonlocal taken
        for taken in range(1, 31):
            yield taken - 1, [str(taken - 1)]

    for number, (batch, ids) in enumerate(encoders.encode_in_order(Uneven(), batches(), workers=workers)):
        assert batch == number
        assert bytes((ids[0][1:-1] - 3).tolist()).decode() == str(number)
        assert taken <= number + 1 + 2 * workers  # never the whole corpus ahead
    assert number == 29


@pytest.mark.slow
def test_worker_processes_change_nothing(tmp_path: Path, bpe: Path, sentences: Path) -> None:
    source = parse_source({"kind": "jsonl", "path": str(sentences)}, "x")
    built(source, tmp_path / "one", tokenizer=str(bpe), held_out=0.1)
    built(source, tmp_path / "two", tokenizer=str(bpe), held_out=0.1, workers=2)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")


# --- interrupted builds -------------------------------------------------------------------------------


def parts(tmp_path: Path, sentences: Path) -> list[Source]:
    root = tmp_path / "folder"
    root.mkdir(exist_ok=True)
    if not any(root.iterdir()):
        for i in range(60):
            (root / f"{i}.txt").write_text(f"file {i // 2}\n" * 20)
    again = tmp_path / "again.jsonl"  # texts of the first source, met again after kills
    if not again.exists():
        again.write_text("".join(json.dumps({"text": f"file {i}\n" * 20}) + "\n" for i in range(40)))
    return [
        folder_source(root),
        parse_source({"kind": "jsonl", "path": str(sentences)}, "x"),
        parse_source({"kind": "jsonl", "path": str(again)}, "x"),
        parse_source({"kind": "trace", "programs": 100}, "x"),
        parse_source({"kind": "installed", "packages": ["good-pkg"]}, "x"),
    ]


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("plt_eval.corpus.builder._BATCH_DOCUMENTS", 30)
    return None


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.mark.usefixtures("small_batches", "site")
@pytest.mark.parametrize("save_every", [0.0, 1e9])
def test_a_build_stopped_anywhere_ends_the_same(
    tmp_path: Path, sentences: Path, monkeypatch: pytest.MonkeyPatch, save_every: float
) -> None:
    monkeypatch.setattr("plt_eval.corpus.builder.SAVE_EVERY_S", save_every)
    sources = parts(tmp_path, sentences)
    whole = built(sources, tmp_path / "whole", held_out=0.1, shard_tokens=3000)
    assert [source.duplicates for source in whole.sources[:3]] == [30, 0, 30]
    append, calls = ShardWriter.append, 0

    def dying(self: ShardWriter, ids: Any, *, text_bytes: int) -> None:
        nonlocal calls
        calls += 1
        if calls in (1, 30, 175, 176, 450, 520):
            raise Killed
        append(self, ids, text_bytes=text_bytes)

    monkeypatch.setattr(ShardWriter, "append", dying)
    deaths = 0
    while True:
        try:
            broken = built(sources, tmp_path / "broken", held_out=0.1, shard_tokens=3000)
            break
        except Killed:
            deaths += 1
            assert not (tmp_path / "broken" / MANIFEST).exists()
    assert deaths == 6
    assert files_of(tmp_path / "whole") == files_of(tmp_path / "broken")
    assert not (tmp_path / "broken" / WORK).exists()
    assert whole.model_dump(exclude={"created"}) == broken.model_dump(exclude={"created"})


@pytest.mark.usefixtures("small_batches", "site")
@pytest.mark.parametrize("move", [0, 1, 4, 6])
def test_a_build_killed_while_it_is_published_ends_the_same(
    tmp_path: Path, sentences: Path, monkeypatch: pytest.MonkeyPatch, move: int
) -> None:
    sources = parts(tmp_path, sentences)
    built(sources, tmp_path / "whole", shard_tokens=9000, held_out=0.1)
    real, calls = os.replace, 0

    def dying(source: Any, target: Any) -> None:
        nonlocal calls
        if Path(target).parent == tmp_path / "broken":  # and not the state, which is replaced as well
            calls += 1
            if calls == move + 1:
                raise Killed
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr("plt_eval.corpus.builder.os.replace", dying)
        with pytest.raises(Killed):
            built(sources, tmp_path / "broken", shard_tokens=9000, held_out=0.1)
    assert not (tmp_path / "broken" / MANIFEST).exists()
    built(sources, tmp_path / "broken", shard_tokens=9000, held_out=0.1)
    assert files_of(tmp_path / "whole") == files_of(tmp_path / "broken")


def _build_slowly(sources: list[Source], out: Path) -> None:
    import plt_eval.corpus.builder as module

    module.SAVE_EVERY_S = 0.0
    module._BATCH_DOCUMENTS = 20
    built(sources, out, shard_tokens=20_000, held_out=0.05)


def test_a_build_that_is_killed_outright_ends_the_same(tmp_path: Path) -> None:
    sources = [parse_source({"kind": "trace", "programs": 1500, "seed": seed}, "x") for seed in (1, 2)]
    built(sources, tmp_path / "whole", shard_tokens=20_000, held_out=0.05)
    fork = multiprocessing.get_context("fork")
    kills = 0
    for pause in (0.02, 0.1, 0.2):
        process = fork.Process(target=_build_slowly, args=(sources, tmp_path / "broken"))
        process.start()
        state = tmp_path / "broken" / WORK / "state.json"
        deadline = time.monotonic() + 20
        while not state.exists() and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(pause)
        if process.is_alive():
            process.kill()
            kills += 1
        process.join()
    assert kills
    built(sources, tmp_path / "broken", shard_tokens=20_000, held_out=0.05)
    assert files_of(tmp_path / "whole") == files_of(tmp_path / "broken")


def test_ctrl_c_says_how_to_go_on(tmp_path: Path, sentences: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    source = parse_source({"kind": "jsonl", "path": str(sentences)}, "x")
    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "append", interrupt)
        with pytest.raises(BuildInterrupted, match="run the same command again"):
            built(source, tmp_path / "out")
    assert built(source, tmp_path / "out").sources[0].kept.documents == 400


def test_a_complete_build_is_not_done_again_and_another_is_refused(tmp_path: Path, sentences: Path) -> None:
    source = parse_source({"kind": "jsonl", "path": str(sentences)}, "x")
    first = built(source, tmp_path / "out")
    sentences.unlink()  # nothing is read again
    assert built(source, tmp_path / "out") == first
    for options in ({"held_out": 0.2}, {"shard_tokens": 7}, {"name": "other"}):
        with pytest.raises(UserError, match=f"holds another build: {next(iter(options))} is"):
            built(source, tmp_path / "out", **options)
    with pytest.raises(UserError, match="holds another build: sources is"):
        built(parse_source({"kind": "trace", "programs": 3}, "x"), tmp_path / "out")
    (tmp_path / "out" / "train-00000.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"train-00000\.bin: found 0 bytes.*delete"):
        built(source, tmp_path / "out")


def test_another_request_for_an_unfinished_build_is_refused(
    tmp_path: Path, sentences: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: Any, **__: Any) -> None:
        raise Killed

    source = parse_source({"kind": "jsonl", "path": str(sentences)}, "x")
    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "append", die)
        with pytest.raises(Killed):
            built(source, tmp_path / "out")
    with pytest.raises(UserError, match=r"holds another build: held_out is 0\.01 there, asked for 0\.3"):
        built(source, tmp_path / "out", held_out=0.3)
    with sentences.open("a") as stream:
        stream.write('{"text": "more"}\n')
    with pytest.raises(UserError, match="changed since the build"):
        built(source, tmp_path / "out")


def test_only_one_process_builds_in_a_folder(tmp_path: Path, sentences: Path) -> None:
    import filelock

    (tmp_path / "out").mkdir()
    source = parse_source({"kind": "jsonl", "path": str(sentences)}, "x")
    with (
        filelock.FileLock(tmp_path / "out" / ".lock"),
        pytest.raises(UserError, match="another process is building there"),
    ):
        built(source, tmp_path / "out")
    first = built(source, tmp_path / "out")
    with filelock.FileLock(tmp_path / "out" / ".lock", timeout=0):
        assert built(source, tmp_path / "out") == first  # what is complete is read by any number of trainings


def test_sources_without_a_document_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": " "}\n{"text": null}\n')
    with pytest.raises(UserError, match="the sources hold no document; rejected: 1 empty, 1 no text"):
        built(parse_source({"kind": "jsonl", "path": str(tmp_path / "x.jsonl")}, "x"), tmp_path / "out")


# --- recipes and the command line ---------------------------------------------------------------------


def recipe(**sources: dict[str, Any] | None) -> Any:
    entries = [SimpleNamespace(name=name, weight=1.0, source=source) for name, source in sources.items()]
    return SimpleNamespace(tokenizer="bytes", data=entries)


def test_every_entry_of_a_recipe_is_built(tmp_path: Path, sentences: Path, bpe: Path) -> None:
    wanted = recipe(a={"kind": "jsonl", "path": str(sentences)}, b={"kind": "trace", "programs": 50})
    manifests = build_recipe_data(wanted, tmp_path / "data", quiet())
    assert set(manifests) == {"a", "b"}
    assert build_recipe_data(wanted, tmp_path / "data", quiet()) == manifests
    assert build_recipe_data(recipe(a=None), tmp_path / "data", quiet()) == {"a": manifests["a"]}
    with pytest.raises(UserError, match=r"entry c has no source, and .*holds no token data"):
        build_recipe_data(recipe(c=None), tmp_path / "data", quiet())
    other = recipe(a=None)
    other.tokenizer = str(bpe)
    with pytest.raises(UserError, match=r"a: made with the tokenizer bytes, the recipe's is .*, which differs"):
        build_recipe_data(other, tmp_path / "data", quiet())
    with pytest.raises(UserError, match="recipe: data entry c: kind must be one of"):
        build_recipe_data(recipe(c={"kind": "web"}), tmp_path / "data", quiet())


def test_a_recipe_s_data_keep_the_share_and_the_shards_they_have(tmp_path: Path, sentences: Path) -> None:
    wanted = recipe(a={"kind": "jsonl", "path": str(sentences)}, b={"kind": "trace", "programs": 50})
    first = build_recipe_data(wanted, tmp_path / "data", quiet(), held_out=0.2, shard_tokens=5000)
    assert {(m.held_out, m.shard_tokens) for m in first.values()} == {(0.2, 5000)}
    assert build_recipe_data(wanted, tmp_path / "data", quiet()) == first
    with pytest.raises(UserError, match=r"holds another build: held_out is 0\.2 there, asked for 0\.01"):
        build_recipe_data(wanted, tmp_path / "data", quiet(), held_out=0.01)
    with pytest.raises(UserError, match=r"holds another build: shard_tokens is 5000 there, asked for 6000"):
        build_recipe_data(wanted, tmp_path / "data", quiet(), shard_tokens=6000)
    new = build_recipe_data(wanted, tmp_path / "new", quiet())
    assert {(m.held_out, m.shard_tokens) for m in new.values()} == {(0.01, 1 << 27)}
    whole = build_recipe_data(wanted, tmp_path / "whole", quiet(), held_out=0)
    assert build_recipe_data(wanted, tmp_path / "whole", quiet()) == whole


def test_a_recipe_s_begun_data_go_on_with_the_share_they_have(
    tmp_path: Path, sentences: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of all entries: the one that was stopped, and those after it."""

    def die(*_: Any, **__: Any) -> None:
        raise Killed

    wanted = recipe(a={"kind": "jsonl", "path": str(sentences)}, b={"kind": "trace", "programs": 50})
    whole = build_recipe_data(wanted, tmp_path / "whole", quiet(), held_out=0.2, shard_tokens=5000)
    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "append", die)
        with pytest.raises(Killed):
            build_recipe_data(wanted, tmp_path / "data", quiet(), held_out=0.2, shard_tokens=5000)
    went_on = build_recipe_data(wanted, tmp_path / "data", quiet())
    assert {name: manifest.splits for name, manifest in went_on.items()} == {n: m.splits for n, m in whole.items()}


def test_a_damaged_folder_of_a_recipe_is_named(tmp_path: Path) -> None:
    wanted = recipe(a={"kind": "trace", "programs": 50})
    (tmp_path / "a" / WORK).mkdir(parents=True)
    (tmp_path / "a" / WORK / "state.json").write_text("{")
    with pytest.raises(UserError, match="damaged state of a build"):
        build_recipe_data(wanted, tmp_path, quiet())
    (tmp_path / "a" / MANIFEST).write_text("{")
    with pytest.raises(UserError, match=r"delete .* to build it again"):
        build_recipe_data(wanted, tmp_path, quiet())


def exits(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return int(caught.value.code or 0), out, err


def test_build_and_show(capsys: pytest.CaptureFixture[str], tmp_path: Path, sentences: Path) -> None:
    out = tmp_path / "mine"
    line = ("data", "build", "--out", out, "--source", f"kind=jsonl,path={sentences},licence=MIT", "--held-out", "0.1")
    code, stdout, _ = exits(capsys, *line)
    assert code == 0
    assert "mine" in stdout
    code, stdout, _ = exits(capsys, "data", "show", out, "--verify")
    assert code == 0
    assert "MIT" in stdout
    assert "every file has the SHA-256" in stdout
    code, stdout, _ = exits(capsys, "data", "show", tmp_path, "--json")
    assert json.loads(stdout)[str(out)]["sources"][0]["kept"]["documents"] == 400
    shard = bytearray((out / "train-00000.bin").read_bytes())
    shard[0] ^= 1
    (out / "train-00000.bin").write_bytes(shard)
    assert exits(capsys, "data", "show", out)[0] == 0
    code, _, stderr = exits(capsys, "data", "show", out, "--verify")
    assert code == 2
    assert "train-00000.bin: SHA-256 is" in stderr


def test_build_a_recipe_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(
        "name: r\nmodel: {}\ndata:\n  - {name: t, source: {kind: trace, programs: 300}}\n"
        "sequence_length: 64\ntokens: 6400\nbatch_tokens: 640\noptimizer: {lr: 0.001}\n"
    )
    code, _, stderr = exits(capsys, "data", "build", "--recipe", path, "--out", tmp_path / "data")
    assert code == 0, stderr
    assert TokenData.open(tmp_path / "data" / "t", "train").documents > 200

    line = ("data", "build", "--recipe", path, "--out", tmp_path / "more")
    code, _, stderr = exits(capsys, *line, "--held-out", "0.2", "--shard-tokens", "5000")
    assert code == 0, stderr
    assert exits(capsys, *line)[0] == 0
    code, _, stderr = exits(capsys, *line, "--held-out", "0.1")
    assert code == 2
    assert "held_out is 0.2 there, asked for 0.1" in stderr


def test_show_tells_folders_of_one_name_apart(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    trace = parse_source({"kind": "trace", "programs": 50}, "x")
    for folder, name in (("[b]a", "same"), ("b", "same"), ("c", "other")):
        built(trace, tmp_path / "all" / folder, name=name)
    code, stdout, _ = exits(capsys, "data", "show", "all")
    assert code == 0
    rows = [line.split("│")[1].strip() for line in stdout.splitlines() if line.count("│") == 7]
    assert sorted(set(rows)) == ["all/[b]a", "all/b", "other"]
    assert len(rows) == 6
    for title in ("sources of all/[b]a", "sources of all/b", "sources of other"):
        assert title in stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give either --recipe or --source"),
        (["--recipe", "x", "--source", "kind=installed"], "give either --recipe or --source"),
        (["--recipe", "x", "--tokenizer", "bytes"], "--tokenizer has no effect with --recipe"),
        (["--recipe", "nosuch.yaml"], "nosuch.yaml"),
        (["--source", "kind=folder,path=/nosuch"], "source folder: path /nosuch is not a folder"),
        (["--source", "kind=jsonl,path=/nosuch/*.jsonl"], "no file is called /nosuch/*.jsonl"),
        (["--source", "kind=trace,programs=3", "--workers", "2"], "--workers 2 has no effect"),
        (["--source", "kind=trace,programs=3", "--held-out", "1"], "--held-out 1.0: expected"),
        (["--source", "kind=installed", "--held-out", "0.1"], "--held-out has no effect"),
        (["--source", "kind=trace,programs=3", "--shard-tokens", "0"], "--shard-tokens 0: expected"),
        (["--source", "kind=trace,programs=3", "--tokenizer", "/nosuch"], "--tokenizer /nosuch"),
    ],
)
def test_mistakes_are_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, options: list[str], message: str
) -> None:
    code, _, stderr = exits(capsys, "data", "build", "--out", tmp_path / "out", *options)
    assert code == 2
    assert message in stderr
    assert stderr.startswith("plt-eval: error: ")
    assert stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("/work/family/data", "data"),
        ("/work/family/data/", "data"),
        ("--out=/work/family/data", "--out=data"),
        ("kind=folder,path=/home/me/src,glob=**/*.py", "kind=folder,path=src,glob=**/*.py"),
        ("recipes/tiny.yaml", "recipes/tiny.yaml"),
        ("0.05", "0.05"),
        ("/", "/"),
    ],
)
def test_a_bundled_manifest_names_no_folder_of_the_machine(tmp_path: Path, argument: str, expected: str) -> None:
    script = runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "bundle_family.py"))
    manifest = built(parse_source({"kind": "trace", "programs": 50}, "x"), tmp_path, command=("plt-eval", argument))
    text = script["portable_manifest"]((tmp_path / MANIFEST).read_text())
    assert Manifest.model_validate_json(text) == manifest.model_copy(update={"command": ("plt-eval", expected)})
    assert script["portable_manifest"](text) == text


def test_ctrl_c_on_the_command_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ShardWriter, "append", interrupt)
    code, _, stderr = exits(capsys, "data", "build", "--out", tmp_path / "o", "--source", "kind=trace,programs=9")
    assert code == 130
    assert "run the same command again to go on" in stderr


def test_an_empty_split_is_warned_of(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, _, stderr = exits(capsys, "data", "build", "--out", tmp_path / "o", "--source", "kind=trace,programs=2")
    assert code == 0
    assert "warning: o: no document is in the split heldout" in stderr


def test_a_log_gets_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("plt_eval.progress.LOG_EVERY_S", 0.0)
    console = quiet()
    with BuildProgress(console, "toy") as progress:
        progress.source("toy: jsonl", 200, 50, 7)
        progress.advance(50, 3, 1000)
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue().startswith("toy: jsonl: 50% read, 10 documents, ")
