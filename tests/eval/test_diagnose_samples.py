"""What a diagnosis reads: where texts are found, which are drawn, and in what order."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from plt_benchmarks.registry import get_suite
from plt_eval.corpus import build, parse_source
from plt_eval.corpus.documents import Document, Rejected
from plt_eval.corpus.encoders import ByteEncoder
from plt_eval.diagnosis.samples import Drawn, TextCorpus, draw, open_corpus
from plt_eval.errors import UserError
from plt_model.training.shards import TokenData

BYTES = ByteEncoder()


def corpus(texts: list[str], windows: bool = False) -> TextCorpus:
    def read() -> Iterator[Document | Rejected]:
        for number, text in enumerate(texts):
            yield Document(f"#{number}", text, "", len(text))

    return TextCorpus("made-up", "made up", windows, read)


def drawn(spec: Path | str, *, field: str | None = None, samples: int = 1000, length: int = 4096) -> Drawn:
    found = open_corpus(str(spec), field=field)
    return draw([found], tokenizer="bytes", samples=samples, sequence_length=length)


def texts(found: Drawn) -> dict[str, str]:
    """By id, what the samples say; they must be whole."""
    read = {}
    for sample in found.samples:
        ids = sample.ids.tolist()
        assert (ids[0], ids[-1]) == (1, 2)
        read[sample.id] = bytes(token - 3 for token in ids[1:-1]).decode()
    return read


# --- drawing ------------------------------------------------------------------------------------------------

TEXTS = st.lists(st.text(st.characters(codec="utf-8"), max_size=12), min_size=1, max_size=12)


@given(texts=TEXTS, seed=st.integers(0, 3), length=st.integers(1, 8), count=st.integers(1, 12), data=st.data())
@settings(max_examples=150)
def test_the_order_is_that_of_the_texts_and_the_seed_alone(
    texts: list[str], seed: int, length: int, count: int, data: st.DataObject
) -> None:
    real = {text for text in texts if text}
    if not real:
        with pytest.raises(UserError, match=r"made up: no text in it: \d+ empty"):
            draw([corpus(texts)], tokenizer="bytes", samples=count, sequence_length=length, seed=seed)
        return
    every = draw([corpus(texts)], tokenizer="bytes", samples=99, sequence_length=length, seed=seed)
    assert Counter(sample.ids.tobytes() for sample in every.samples) == Counter(
        BYTES.encode([text])[0][:length].astype(np.int64).tobytes() for text in real
    ), "each text once, its beginning"
    assert (every.candidates, sum(every.left_out.values())) == (len(real), len(texts) - len(real))
    shuffled = data.draw(st.permutations(texts))
    again = draw([corpus(shuffled)], tokenizer="bytes", samples=99, sequence_length=length, seed=seed)
    hashes = [sample.sha256 for sample in every.samples]
    assert [sample.sha256 for sample in again.samples] == hashes, "whatever order the texts are read in"
    assert again.sha256 == every.sha256
    fewer = draw([corpus(texts)], tokenizer="bytes", samples=count, sequence_length=length, seed=seed)
    assert [sample.sha256 for sample in fewer.samples] == hashes[:count], "fewer are the beginning of more"
    assert [sample.index for sample in every.samples] == list(range(len(real)))
    assert every.tokens == sum(len(sample.ids) for sample in every.samples)


def test_another_seed_is_another_order_and_another_hash() -> None:
    many = corpus([str(number) for number in range(200)])
    orders = [
        [s.id for s in draw([many], tokenizer="bytes", samples=50, sequence_length=9, seed=seed).samples]
        for seed in (0, 1)
    ]
    assert orders[0] != orders[1]
    assert 5 < len({*orders[0]} & {*orders[1]}) < 25, "a quarter of each is in the other"
    assert orders[0] != sorted(orders[0], key=lambda name: int(name[1:]))


@given(texts=TEXTS.filter(any), length=st.integers(1, 6))
@settings(max_examples=100)
def test_windows_stand_side_by_side(texts: list[str], length: int) -> None:
    found = draw([corpus(texts, windows=True)], tokenizer="bytes", samples=999, sequence_length=length)
    assert found.windows
    assert found.candidates == len(found.samples)
    pieces: dict[str, dict[int, list[int]]] = {}
    for sample in found.samples:
        name, _, start = sample.id.rstrip("]").partition("[")
        pieces.setdefault(name, {})[int(start)] = sample.ids.tolist()
    whole = {name: [token for start in sorted(parts) for token in parts[start]] for name, parts in pieces.items()}
    assert sorted(whole.values()) == sorted(BYTES.encode([text])[0].tolist() for text in {*texts} if text)
    beginnings = draw([corpus(texts, True)], tokenizer="bytes", samples=99, sequence_length=length, windows=False)
    assert len(beginnings.samples) == len({text for text in texts if text})


def test_several_sources_take_turns() -> None:
    one, two = corpus(["a", "b", "c"]), corpus(["x"])
    found = draw([one, two], tokenizer="bytes", samples=3, sequence_length=9)
    assert [bytes(s.ids[1:-1].astype(np.uint8) - 3) in (b"x",) for s in found.samples] == [False, True, False]
    assert (found.candidates, found.name) == (4, "made-up+made-up")


def test_a_text_may_give_one_token() -> None:
    found = draw([corpus(["abc"])], tokenizer="bytes", samples=1, sequence_length=1)
    assert found.samples[0].ids.tolist() == [1]


# --- files ----------------------------------------------------------------------------------------------------


def write_rows(path: Path, rows: list[dict[str, object]]) -> Path:
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines.encode()))
    else:
        path.write_text(lines)
    return path


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz", "x.parquet"])
@pytest.mark.parametrize(
    ("row", "field", "expected"),
    [
        ({"text": "t", "content": "c"}, None, "t"),
        ({"content": "c", "prompt": "p"}, None, "c"),
        ({"prompt": "p=", "canonical_solution": "1", "id": 3}, None, "p=1"),
        ({"text": "t", "content": "c"}, "content", "c"),
        ({"a": "x", "b": "y"}, "b+a", "yx"),
    ],
    ids=["text", "content", "problem", "named", "joined"],
)
def test_the_text_of_a_row(tmp_path: Path, name: str, row: dict[str, object], field: str | None, expected: str) -> None:
    path = tmp_path / name
    other = {key: f"{value}!" for key, value in row.items()}
    if name.endswith("parquet"):
        parquet.write_table(pa.Table.from_pylist([{k: str(v) for k, v in r.items()} for r in (row, other)]), path)
    else:
        write_rows(path, [row, other])
    found = texts(drawn(path, field=field))
    assert expected in found.values()
    assert len(found) == 2
    assert all(key.startswith(name) for key in found), "and a row says where it is"
    assert not drawn(path, field=field).windows


def test_rows_without_the_field_name_what_they_have(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "x.jsonl", [{"code": "a", "lang": "b"}])
    with pytest.raises(UserError, match=r"--data .*x\.jsonl:1: .*has code, lang; looked for text, content, .* --field"):
        drawn(path)
    with pytest.raises(UserError, match=r"--data .*x\.jsonl:1: no field source, it has code, lang$"):
        drawn(path, field="source")
    assert texts(drawn(path, field="code")) == {"x.jsonl:1": "a"}


def test_one_file_is_cut_into_windows_and_a_folder_is_not(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("abcdefgh")
    (tmp_path / "two.py").write_text("\ufeffx = 'é'\n")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_text("hidden")
    (tmp_path / "image.bin").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "empty.md").write_text("")
    write_rows(tmp_path / "rows.jsonl", [{"text": "row"}, {"text": "row"}, {"text": None}])
    found = drawn(tmp_path)
    assert texts(found) == {"one.txt": "abcdefgh", "two.py": "x = 'é'\n", "rows.jsonl:1": "row"}
    assert found.left_out == {"not UTF-8": 1, "empty": 1, "there already": 1, "no text": 1}
    assert found.name == tmp_path.name
    assert not found.windows
    one = drawn(tmp_path / "one.txt", length=4)
    assert one.windows
    assert {sample.id for sample in one.samples} == {"one.txt[0]", "one.txt[4]", "one.txt[8]"}
    assert {len(sample.ids) for sample in one.samples} == {4, 2}


def test_half_characters_are_left_out(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "x.jsonl", [{"text": "\ud800"}, {"text": "fine"}])
    found = drawn(path)
    assert texts(found) == {"x.jsonl:2": "fine"}
    assert found.left_out == {"with half a character": 1}


def test_what_has_no_text_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no file in it"):
        drawn(tmp_path)
    (tmp_path / "x.jsonl").write_text("")
    with pytest.raises(UserError, match=r"x\.jsonl: no text in it$"):
        drawn(tmp_path / "x.jsonl")
    (tmp_path / "x.jsonl").write_text("{\n")
    with pytest.raises(UserError, match=r"x\.jsonl:1: not JSON"):
        drawn(tmp_path / "x.jsonl")


def test_an_option_without_effect_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abc")
    for where in (tmp_path / "a.txt", tmp_path, "trace"):
        with pytest.raises(UserError, match=r"--field has no effect with --data"):
            drawn(where, field="text")


# --- token data and sets ----------------------------------------------------------------------------------------


def test_token_data_give_their_held_out_documents(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "texts.jsonl", [{"text": f"text {number}"} for number in range(300)])
    source = parse_source({"kind": "jsonl", "path": str(rows)}, "here")
    build([source], "bytes", tmp_path / "built", name="built", held_out=0.2)
    data = TokenData.open(tmp_path / "built", "heldout")
    assert 20 < data.documents < 150
    found = draw([open_corpus(str(tmp_path / "built"))], tokenizer=None, samples=999, sequence_length=99)
    held = {data.read_document(i).tobytes() for i in range(data.documents)}
    assert {sample.ids.tobytes() for sample in found.samples} == held
    assert len(found.samples) == found.candidates == data.documents
    assert (found.name, found.tokenizer) == ("built", "bytes")
    fewer = draw([open_corpus(str(tmp_path / "built"))], tokenizer=None, samples=7, sequence_length=3)
    assert [s.id for s in fewer.samples] == [s.id for s in found.samples][:7]
    assert [s.ids.tolist() for s in fewer.samples] == [s.ids[:3].tolist() for s in found.samples[:7]]
    assert [s.id for s in fewer.samples] != sorted(s.id for s in fewer.samples)
    cut = draw([open_corpus(str(tmp_path / "built"))], tokenizer=None, samples=9999, sequence_length=3, windows=True)
    assert sum(len(sample.ids) for sample in cut.samples) == data.tokens
    mixed = draw([open_corpus(str(tmp_path / "built")), corpus(["a"])], tokenizer="bytes", samples=4, sequence_length=9)
    assert mixed.tokenizer_sha256 == found.tokenizer_sha256, "one tokenizer made both"


def test_a_manifest_of_something_else_is_a_text(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"name": "a web page"}')
    assert texts(drawn(tmp_path)) == {"manifest.json": '{"name": "a web page"}'}


def test_a_set_is_its_problems_with_their_solutions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (suite,) = get_suite("trace")
    problems = suite.load(None).samples
    found = drawn("trace")
    expected = {p.id: p.data["prompt"] + p.data["canonical_solution"] for p in problems}
    read = texts(found)
    assert set(read.values()) == set(expected.values())
    assert all(expected[name] == text for name, text in read.items())
    assert drawn("Trace", samples=5).sha256 == drawn("trace", samples=5).sha256
    monkeypatch.chdir(tmp_path)
    (tmp_path / "trace").write_text("a file")
    assert texts(drawn("./trace")).popitem()[1] == "a file"


def test_an_unknown_name_suggests_a_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"--data humanevl: no such file or folder, nor a set \(did you mean humaneval"):
        open_corpus("humanevl")
