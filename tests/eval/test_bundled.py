"""The family that the package brings along: whole, matched, and what its papers say it is."""

from __future__ import annotations

import gzip
import hashlib
import json
from pathlib import Path

import pytest
import torch

from plt_eval.cli.main import main
from plt_eval.models import BUNDLED, bundled_families, resolve_model
from plt_eval.study.records import read_study
from plt_model.loading import check_weights, load_model, weights_hash
from plt_model.training.recipe import load_recipe
from plt_model.training.shards import Manifest
from plt_model.training.trainer import read_metrics

FAMILY = BUNDLED / "plt-tiny"
LOOPS = (1, 2, 3, 4)


def test_it_has_a_member_for_each_loop_count() -> None:
    assert bundled_families()["plt-tiny"].loops == LOOPS
    configs = []
    for loops in LOOPS:
        folder = resolve_model("plt-tiny", loops).folder
        assert load_model(folder).config.plt_num_loops == loops
        configs.append(json.loads((folder / "config.json").read_text()) | {"plt_num_loops": None})
    assert all(config == configs[0] for config in configs)


@pytest.mark.parametrize("loops", LOOPS)
def test_its_papers_are_of_these_weights(loops: int) -> None:
    variant = next(v for v in read_study(FAMILY).variants if v.loops == loops)
    folder = FAMILY / f"r{loops}"
    assert variant.weights_sha256 == weights_hash(folder)
    assert variant.parameters == sum(torch.Size(shape).numel() for shape in check_weights(folder).values())
    result = json.loads((folder / "result.json").read_text())
    assert (result["loops"], result["tokens"]) == (loops, variant.training.tokens)
    rows = read_metrics(folder)
    assert rows[-1]["step"] == result["steps"] == 6000
    assert sum(row["loss"] for row in rows[-50:]) / 50 == pytest.approx(result["loss"])


def test_its_members_saw_the_same_tokens_at_the_same_rates() -> None:
    seen = [
        [(row["step"], row["tokens"], row["learning_rate"]) for row in read_metrics(FAMILY / f"r{r}")] for r in LOOPS
    ]
    assert all(rows == seen[0] for rows in seen)


def test_its_recipe_is_the_one_that_is_bundled() -> None:
    assert read_study(FAMILY).recipe_sha256 == load_recipe("plt-tiny").digest()
    assert load_recipe(FAMILY / "recipe.yaml").digest() == load_recipe("plt-tiny").digest()


def test_every_file_it_was_trained_on_has_a_package_a_version_and_a_licence() -> None:
    folder = FAMILY / "data" / "python"
    manifest = Manifest.model_validate_json((folder / "manifest.json").read_text())
    table = gzip.decompress((folder / "files.jsonl.gz").read_bytes())
    rows = [json.loads(line) for line in table.splitlines()]
    assert manifest.files is not None
    assert hashlib.sha256(table).hexdigest() == manifest.files.sha256
    assert len(rows) == manifest.files.rows == sum(split.documents for split in manifest.splits.values())
    assert all(row["package"] and row["version"] and row["licence"] and row["sha256"] for row in rows)
    held = {
        row["package"] if row["package"] != "python-stdlib" else row["file"] for row in rows if row["split"] != "train"
    }
    assert held.isdisjoint(row["package"] for row in rows if row["split"] == "train")


def test_more_loops_read_python_better_than_one() -> None:
    """What came out, with the interval of the paired difference: look here first when data or model change."""
    study = read_study(FAMILY)
    for row in study.summary[1:]:
        against = row.heldout["python"].against_first
        assert against is not None
        assert against.high is not None
        assert against.high < 0


def test_more_loops_read_and_trace_programs_better_than_one() -> None:
    """The same of programs; and of the problems of `trace`, with intervals apart."""
    study = read_study(FAMILY)
    first, *others = (variant.suites["trace"].metrics["trace.exact"] for variant in study.variants)
    for row, exact in zip(study.summary[1:], others, strict=True):
        against = row.heldout["trace"].against_first
        assert against is not None
        assert against.high is not None
        assert against.high < 0
        assert first.high is not None
        assert exact.low is not None
        assert exact.low > first.high


def test_a_member_can_be_exported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "stock"
    with pytest.raises(SystemExit) as ended:
        main(["export", "plt-tiny:r2", "--format", "transformers", "--out", str(out)])
    assert not ended.value.code, capsys.readouterr().err
    assert weights_hash(out) == weights_hash(FAMILY / "r2")
    with pytest.raises(SystemExit) as ended:
        main(["export", "plt-tiny", "--format", "transformers", "--out", str(out)])
    assert ended.value.code == 2
    assert "choose one of plt-tiny:r1" in capsys.readouterr().err
