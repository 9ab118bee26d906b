"""Token data on disk: what is written is what is read, and damage is named."""

from __future__ import annotations

import json
import pickle
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plt_model.training.shards import (
    MANIFEST,
    SPLITS,
    Manifest,
    ShardError,
    ShardWriter,
    Split,
    SplitRecord,
    TokenData,
    TokenizerRecord,
    WriterState,
    dtype_for,
    read_manifest,
)

Documents = list[list[int]]


def write_split(folder: Path, split: Split, documents: Documents, *, vocab_size: int, shard_tokens: int) -> SplitRecord:
    writer = ShardWriter(folder, split, vocab_size=vocab_size, shard_tokens=shard_tokens)
    for number, document in enumerate(documents):
        writer.append(np.array(document), text_bytes=10 * number + 1)
    return writer.close()


def write_data(
    folder: Path, train: Documents, heldout: Documents = (), *, vocab_size: int = 300, shard_tokens: int = 7
) -> Path:
    folder.mkdir(exist_ok=True)
    splits = {
        split: write_split(folder, split, list(documents), vocab_size=vocab_size, shard_tokens=shard_tokens)
        for split, documents in zip(SPLITS, (train, heldout), strict=True)
    }
    manifest = Manifest(
        name="toy",
        created=datetime.now(UTC),
        plt_eval_version="0",
        command=(),
        tokenizer=TokenizerRecord(kind="bytes", sha256="", vocab_size=vocab_size, bos=1, eos=2),
        dtype=dtype_for(vocab_size),
        shard_tokens=shard_tokens,
        held_out=0.0,
        held_out_rule="",
        dedup_rule="",
        splits=splits,
        sources=(),
        files=None,
        request={},
    )
    (folder / MANIFEST).write_text(manifest.model_dump_json())
    return folder


THREE: Documents = [[1, 5, 6, 2], [1, 2], [1, 7, 8, 9, 10, 11, 12, 13, 14, 15, 299, 2]]


@given(
    documents=st.lists(st.lists(st.integers(0, 69_999), min_size=1, max_size=20), max_size=8),
    shard_tokens=st.integers(1, 30),
    wide=st.booleans(),
    data=st.data(),
)
@settings(max_examples=40)
def test_any_stretch_reads_as_it_was_written(
    tmp_path_factory: pytest.TempPathFactory, documents: Documents, shard_tokens: int, wide: bool, data: st.DataObject
) -> None:
    vocab_size = 70_000 if wide else 65_536
    documents = [[token % vocab_size for token in document] for document in documents]
    folder = write_data(tmp_path_factory.mktemp("data"), documents, vocab_size=vocab_size, shard_tokens=shard_tokens)
    flat = [token for document in documents for token in document]
    opened = TokenData.open(folder, "train")
    assert (opened.tokens, opened.documents) == (len(flat), len(documents))
    start = data.draw(st.integers(0, len(flat)))
    count = data.draw(st.integers(0, len(flat) - start))
    read = opened.read(start, count)
    assert read.dtype == np.int64
    assert read.tolist() == flat[start : start + count]
    assert [opened.read_document(index).tolist() for index in range(len(documents))] == documents
    sizes = [shard.tokens for shard in opened.manifest.splits["train"].shards]
    assert all(size == shard_tokens for size in sizes[:-1])
    assert all(
        (folder / f"train-{i:05d}.bin").stat().st_size == size * (4 if wide else 2) for i, size in enumerate(sizes)
    )
    opened.verify()


def test_documents_have_their_starts_and_bytes(tmp_path: Path) -> None:
    opened = TokenData.open(write_data(tmp_path / "d", THREE), "train")
    assert opened.document_starts().tolist() == [0, 4, 6, 18]
    assert opened.document_bytes().tolist() == [1, 11, 21]
    assert (opened.bytes, opened.vocab_size, len(opened)) == (33, 300, 18)


def test_the_format_is_little_endian_and_flat(tmp_path: Path) -> None:
    folder = write_data(tmp_path / "d", [[1, 258, 2]])
    assert (folder / "train-00000.bin").read_bytes() == b"\x01\x00\x02\x01\x02\x00"
    assert (folder / "train.docs.bin").read_bytes() == bytes(8) + b"\x01" + bytes(7)


def test_a_split_without_documents_leaves_no_file(tmp_path: Path) -> None:
    folder = write_data(tmp_path / "d", THREE)
    empty = TokenData.open(folder, "heldout")
    assert (empty.tokens, empty.documents, empty.document_starts().tolist()) == (0, 0, [0])
    assert empty.read(0, 0).tolist() == []
    assert not list(folder.glob("heldout*"))


@pytest.mark.parametrize(("start", "count"), [(-1, 2), (0, 19), (18, 1), (3, -1)])
def test_reading_outside_is_refused(tmp_path: Path, start: int, count: int) -> None:
    opened = TokenData.open(write_data(tmp_path / "d", THREE), "train")
    with pytest.raises(IndexError, match="of 18"):
        opened.read(start, count)


def test_another_process_maps_the_files_itself(tmp_path: Path) -> None:
    opened = TokenData.open(write_data(tmp_path / "d", [[1, *[9] * 10_000, 2]], shard_tokens=4096), "train")
    pickled = pickle.dumps(opened)
    assert len(pickled) < 1000
    assert pickle.loads(pickled).read(4090, 20).tolist() == opened.read(4090, 20).tolist()


@pytest.mark.parametrize("shard_tokens", [1, 5, 6, 18, 100])
@pytest.mark.parametrize("kept", [0, 1, 2, 3])
def test_going_on_from_a_state_gives_the_same_files(tmp_path: Path, shard_tokens: int, kept: int) -> None:
    def write(folder: Path, *, interrupted: bool) -> tuple[SplitRecord, dict[str, bytes]]:
        folder.mkdir()
        writer = ShardWriter(folder, "train", vocab_size=300, shard_tokens=shard_tokens)
        for number, document in enumerate(THREE):
            if interrupted and number == kept:
                state = writer.sync()
                for extra in ([3] * 40, [4]):  # written after the state, and lost
                    writer.append(np.array(extra), text_bytes=5)
                writer.abandon()
                state = WriterState.model_validate_json(state.model_dump_json())
                writer = ShardWriter(folder, "train", vocab_size=300, shard_tokens=shard_tokens, state=state)
            writer.append(np.array(document), text_bytes=7)
        return writer.close(), {path.name: path.read_bytes() for path in folder.iterdir()}

    assert write(tmp_path / "a", interrupted=True) == write(tmp_path / "b", interrupted=False)


@pytest.mark.parametrize(("ids", "message"), [([], "at least one token"), ([1, 300], "300"), ([-1], "-1")])
def test_a_document_that_the_format_cannot_hold_is_refused(tmp_path: Path, ids: list[int], message: str) -> None:
    writer = ShardWriter(tmp_path, "train", vocab_size=300, shard_tokens=10)
    array: npt.NDArray[np.int64] = np.array(ids, dtype=np.int64)
    with pytest.raises(ShardError, match=message):
        writer.append(array, text_bytes=1)
    assert writer.close().tokens == 0


def test_a_state_without_its_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"train\.docs\.bin: found 0 bytes, expected at least 16"):
        ShardWriter(tmp_path, "train", vocab_size=9, shard_tokens=9, state=WriterState(open_tokens=1, documents=1))


# --- damage -------------------------------------------------------------------------------------------


def test_no_manifest(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"holds no token data: it has no manifest\.json"):
        TokenData.open(tmp_path, "train")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [("schema_version", 2, "schema_version"), ("shard_tokens", "many", "shard_tokens"), ("surprise", 1, "surprise")],
)
def test_a_manifest_that_cannot_be_understood(tmp_path: Path, field: str, value: object, message: str) -> None:
    path = write_data(tmp_path / "d", THREE) / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(ShardError, match=message) as caught:
        read_manifest(path.parent)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_manifest_that_does_not_add_up(tmp_path: Path) -> None:
    path = write_data(tmp_path / "d", THREE) / MANIFEST
    manifest = json.loads(path.read_text())
    manifest["splits"]["train"]["tokens"] += 1
    path.write_text(json.dumps(manifest))
    with pytest.raises(ShardError, match="the shards hold 18 tokens, the split says 19"):
        read_manifest(path.parent)


@pytest.mark.parametrize("file", ["train-00001.bin", "train.docs.bin"])
def test_a_file_of_another_size_or_missing_is_named(tmp_path: Path, file: str) -> None:
    folder = write_data(tmp_path / "d", THREE)
    with (folder / file).open("ab") as stream:
        stream.write(b"x")
    with pytest.raises(ShardError, match=rf"{file}: found \d+ bytes, the manifest says"):
        TokenData.open(folder, "train")
    (folder / file).unlink()
    with pytest.raises(ShardError, match=f"{file}: missing"):
        TokenData.open(folder, "train")


@pytest.mark.parametrize("file", ["train-00001.bin", "train.docs.bin"])
def test_verify_finds_one_changed_byte(tmp_path: Path, file: str) -> None:
    folder = write_data(tmp_path / "d", THREE)
    data = bytearray((folder / file).read_bytes())
    data[3] ^= 1
    (folder / file).write_bytes(data)
    opened = TokenData.open(folder, "train")
    with pytest.raises(ShardError, match=f"{file}: SHA-256 is"):
        opened.verify()
