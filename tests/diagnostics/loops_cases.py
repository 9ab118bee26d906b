"""What the tests of the diagnostics share: models, the same models for the reference, batches, and comparisons."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from loops_reference import Cell, Heads, Key, ReferenceModel, ReferenceTrace, Rows, measure_heads
from loops_reference import measure as measure_reference
from torch import Tensor

import plt_eval
from plt_diagnostics import Findings, measure
from plt_diagnostics.adapters.plt import KEEP_BYTES, PLTAdapter
from plt_model import PLTConfig, PLTForCausalLM

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures" / "plt"
FIXTURE_NAMES = sorted(path.name for path in FIXTURES.iterdir() if path.is_dir())
BUNDLED = Path(plt_eval.__file__).parent / "bundled" / "plt-tiny"

SHAPE: dict[str, Any] = {
    "vocab_size": 53,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "plt_num_loops": 3,
    "plt_window_size": [3, 0],
    "plt_emb_scale": 0.8,
    "plt_hidden_scale": 0.6,
    "plt_gate_use_hidden_states": True,
    "eos_token_id": 2,
}
"""A tiny model; tests change some of these keys."""


@dataclass(frozen=True)
class Case:
    """One model, twice: as it is measured, and as the reference knows it."""

    model: PLTForCausalLM
    reference: ReferenceModel

    def measure(
        self, samples: Sequence[Sequence[int]], *, left: bool = False, keep: bool = True, **options: Any
    ) -> Any:
        """The findings on samples, padded to one length."""
        ids, mask = padded(samples, left=left)
        return self.measure_batch(ids, mask, keep=keep, **options)

    def measure_batch(self, ids: Tensor, mask: Tensor, *, keep: bool = True, **options: Any) -> Findings:
        adapter = PLTAdapter(self.model, keep_bytes=KEEP_BYTES if keep else 0)
        return measure(adapter, ids, mask, samples=range(len(ids)), **options)


@contextmanager
def other_loops() -> Iterator[None]:
    """Without the warning that a checkpoint is run with a loop count that it was not made for."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="running .* loops on a checkpoint made for")
        yield


def checkpoint(folder: Path, dtype: torch.dtype = torch.float64, **changes: Any) -> Case:
    """A checkpoint folder, with some keys of its config changed; the reference reads the files by itself."""
    with other_loops():
        model = PLTForCausalLM.from_pretrained(folder, dtype=dtype, **changes).eval()
    return Case(model, ReferenceModel.read(folder, **changes))


def random_model(dtype: torch.dtype = torch.float64, seed: int = 0, scale: float = 0.3, **changes: Any) -> Case:
    """A tiny model of random weights, every one of them far enough from 0 and 1 to be seen."""
    config = SHAPE | changes
    generator = torch.Generator().manual_seed(seed)
    model = PLTForCausalLM(PLTConfig(**config))
    with torch.no_grad():
        for weight in model.parameters():
            centre = 1.0 if weight.dim() == 1 and bool((weight == 1).all()) else 0.0
            weight.copy_(centre + scale * torch.randn(weight.shape, generator=generator))
    return case_of(model.to(dtype).eval(), config)


def case_of(model: PLTForCausalLM, config: Mapping[str, Any]) -> Case:
    """A model, and the reference over its present weights."""
    weights = {name: weight.detach().double().numpy().copy() for name, weight in model.state_dict().items()}
    return Case(model, ReferenceModel(dict(config), weights))


def tokens(count: int, vocab: int = 53, seed: int = 0) -> list[int]:
    """Random ids, 0 left out (what padding is filled with)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, vocab, (count,), generator=generator).tolist()


def real_text(count: int, skip: int = 0) -> list[int]:
    """Python source, as the bundled family reads it."""
    from tokenizers import Tokenizer

    text = Path(json.__file__).read_text()
    ids: list[int] = Tokenizer.from_file(str(BUNDLED / "r1" / "tokenizer.json")).encode(text).ids
    assert len(ids) >= skip + count
    return ids[skip : skip + count]


def padded(samples: Sequence[Sequence[int]], *, left: bool = False, fill: int = 0) -> tuple[Tensor, Tensor]:
    """ids [B, S] and mask [B, S] of samples of unequal length."""
    length = max(len(sample) for sample in samples)
    ids = torch.full((len(samples), length), fill, dtype=torch.int64)
    mask = torch.zeros(len(samples), length, dtype=torch.bool)
    for row, sample in enumerate(samples):
        place = slice(length - len(sample), length) if left else slice(0, len(sample))
        ids[row, place] = torch.tensor(sample)
        mask[row, place] = True
    return ids, mask


def rows_of(findings: Findings, sample: int = 0) -> Rows:
    """The rows of one sample, by loop, measurement, variant, layer and position."""
    found: Rows = {}
    for row in findings.rows.to_pylist():
        if row["sample"] == sample:
            key: Key = (row["loop"], row["measurement"], row["variant"], row["layer"], row["position"])
            assert key not in found, f"two rows for {key}"
            found[key] = Cell(row["value"], row["count"], row["nonfinite"])
    return found


def heads_of(findings: Findings) -> Heads:
    """heads.parquet, by loop, layer and pair."""
    rows = findings.heads.table().to_pylist()
    return {(r["loop"], r["layer"], r["head_i"], r["head_j"]): (r["cosine"], r["count"]) for r in rows}


@dataclass(frozen=True)
class Tolerance:
    """relative: of the expected value. floor: in the measurement's own unit, by name ("" for all others)."""

    relative: float
    floor: Mapping[str, float]

    def of(self, name: str, expected: float) -> float:
        return self.relative * abs(expected) + self.floor.get(name, self.floor[""])


def assert_rows(found: Rows, expected: Rows, tolerance: Tolerance, note: str = "") -> None:
    """The same rows exist; counts are equal; values agree. Tells the worst few."""
    missing, extra = sorted(map(str, expected.keys() - found.keys())), sorted(map(str, found.keys() - expected.keys()))
    assert not missing, f"{note}: rows that are missing: {missing[:8]} ..."
    assert not extra, f"{note}: rows that should not be: {extra[:8]} ..."
    counts = [(k, found[k][1:], expected[k][1:]) for k in expected if found[k][1:] != expected[k][1:]]
    assert not counts, f"{note}: (count, nonfinite) found, expected: {counts[:8]} ..."
    wrong = []
    for key, (value, _, _) in expected.items():
        got = found[key].value
        if value is None or got is None:
            if value is not got:
                wrong.append((float("inf"), key, got, value))
        elif not abs(got - value) <= tolerance.of(key[1], value):
            wrong.append((abs(got - value) / tolerance.of(key[1], value), key, got, value))
    wrong.sort(key=lambda entry: -entry[0])
    assert not wrong, (
        f"{note}: {len(wrong)} of {len(expected)} wrong; (times the tolerance, row, found, expected): {wrong[:5]}"
    )


def assert_heads(found: Heads, expected: Heads, tolerance: float) -> None:
    """Every pair of heads, its cosine and its number of samples."""
    assert found.keys() == expected.keys()
    for key, (cosine, count) in expected.items():
        assert found[key][1] == count, key
        assert abs(found[key][0] - cosine) <= tolerance, (key, found[key], cosine)


def expected_of(case: Case, samples: Iterable[Sequence[int]]) -> tuple[list[Rows], Heads]:
    """What the reference finds: rows a sample, and heads over all of them."""
    traces: list[ReferenceTrace] = [case.reference.trace(sample) for sample in samples]
    return [measure_reference(trace) for trace in traces], measure_heads(traces)
