"""Reading the problems: the real files, folders, a server, and everything that can be wrong with them."""

from __future__ import annotations

import gzip
import hashlib
import http.server
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from plt_benchmarks import datafiles
from plt_benchmarks.code import HUMANEVAL, MBPP, EvalPlusSuite
from plt_benchmarks.datafiles import Release
from plt_benchmarks.protocols import SuiteError

ROW: dict[str, Any] = {
    "task_id": "HumanEval/0",
    "prompt": "def f(x):\n",
    "entry_point": "f",
    "canonical_solution": "    return x\n",
    "base_input": [[1]],
    "plus_input": [[2]],
    "atol": 0,
}


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(("suite", "count"), [(HUMANEVAL, 164), (MBPP, 378)], ids=["humaneval", "mbpp"])
def test_the_releases_are_known_by_their_content(suite: EvalPlusSuite, count: int, data_folder: Path) -> None:
    data = suite.load(data_folder)
    assert len(data.samples) == count
    assert data.revision == suite.release.name
    assert data.sha256 == suite.release.sha256
    assert Path(data.source).name == f"{suite.release.stem}.jsonl.gz"
    content = gzip.decompress(Path(data.source).read_bytes())
    assert hashlib.md5(content).hexdigest() == suite.release.md5
    assert [sample.id for sample in data.samples] == [json.loads(line)["task_id"] for line in content.splitlines()]


def test_a_partial_file_is_local_data(data_folder: Path) -> None:
    data = HUMANEVAL.load(data_folder / "humanevalplus" / "HumanEvalPlus-Mini.jsonl.gz")
    assert len(data.samples) == 164
    assert data.revision == "local:HumanEvalPlus-Mini.jsonl.gz"
    assert data.sha256 != HUMANEVAL.release.sha256


def test_a_folder_gives_its_full_file_before_partial_ones(tmp_path: Path) -> None:
    sub = tmp_path / "a"
    sub.mkdir()
    write(sub / "HumanEvalPlus-Mini.jsonl", ROW)
    assert HUMANEVAL.load(tmp_path).revision == "local:HumanEvalPlus-Mini.jsonl"
    write(tmp_path / "HumanEvalPlus-NoExtreme.jsonl", ROW)
    (tmp_path / "HumanEvalPlus.jsonl").mkdir()
    full = sub / "HumanEvalPlus-v0.1.10.jsonl.gz"
    full.write_bytes(gzip.compress(json.dumps(ROW).encode()))
    assert HUMANEVAL.load(tmp_path).source == str(full)
    write(sub / "HumanEvalPlus.jsonl", ROW)
    assert HUMANEVAL.load(tmp_path).source == str(sub / "HumanEvalPlus.jsonl")


def test_own_problems_in_the_official_format(tmp_path: Path) -> None:
    rows = [{**ROW, "task_id": f"Mine/{i}"} for i in range(3)]
    for suite in (HUMANEVAL, MBPP):
        data = suite.load(write(tmp_path / "mine.jsonl", "", *rows, "  "))
        assert [sample.id for sample in data.samples] == ["Mine/0", "Mine/1", "Mine/2"]
        assert data.revision == "local:mine.jsonl"


WITHOUT_PLUS = {key: value for key, value in ROW.items() if key != "plus_input"} | {"task_id": "HumanEval/1"}


def changed(**changes: object) -> dict[str, Any]:
    return {**ROW, "task_id": "HumanEval/1", **changes}


@pytest.mark.parametrize(
    ("row", "found"),
    [
        ('{"task_id": "HumanEval/1", ', "expected a JSON object, found broken JSON"),
        ("[1]", "expected a JSON object, found list"),
        (WITHOUT_PLUS, "expected the key 'plus_input', found atol, base_input, canonical_solution, entry_point"),
        (changed(prompt=3), "'prompt' to be a string, found int"),
        (changed(atol=True), "'atol' to be a number, found bool"),
        (changed(atol=-1), "'atol' to be a tolerance of 0 or more, found -1"),
        (changed(atol=float("nan")), "'atol' to be a tolerance of 0 or more, found nan"),
        (changed(entry_point="a b"), "'entry_point' to be a function's name, found 'a b'"),
        (changed(entry_point="import"), "'entry_point' to be a function's name, found 'import'"),
        (changed(base_input=[1]), "'base_input' to be a list of argument lists"),
        (changed(base_input=[]), "at least one input in 'base_input', found none"),
        (changed(task_id="Mbpp/2"), "a problem of humaneval, found Mbpp/2, which is of mbpp"),
        (changed(task_id="HumanEval/0"), "task_id HumanEval/0 is there for the second time"),
    ],
)
def test_a_broken_line_is_named(row: object, found: str, tmp_path: Path) -> None:
    path = write(tmp_path / "HumanEvalPlus.jsonl", ROW, row, {**ROW, "task_id": "HumanEval/2"})
    with pytest.raises(SuiteError) as caught:
        HUMANEVAL.load(path)
    message = str(caught.value)
    assert message.startswith(f"{path}, line 2: ")
    assert found in message
    assert "\n" not in message


def test_mbpp_inputs_of_another_shape_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "MbppPlus.jsonl", {**ROW, "task_id": "Mbpp/252"})
    with pytest.raises(SuiteError, match=r"line 1: 'base_input' is not of the shape that Mbpp/252 has|complex"):
        MBPP.load(write(path, {**ROW, "task_id": "Mbpp/252", "base_input": [["no number"]]}))


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (lambda folder: folder / "nowhere", "no such file or folder"),
        (lambda folder: folder, "expected HumanEvalPlus*.jsonl[.gz] in it or its sub-folders, found no such file"),
        (lambda folder: write(folder / "x.jsonl"), "expected problems, found none"),
        (lambda folder: write(folder / "x.jsonl.gz", "plain"), "cannot be read"),
    ],
    ids=["missing", "empty folder", "empty file", "no gzip"],
)
def test_a_wrong_path_is_named(make: Callable[[Path], Path], found: str, tmp_path: Path) -> None:
    path = make(tmp_path)
    with pytest.raises(SuiteError) as caught:
        HUMANEVAL.load(path)
    assert str(path) in str(caught.value)
    assert found in str(caught.value)


def test_a_cut_gzip_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "HumanEvalPlus.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps(ROW).encode())[:-9])
    with pytest.raises(SuiteError, match="cannot be read"):
        HUMANEVAL.load(path)


def test_bytes_that_are_no_text_are_named(tmp_path: Path) -> None:
    path = tmp_path / "HumanEvalPlus.jsonl"
    path.write_bytes(b'{"task_id": "\xff"}\n')
    with pytest.raises(SuiteError, match="line 1: expected a JSON object"):
        HUMANEVAL.load(path)


class Server(http.server.BaseHTTPRequestHandler):
    content = b""
    status = 200
    asked = 0

    def do_GET(self) -> None:
        type(self).asked += 1
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(self.content)))
        self.end_headers()
        self.wfile.write(self.content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[type[Server], EvalPlusSuite]]:
    """A server that has a small release, and a suite whose release is there."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    content = json.dumps(ROW).encode() + b"\n"
    handler = type("Handler", (Server,), {"content": gzip.compress(content), "asked": 0})
    served = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=served.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{served.server_port}/HumanEvalPlus.jsonl.gz"
    md5, sha256 = hashlib.md5(content).hexdigest(), hashlib.sha256(content).hexdigest()
    yield handler, replace(HUMANEVAL, release=Release("HumanEvalPlus", "v0", url, md5, sha256))
    served.shutdown()
    served.server_close()


def test_a_release_is_fetched_once(server: tuple[type[Server], EvalPlusSuite]) -> None:
    handler, suite = server
    for _ in range(2):
        data = suite.load(None)
        assert data.revision == "HumanEvalPlus-v0"
        assert data.source == suite.release.url
        assert data.sha256 == suite.release.sha256
    assert handler.asked == 1


def test_a_damaged_copy_is_fetched_again(server: tuple[type[Server], EvalPlusSuite]) -> None:
    handler, suite = server
    suite.load(None)
    (kept,) = (datafiles.cache_folder() / "data").iterdir()
    kept.write_bytes(b"damage")
    assert len(suite.load(None).samples) == 1
    assert handler.asked == 2


def test_other_content_than_the_release_is_refused(server: tuple[type[Server], EvalPlusSuite]) -> None:
    handler, suite = server
    handler.content = gzip.compress(b"{}")
    with pytest.raises(SuiteError, match=r"expected content of MD5 .* pass --data PATH"):
        suite.load(None)
    handler.content = b"<html>"
    with pytest.raises(SuiteError, match=r"no gzip file .* pass --data PATH"):
        suite.load(None)
    handler.status = 503
    with pytest.raises(SuiteError, match=r"HTTP 503; pass --data PATH"):
        suite.load(None)


def test_offline_says_what_to_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    offline = replace(HUMANEVAL, release=replace(HUMANEVAL.release, url="http://127.0.0.1:9/HumanEvalPlus.jsonl.gz"))
    with pytest.raises(SuiteError) as caught:
        offline.load(None)
    message = str(caught.value)
    assert message.startswith("cannot fetch http://127.0.0.1:9/HumanEvalPlus.jsonl.gz: ")
    assert message.endswith("pass --data PATH, a file or folder with HumanEvalPlus.jsonl.gz")
    assert "\n" not in message


def test_a_cache_that_cannot_be_written_is_no_error(
    server: tuple[type[Server], EvalPlusSuite], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    assert len(server[1].load(None).samples) == 1
