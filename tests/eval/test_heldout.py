"""Held-out bits per byte: against sums done the slow way, for any tokenizer, window and batch; and its interval."""

from __future__ import annotations

import math
import shutil
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from plt_eval.corpus import build, parse_source
from plt_eval.errors import UserError
from plt_eval.heldout import (
    MIN_UNITS,
    DocumentScores,
    _choose,
    bits_per_byte,
    difference,
    package_groups,
    score_documents,
    summarise,
)
from plt_model import PLTConfig, PLTForCausalLM
from plt_model.training.shards import MANIFEST, Manifest, ShardWriter, TokenData, TokenizerRecord

VOCAB, BOS, EOS = 40, 1, 2
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}


def write_data(folder: Path, texts: list[list[int]], sizes: list[int], *, bos: int | None = BOS) -> TokenData:
    """Documents of these tokens (ends are added) and UTF-8 bytes, held out, in small shards."""
    folder.mkdir(parents=True, exist_ok=True)
    writer = ShardWriter(folder, "heldout", vocab_size=VOCAB, shard_tokens=50)
    for text, size in zip(texts, sizes, strict=True):
        writer.append(np.array([*([] if bos is None else [bos]), *text, EOS]), text_bytes=size)
    manifest = Manifest(
        name="test",
        created=datetime.now(UTC),
        plt_eval_version="0",
        command=(),
        tokenizer=TokenizerRecord(kind="folder", path=None, sha256="0", vocab_size=VOCAB, bos=bos, eos=EOS),
        dtype="uint16",
        shard_tokens=50,
        held_out=0.5,
        held_out_rule="",
        dedup_rule="",
        splits={"heldout": writer.close()},
        sources=(),
        files=None,
        request={},
    )
    (folder / MANIFEST).write_text(manifest.model_dump_json())
    return TokenData.open(folder, "heldout")


def random_texts(lengths: list[int], seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(3, VOCAB, size=length).tolist() for length in lengths]


def make_model(loops: int = 2, *, seed: int = 0) -> PLTForCausalLM:
    """A tiny random model with opinions: likelihoods far from uniform."""
    torch.manual_seed(seed)
    model = PLTForCausalLM(PLTConfig(**SHAPE, plt_num_loops=loops, plt_window_size=[3, 0]))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return model


def slowly(model: Any, document: list[int], length: int, stride: int) -> float:
    """-ln p of every token but the first, each from the window that predicts it first, one window at a time."""
    total, done = 0.0, 0
    targets = len(document) - 1
    start = 0
    while done < targets:
        end = min(start + length, targets)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([document[start:end]])).logits[0].double()
        logp = logits.log_softmax(-1)
        for at in range(done, end):
            total -= float(logp[at - start, document[at + 1]])
        done, start = end, start + stride
    return total


LENGTHS = [5, 0, 23, 12, 1, 37, 8]


@pytest.mark.parametrize("bos", [BOS, None], ids=["bos", "no-bos"])
@pytest.mark.parametrize(("length", "stride"), [(8, 8), (8, 4), (8, 3), (8, 1), (100, 100), (1, 1)])
@pytest.mark.parametrize("loops", [1, 3])
def test_every_token_is_predicted_once(tmp_path: Path, bos: int | None, length: int, stride: int, loops: int) -> None:
    texts = random_texts(LENGTHS)
    data = write_data(tmp_path, texts, [3 * n for n in LENGTHS], bos=bos)
    model = make_model(loops).eval()
    found = score_documents(model, data, sequence_length=length, stride=stride, batch_size=3)
    expected = [slowly(model, [EOS if bos is None else bos, *text, EOS], length, stride) for text in texts]
    np.testing.assert_allclose(found.nats, expected, rtol=1e-5)
    assert found.tokens.tolist() == [n + 1 for n in LENGTHS]
    assert found.bytes.tolist() == [3 * n for n in LENGTHS]
    assert summarise(found).bits_per_byte == pytest.approx(sum(expected) / math.log(2) / (3 * sum(LENGTHS)), rel=1e-5)
    assert summarise(found).nats_per_token == pytest.approx(sum(expected) / (sum(LENGTHS) + 7), rel=1e-5)


@settings(max_examples=15, derandomize=True, suppress_health_check=list(HealthCheck))
@given(batch=st.integers(1, 40), length=st.integers(2, 30))
def test_batching_changes_nothing(tmp_path_factory: pytest.TempPathFactory, batch: int, length: int) -> None:
    data = write_data(tmp_path_factory.mktemp("data"), random_texts(LENGTHS), [max(1, n) for n in LENGTHS])
    model = make_model()
    one = score_documents(model, data, sequence_length=length, batch_size=1)
    many = score_documents(model, data, sequence_length=length, batch_size=batch)
    np.testing.assert_allclose(many.nats, one.nats, rtol=1e-5)


def test_a_model_that_knows_nothing_needs_log2_of_the_vocabulary(tmp_path: Path) -> None:
    data = write_data(tmp_path, random_texts([9, 30]), [10, 50])
    model = make_model()
    torch.nn.init.zeros_(model.lm_head.weight)
    found = bits_per_byte(model, data, sequence_length=16)
    assert found.bits_per_byte == pytest.approx((10 + 31) * math.log2(VOCAB) / 60, rel=1e-6)
    assert found.nats_per_token == pytest.approx(math.log(VOCAB), rel=1e-6)
    assert (found.tokens, found.bytes, found.documents, found.units) == (41, 60, 2, 2)


def test_other_causal_models_are_scored_too(tmp_path: Path) -> None:
    texts = random_texts([9, 30])
    data = write_data(tmp_path, texts, [10, 50])
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()
    expected = sum(slowly(model, [BOS, *text, EOS], 16, 16) for text in texts)
    found = bits_per_byte(model, data, sequence_length=16)
    assert found.bits_per_byte == pytest.approx(expected / math.log(2) / 60, rel=1e-5)


def test_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    data = write_data(tmp_path, random_texts([9, 30]), [10, 50])
    model = make_model().train()
    bits_per_byte(model, data, sequence_length=16, device="cpu")
    assert model.training
    assert all(parameter.grad is None and not parameter.is_inference() for parameter in model.parameters())


@pytest.mark.parametrize("limit", [1, 40, 41, 200, 10_000])
def test_a_limit_takes_whole_documents_the_same_for_every_model(tmp_path: Path, limit: int) -> None:
    lengths = [18] * 30  # 20 tokens with their ends
    data = write_data(tmp_path, random_texts(lengths), lengths)
    one = score_documents(make_model(1), data, sequence_length=8, limit_tokens=limit)
    other = score_documents(make_model(3, seed=1), data, sequence_length=64, limit_tokens=limit)
    assert one.index.tolist() == other.index.tolist()
    assert len(one.index) == min(30, max(1, limit // 20))
    assert one.tokens.tolist() == [19] * len(one.index)
    whole = score_documents(make_model(1), data, sequence_length=8)
    np.testing.assert_allclose(one.nats, whole.nats[one.index], rtol=1e-5)
    if 1 < len(one.index) < 30:
        assert one.index.tolist() != list(range(len(one.index))), "not the first ones: those are of one kind"


def drawn(folder: Path, lengths: list[int], groups: list[int], limit: int) -> DocumentScores:
    """What a limit takes of documents of so many tokens, ends included."""
    data = write_data(folder, random_texts([length - 2 for length in lengths]), lengths)
    return score_documents(make_model(1), data, sequence_length=64, limit_tokens=limit, groups=groups)


def test_a_limit_is_spread_over_the_groups(tmp_path: Path) -> None:
    """One group has nine tenths of the documents; each of the others gives all it has before that gives a second."""
    groups = [0] * 90 + [1, 2, 3, 4, 5, 6, 7, 8, 9, 9]
    found = drawn(tmp_path / "a", [5] * 100, groups, 50)
    assert sorted(found.group.tolist()) == list(range(10)), "ten documents: one of each"
    more = drawn(tmp_path / "b", [5] * 100, groups, 63)
    assert sorted(more.group.tolist()) == [0, 0, *range(1, 10), 9]
    assert set(found.index) < set(more.index), "a larger limit goes on where a smaller one ended"
    ours = [document for document in more.index if document < 90]
    assert ours != [0, 1], "a group's documents come in a random order"


def test_a_giant_document_leaves_room_for_other_groups(tmp_path: Path) -> None:
    lengths = [60] * 36 + [5] * 6 + [60] + [5] * 10
    groups = [0] * 42 + [1, *range(2, 12)]
    found = drawn(tmp_path / "a", lengths, groups, 80)
    assert set(found.group.tolist()) == {0, *range(2, 12)}, "a group of nothing but a giant: passed over"
    assert found.tokens.sum() + len(found.tokens) == 80, "and what is left goes to what fits"
    wider = drawn(tmp_path / "b", lengths, groups, 120)
    assert set(wider.group.tolist()) == set(range(12)), "taken where it fits, in the first turn"
    assert sorted(wider.tokens[wider.index < 42].tolist()) == [4, 4], "a group's giants come after its other documents"
    mixed = drawn(tmp_path / "c", ([60] * 5 + [5] * 2) * 8, np.arange(8).repeat(7).tolist(), 80)
    assert np.bincount(mixed.group).tolist() == [2] * 8
    alone = drawn(tmp_path / "d", [60] * 3, [0, 0, 1], 20)
    assert len(alone.index) == 1, "at least one"


@settings(max_examples=40, derandomize=True)
@given(st.lists(st.tuples(st.integers(1, 50), st.integers(0, 5)), min_size=1, max_size=40), st.integers(1, 400))
def test_turns_are_fair(documents: list[tuple[int, int]], limit: int) -> None:
    """For documents of any length: whole, within the limit, and none that would still fit is left."""
    lengths, groups = (np.array(column) for column in zip(*documents, strict=True))
    data: Any = SimpleNamespace(document_starts=lambda: np.append(0, np.cumsum(lengths)), bytes=1)
    chosen = _choose(data, groups, limit)
    assert np.array_equal(chosen, np.unique(chosen))
    left = limit - lengths[chosen].sum()
    assert left >= 0 or len(chosen) == 1
    others = np.setdiff1d(np.arange(len(lengths)), chosen)
    assert len(others) == 0 or left < lengths[others].min()
    short = lengths <= limit / MIN_UNITS
    if short[others].all() and len(np.unique(lengths)) == 1 and len(chosen) > 1:
        taken = [int((groups[chosen] == group).sum()) for group in np.unique(groups)]
        waiting = [int((groups[chosen] == group).sum()) for group in np.unique(groups[others])]
        assert not waiting or max(taken) <= min(waiting) + 1, "no group is two turns ahead of one that has more"


# --- the interval -------------------------------------------------------------------------------------------


def scores(nats: Any, size: Any, group: Any = None) -> DocumentScores:
    nats, size = np.asarray(nats, dtype=float), np.asarray(size)
    index = np.arange(len(nats))
    return DocumentScores(index, nats, size + 1, size, index if group is None else np.asarray(group))


def test_the_interval_covers_the_truth_about_95_times_in_100() -> None:
    covered = 0
    rng = np.random.default_rng(1)
    for _ in range(200):
        size = rng.integers(20, 200, size=150)
        nats = size * rng.gamma(4.0, 0.25 * math.log(2), size=150)  # 1 bit per byte on average, whatever the size
        found = summarise(scores(nats, size))
        assert found.low is not None
        assert found.high is not None
        assert found.low < found.bits_per_byte < found.high
        covered += found.low <= 1.0 <= found.high
    assert 180 <= covered <= 199


def test_documents_of_a_group_stand_and_fall_together() -> None:
    rng = np.random.default_rng(2)
    level = rng.gamma(4.0, 0.25, size=30).repeat(10)
    found = summarise(scores(100 * level, [100] * 300))
    grouped = summarise(scores(100 * level, [100] * 300, np.arange(30).repeat(10)))
    assert grouped.bits_per_byte == pytest.approx(found.bits_per_byte)
    assert (found.units, grouped.units) == (300, 30)
    width = (grouped.high or 0) - (grouped.low or 0)
    assert width == pytest.approx(math.sqrt(10) * ((found.high or 0) - (found.low or 0)), rel=0.15)


@pytest.mark.parametrize(("units", "known"), [(1, False), (2, False), (7, False), (8, True)])
def test_few_units_have_no_interval(units: int, known: bool) -> None:
    """However many documents they are of; nor has their difference."""
    group = np.arange(40) % units
    one = scores(np.arange(40.0) + 10, [10] * 40, group)
    found = summarise(one)
    value, low, high = difference(scores(np.arange(40.0) + 9, [10] * 40, group), one)
    assert (found.units, MIN_UNITS) == (units, 8)
    assert [number is not None for number in (found.low, found.high, low, high)] == [known] * 4
    assert found.bits_per_byte == pytest.approx(2.95 / math.log(2))
    assert value == pytest.approx(-0.1 / math.log(2))


def test_the_same_scores_give_the_same_interval() -> None:
    some = scores(np.arange(1, 50.0), np.arange(1, 50) ** 2)
    assert summarise(some) == summarise(some)


def test_a_difference_is_paired() -> None:
    rng = np.random.default_rng(3)
    size = rng.integers(20, 200, size=100)
    base = size * rng.gamma(4.0, 0.25, size=100)
    better = base - 0.01 * size * math.log(2)  # by 0.01 bits per byte, everywhere
    value, low, high = difference(scores(better, size), scores(base, size))
    assert (value, low, high) == (pytest.approx(-0.01), pytest.approx(-0.01), pytest.approx(-0.01))
    alone = summarise(scores(better, size))
    assert (alone.low or 0) < summarise(scores(base, size)).bits_per_byte < (alone.high or 0)
    with pytest.raises(ValueError, match="different documents"):
        difference(scores(better, size), scores(base[:50], size[:50]))


def test_scores_survive_the_disk(tmp_path: Path) -> None:
    some = scores([1.5, 2.5], [3, 4], [7, 7])
    some.save(tmp_path / "a.npz")
    loaded = DocumentScores.load(tmp_path / "a.npz")
    for name in DocumentScores.__dataclass_fields__:
        np.testing.assert_array_equal(getattr(loaded, name), getattr(some, name))
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]
    (tmp_path / "a.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:100])
    with pytest.raises(UserError, match=r"a\.npz: no scores of documents"):
        DocumentScores.load(tmp_path / "a.npz")


# --- packages -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real token data of a few installed packages and the standard library."""
    source = {"kind": "installed", "packages": ["filelock", "click", "rich", "python-stdlib"]}
    out = tmp_path_factory.mktemp("data") / "python"
    build([parse_source(source, "test")], "bytes", out, name="python", held_out=0.2)
    return out


def test_documents_are_grouped_by_what_was_held_out_as_a_whole(installed: Path) -> None:
    data = TokenData.open(installed, "heldout")
    groups = package_groups(data)
    assert groups is not None
    held_out = [row for row in data.manifest.sources[0].packages if row.split == "heldout"]
    assert len(held_out) > 1
    assert sorted(np.bincount(groups)) == sorted(row.documents for row in held_out)
    sizes = np.bincount(groups, weights=data.document_bytes())
    assert sorted(sizes) == sorted(row.bytes for row in held_out)


def test_documents_that_are_no_packages_files_are_not_grouped(installed: Path, tmp_path: Path) -> None:
    assert package_groups(write_data(tmp_path / "plain", random_texts([5]), [5])) is None
    other = tmp_path / "other"
    shutil.copytree(installed, other)
    table = other / "files.jsonl"
    lines = table.read_text().splitlines(keepends=True)
    held_out = next(i for i, line in enumerate(lines) if '"heldout"' in line)
    table.write_text("".join(lines[:held_out] + lines[held_out + 1 :]))
    assert package_groups(TokenData.open(other, "heldout")) is None, "one document has no package"
    table.write_text('{"file": "a"}\n')
    with pytest.raises(UserError, match=r"files\.jsonl:1: not a file of a package: KeyError\('split'\)"):
        package_groups(TokenData.open(other, "heldout"))


# --- mistakes -----------------------------------------------------------------------------------------------


def test_a_model_with_a_smaller_vocabulary_is_refused(tmp_path: Path) -> None:
    data = write_data(tmp_path, random_texts([5]), [5])
    small = PLTForCausalLM(PLTConfig(**{**SHAPE, "vocab_size": 30}))
    with pytest.raises(UserError, match="tokenized for a vocabulary of 40, the model has 30"):
        bits_per_byte(small, data, sequence_length=8)


@pytest.mark.parametrize(("texts", "sizes"), [([], []), ([[]], [0])])
def test_nothing_held_out_is_said(tmp_path: Path, texts: list[list[int]], sizes: list[int]) -> None:
    data = write_data(tmp_path, texts, sizes)
    with pytest.raises(UserError, match="no heldout text to predict"):
        bits_per_byte(make_model(), data, sequence_length=8)


def test_a_broken_model_is_said(tmp_path: Path) -> None:
    data = write_data(tmp_path, random_texts([5, 5]), [5, 5])
    model = make_model()
    torch.nn.init.constant_(model.lm_head.weight, float("nan"))
    with pytest.raises(UserError, match="no finite likelihood to 2 documents"):
        bits_per_byte(model, data, sequence_length=8)


@pytest.mark.parametrize("lengths", [{"sequence_length": 0}, {"sequence_length": 8, "stride": 9}])
def test_lengths_that_make_no_sense(tmp_path: Path, lengths: dict[str, int]) -> None:
    data = write_data(tmp_path, random_texts([5]), [5])
    with pytest.raises(ValueError, match="sequence_length"):
        bits_per_byte(make_model(), data, **lengths)
