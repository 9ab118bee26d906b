"""What a diagnosis reads: texts from a file, a folder, token data or a suite, drawn in a fixed order, as token ids.

    corpus = open_corpus("src/", field=None, windows=None)
    drawn = draw(corpus, tokenizer="bytes", samples=500, sequence_length=2048, seed=0)
    drawn.samples[0].ids, drawn.sha256

A sample is a document as training sees it: the tokenizer's beginning-of-sequence token (if it has one), the tokens of
the text, the end-of-sequence token; cut after `sequence_length` tokens. With windows a text gives as many samples as
it has windows of that length, side by side.

The order of drawing is that of SHA-256(seed | text): it depends on the texts and the seed alone, not on how files are
called or on how many samples are asked for, so fewer samples are the beginning of more. A text that is there twice
counts once. The documents of token data are drawn by their number instead, which costs no reading.
"""

from __future__ import annotations

import difflib
import hashlib
import heapq
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from plt_benchmarks.registry import all_suites, get_suite, suite_names
from plt_eval.corpus.documents import Document, Rejected
from plt_eval.corpus.encoders import Encoder, load_encoder
from plt_eval.corpus.sources import Source, parse_source
from plt_eval.errors import UserError
from plt_model.training.shards import MANIFEST, TokenData, read_manifest

DEFAULT_SET = "trace"
"""What is read where no data are named: it needs no download, and no family of the package has seen it in training."""

FIELDS = ("text", "content", "prompt+canonical_solution")
"""Where the text of a row is looked for, in this order; joined ones are put one behind the other."""

Ids = npt.NDArray[np.int64]
_TABLES = {".jsonl": "jsonl", ".jsonl.gz": "jsonl", ".parquet": "parquet"}


@dataclass(frozen=True)
class Sample:
    """One sample: `index` is its place in the order of drawing, `id` says where it is, `ids` are int64 [tokens]."""

    index: int
    id: str
    ids: Ids
    sha256: str


@dataclass(frozen=True)
class Drawn:
    """The samples of a diagnosis. `sha256` is over all their token ids in order; `candidates` counts what they were
    drawn from; `left_out` the records that hold no text, by reason."""

    name: str
    source: str
    tokenizer: str
    tokenizer_sha256: str
    sequence_length: int
    seed: int
    windows: bool
    candidates: int
    left_out: dict[str, int]
    samples: tuple[Sample, ...]

    @property
    def sha256(self) -> str:
        return hashlib.sha256("".join(sample.sha256 for sample in self.samples).encode("ascii")).hexdigest()

    @property
    def tokens(self) -> int:
        """Tokens of all samples."""
        return sum(len(sample.ids) for sample in self.samples)


class Corpus(Protocol):
    """Where samples come from. `name` is short and fit for a file name, `source` says it in full; `windows` whether its
    texts are cut into windows unless the user says otherwise."""

    name: str
    source: str
    windows: bool


@dataclass(frozen=True)
class TextCorpus:
    """Texts to tokenise. `read` yields (id, text), or why a record has none."""

    name: str
    source: str
    windows: bool
    read: Callable[[], Iterator[Document | Rejected]]


@dataclass(frozen=True)
class TokenCorpus:
    """The held-out split of token data, tokenised already."""

    name: str
    source: str
    windows: bool
    data: TokenData


# --- finding ------------------------------------------------------------------------------------------


def open_corpus(spec: str, *, field: str | None = None) -> TextCorpus | TokenCorpus:
    """What `--data spec` means: a set's name, token data, a folder of files, or a file. A path that has the name of a
    set is written with its folder, as ./trace. `field` names the field of rows that holds the text (a+b: two of them).
    Raises UserError, SuiteError and ShardError."""
    if not spec.strip():
        raise UserError(f"--data {spec!r}: empty; expected a file, a folder or a set")
    path = Path(spec)
    if spec.lower() in suite_names():
        _check_field(spec, field, used=False)
        return _set(spec.lower())
    if _is_token_data(path):
        _check_field(spec, field, used=False)
        data = TokenData.open(path, "heldout")
        if not data.documents:
            raise UserError(f"--data {spec}: no held-out text in it; raise the share that is held out")
        return TokenCorpus(path.resolve().name, str(path), False, data)
    if path.is_dir():
        return TextCorpus(path.resolve().name, str(path), False, lambda: _folder_records(path, field))
    if path.is_file():
        table = _table_kind(path) is not None
        _check_field(spec, field, used=table)
        return TextCorpus(path.stem, str(path), not table, lambda: _file_records(path, path.name, field))
    known = sorted(suite.name for suite in all_suites())
    near = difflib.get_close_matches(spec.lower(), known, n=1, cutoff=0.5)
    hint = f" (did you mean {near[0]}?)" if near else ""
    raise UserError(f"--data {spec}: no such file or folder, nor a set{hint}; sets: {', '.join(known)}")


def _check_field(spec: str, field: str | None, *, used: bool) -> None:
    if field is not None and not used:
        raise UserError(f"--field has no effect with --data {spec}: it belongs to .jsonl and .parquet files")


def _is_token_data(path: Path) -> bool:
    """Whether `path` is a folder that `plt-eval data build` wrote, or meant to be one."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(manifest, dict) and {"splits", "tokenizer"} <= manifest.keys()


def _table_kind(path: Path) -> str | None:
    return next((kind for ending, kind in _TABLES.items() if path.name.endswith(ending)), None)


# --- reading ------------------------------------------------------------------------------------------


def _set(name: str) -> TextCorpus:
    """The problems of a suite with their solutions. Raises SuiteError; UserError where a problem has no solution."""
    suites = get_suite(name)
    loaded = [suite.load(None) for suite in suites]

    def read() -> Iterator[Document | Rejected]:
        for data in loaded:
            for sample in data.samples:
                texts = [sample.data.get(part) for part in ("prompt", "canonical_solution")]
                if not all(isinstance(text, str) for text in texts):
                    raise UserError(f"--data {name}: problem {sample.id} has no prompt and solution to read")
                text = "".join(map(str, texts))
                yield Document(sample.id, text, "", len(text))

    label = "+".join(suite.name for suite in suites)
    return TextCorpus(label, f"{label}: {', '.join(data.revision for data in loaded)}", False, read)


def _folder_records(folder: Path, field: str | None) -> Iterator[Document | Rejected]:
    """The records of all files below `folder` but hidden ones, by name."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and not _hidden(path.relative_to(folder))]
    if not files:
        raise UserError(f"--data {folder}: no file in it")
    _check_field(str(folder), field, used=any(_table_kind(path) for path in files))
    for path in files:
        yield from _file_records(path, path.relative_to(folder).as_posix(), field)


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _file_records(path: Path, name: str, field: str | None) -> Iterator[Document | Rejected]:
    """The rows of a table, each with its id, or the whole of a text."""
    kind = _table_kind(path)
    if kind is None:
        yield _text_record(path, name)
    else:
        for number, row in enumerate(_rows(path, kind, field)):
            yield _renamed(row, f"{name}:{number + 1}" if kind == "jsonl" else f"{name}#{number}")


def _text_record(path: Path, name: str) -> Document | Rejected:
    data = path.read_bytes()
    try:
        return Document(name, data.decode("utf-8-sig"), "", len(data))
    except UnicodeDecodeError:
        return Rejected(name, "not UTF-8", len(data))


def _rows(path: Path, kind: str, field: str | None) -> Iterator[Document | Rejected]:
    """The texts of the rows. Raises UserError where no row has the field, or any of FIELDS."""
    faults = []
    for names in FIELDS if field is None else (field,):
        sources = [_table(path, kind, name) for name in names.split("+")]
        try:
            rows = _joined(path, sources)
            first = next(rows, None)
        except UserError as error:
            faults.append(str(error))
            continue
        if first is None:
            return
        yield first
        yield from rows
        return
    hint = f"; looked for {', '.join(FIELDS)}: name the field by --field" if field is None else ""
    raise UserError(f"--data {faults[0]}{hint}")


def _table(path: Path, kind: str, name: str) -> Source:
    return parse_source({"kind": kind, "path": str(path), "text": name}, f"--data {path}")


def _joined(path: Path, sources: Sequence[Source]) -> Iterator[Document | Rejected]:
    """Row by row, the texts of all sources one behind the other."""
    out = path.parent / ".nothing-is-written"  # a source leaves out what lies where its reader writes
    for parts in zip(*(source.open(out, None).records(0) for source in sources), strict=True):
        rejected = next((part for part in parts if isinstance(part, Rejected)), None)
        texts = [part.text for part in parts if isinstance(part, Document)]
        yield rejected or Document(parts[0].name, "".join(texts), "", parts[0].size)


def _renamed(record: Document | Rejected, name: str) -> Document | Rejected:
    if isinstance(record, Rejected):
        return Rejected(name, record.reason, record.size)
    return Document(name, record.text, record.licence, record.size)


# --- drawing ------------------------------------------------------------------------------------------


@dataclass
class _Draw:
    """What drawing needs to know, and what it counts."""

    samples: int
    sequence_length: int
    seed: int
    windows: bool
    candidates: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    seen: set[bytes] = field(default_factory=set)

    def rank(self, content: bytes) -> bytes:
        """The place of a text in the order."""
        return hashlib.sha256(f"{self.seed}\0".encode() + content).digest()


def draw(
    corpora: Sequence[TextCorpus | TokenCorpus],
    *,
    tokenizer: str | None,
    samples: int,
    sequence_length: int,
    seed: int = 0,
    windows: bool | None = None,
    trust_remote_code: bool = False,
) -> Drawn:
    """Up to `samples` samples of at most `sequence_length` tokens; several corpora take turns.

    `tokenizer` is "bytes" or a folder; token data have their own. `windows` None is as each corpus says. Raises
    UserError where there is no text at all, and for a tokenizer that cannot be used.
    """
    assert corpora, "there is something to draw from"
    texts = [corpus for corpus in corpora if isinstance(corpus, TextCorpus)]
    encoder = _encoder(tokenizer, trust_remote_code) if texts else None
    cut = [corpus.windows if windows is None else windows for corpus in corpora]
    plans = [_Draw(samples, sequence_length, seed, own) for own in cut]
    found = [list(_drawn(corpus, plan, encoder)) for corpus, plan in zip(corpora, plans, strict=True)]
    left_out = sum((plan.left_out for plan in plans), Counter[str]())
    taken = list(itertools.islice(_in_turns(found), samples))
    if not taken:
        reasons = "; ".join(f"{count} {reason}" for reason, count in sorted(left_out.items()))
        raise UserError(
            f"--data {_listed(corpus.source for corpus in corpora)}: no text in it{reasons and f': {reasons}'}"
        )
    names, hashes = _tokenizers(corpora, encoder)
    return Drawn(
        name="+".join(corpus.name for corpus in corpora),
        source=_listed(corpus.source for corpus in corpora),
        tokenizer=names,
        tokenizer_sha256=hashes,
        sequence_length=sequence_length,
        seed=seed,
        windows=any(cut),
        candidates=sum(plan.candidates for plan in plans),
        left_out=dict(left_out),
        samples=tuple(_sample(index, name, ids) for index, (name, ids) in enumerate(taken)),
    )


def _encoder(tokenizer: str | None, trust_remote_code: bool) -> Encoder:
    assert tokenizer is not None, "texts need a tokenizer"
    return load_encoder(tokenizer, trust_remote_code=trust_remote_code)


def _drawn(corpus: TextCorpus | TokenCorpus, plan: _Draw, encoder: Encoder | None) -> Iterator[tuple[str, Ids]]:
    if isinstance(corpus, TokenCorpus):
        return _drawn_tokens(corpus.data, plan)
    assert encoder is not None, "texts need a tokenizer"
    return _drawn_windows(corpus, plan, encoder) if plan.windows else _drawn_texts(corpus, plan, encoder)


def _drawn_texts(corpus: TextCorpus, plan: _Draw, encoder: Encoder) -> Iterator[tuple[str, Ids]]:
    """The beginnings of the first texts in the order; only those are tokenised."""
    ranked = ((plan.rank(text.encode()), name, text) for name, text in _texts(corpus, plan))
    chosen = heapq.nsmallest(plan.samples, ranked, key=lambda item: item[:2])
    for (_, name, _), ids in zip(chosen, encoder.encode([text for _, _, text in chosen]), strict=True):
        yield name, ids[: plan.sequence_length].astype(np.int64)


def _drawn_windows(corpus: TextCorpus, plan: _Draw, encoder: Encoder) -> Iterator[tuple[str, Ids]]:
    """The first windows of all texts in the order."""

    def ranked() -> Iterator[tuple[bytes, str, Ids]]:
        for name, text in _texts(corpus, plan):
            for start, window in _cut(encoder.encode([text])[0].astype(np.int64), plan.sequence_length):
                plan.candidates += 1
                yield plan.rank(window.tobytes()), f"{name}[{start}]", window

    for _, name, window in heapq.nsmallest(plan.samples, ranked(), key=lambda item: item[:2]):
        yield name, window


def _drawn_tokens(data: TokenData, plan: _Draw) -> Iterator[tuple[str, Ids]]:
    """Documents by their number, in the order of a seeded permutation."""
    plan.candidates = data.documents
    order = np.random.default_rng(plan.seed).permutation(data.documents)
    found = 0
    for document in order.tolist():
        if found >= plan.samples:
            return
        ids = data.read_document(document)
        pieces = _cut(ids, plan.sequence_length) if plan.windows else [(0, ids[: plan.sequence_length])]
        for start, piece in pieces:
            found += 1
            yield f"{data.folder.name}:{document}" + (f"[{start}]" if plan.windows else ""), piece


def _texts(corpus: TextCorpus, plan: _Draw) -> Iterator[tuple[str, str]]:
    """Each text once; counts the others."""
    for record in corpus.read():
        if isinstance(record, Rejected):
            plan.left_out[record.reason] += 1
            continue
        try:
            content = record.text.encode("utf-8")
        except UnicodeEncodeError:
            plan.left_out["with half a character"] += 1
            continue
        digest = hashlib.sha256(content).digest()[:16]
        if not content or digest in plan.seen:
            plan.left_out["there already" if content else "empty"] += 1
            continue
        plan.seen.add(digest)
        plan.candidates += not plan.windows
        yield record.name, record.text


def _cut(ids: Ids, length: int) -> Iterator[tuple[int, Ids]]:
    for start in range(0, len(ids), length):
        yield start, ids[start : start + length]


def _in_turns(found: Sequence[Sequence[tuple[str, Ids]]]) -> Iterator[tuple[str, Ids]]:
    for turn in itertools.zip_longest(*found):
        yield from (item for item in turn if item is not None)


def _sample(index: int, name: str, ids: Ids) -> Sample:
    return Sample(index, name, ids, hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest())


def _tokenizers(corpora: Sequence[TextCorpus | TokenCorpus], encoder: Encoder | None) -> tuple[str, str]:
    """What made the ids, in words and as a hash; of several tokenizers both of all."""
    records = [] if encoder is None else [encoder.record]
    records += [read_manifest(corpus.data.folder).tokenizer for corpus in corpora if isinstance(corpus, TokenCorpus)]
    by_hash = {record.sha256: record.path or record.kind for record in records}
    if len(by_hash) == 1:
        (sha256, name), *_ = by_hash.items()
        return name, sha256
    return ", ".join(by_hash.values()), hashlib.sha256("".join(by_hash).encode("ascii")).hexdigest()


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)
