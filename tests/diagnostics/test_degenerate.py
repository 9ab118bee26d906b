"""Samples, states and weights at the edge of what the measurements are defined for.

The rule: what is not defined has no row; what is not finite is counted in `nonfinite` and never in `value`; and nothing
that happens in padding or in one sample changes another.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from loops_cases import (
    BUNDLED,
    Case,
    Tolerance,
    assert_rows,
    case_of,
    checkpoint,
    padded,
    random_model,
    rows_of,
    tokens,
)
from loops_reference import Rows, entropy, log_softmax
from loops_reference import effective_rank as rank_by_svd
from loops_reference import measure as measure_reference

from plt_diagnostics.adapters.plt import PLTAdapter
from plt_diagnostics.adapters.protocol import Branch
from plt_diagnostics.attention import blocks
from plt_diagnostics.rank import effective_rank, rank_of_gram

EXACT = Tolerance(1e-5, {"": 1e-10, "angular_change": 1e-6})


def names_of(rows: Rows) -> set[str]:
    return {name for _, name, _, _, _ in rows}


def value(rows: Rows, loop: int, name: str, variant: str = "") -> float:
    found = rows[loop, name, variant, None, None].value
    assert found is not None
    return found


def changed(case: Case, config: dict[str, object]) -> Case:
    """The case after its model's weights were changed in place."""
    return case_of(case.model, {**case.reference.config, **config})


# --- short and constant samples --------------------------------------------------------------------------------------


def test_one_token() -> None:
    rows = rows_of(random_model().measure([[7]]))
    undefined = {"offset_cost", "effective_offset_cost", "logit_lens_rank", "next_token_nll"}
    assert not names_of(rows) & undefined
    assert {position for *_, position in rows} == {None, 0}
    for loop in (1, 2, 3):
        assert value(rows, loop, "effective_rank", "normed") == pytest.approx(1, abs=1e-9)
        assert value(rows, loop, "attention_entropy", "mixed") == 0
        assert value(rows, loop, "head_rank") == pytest.approx(1, abs=1e-6)  # all heads see the token itself
        assert value(rows, loop, "head_cosine") == pytest.approx(1, abs=1e-9)
    assert value(rows, 2, "attention_kl", "mixed") == 0
    # Nothing is left of the one token: the shift gives zeros in every later loop, which therefore agree.
    assert value(rows, 3, "step_size", "raw") == pytest.approx(0, abs=1e-10)
    assert (3, "angular_change", "raw", None, None) not in rows


def test_identical_tokens_in_loop_1_have_rank_1_and_no_offset() -> None:
    case = random_model(plt_num_loops=2)
    rows = rows_of(case.measure([[11] * 12]))
    assert value(rows, 1, "effective_rank", "normed") == pytest.approx(1, abs=1e-6)
    assert value(rows, 1, "effective_rank", "raw") == pytest.approx(1, abs=1e-6)
    assert value(rows, 2, "offset_cost", "normed") == pytest.approx(0, abs=1e-10)
    assert value(rows, 2, "effective_offset_cost") == pytest.approx(0, abs=1e-10)
    # The shift's zeros make the first token another one in loop 2.
    assert value(rows, 2, "effective_rank", "raw") > 1.01


def test_states_that_never_move_have_no_direction() -> None:
    """Layers that add nothing and loops that read their own input: all steps are exactly zero."""
    case = random_model(plt_loop_mode="sequential", plt_normalize_per_loop=False)
    with torch.no_grad():
        for layer in case.model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    rows = rows_of(case.measure([tokens(9)]))
    assert "angular_change" not in names_of(rows)
    for loop in (1, 2, 3):
        assert value(rows, loop, "step_size", "raw") == 0
        assert value(rows, loop, "fixed_point_gap", "raw/as_first") == 0
    assert value(rows, 3, "output_shift") == 0
    assert value(rows, 3, "attention_kl", "mixed") == 0
    assert "peak_loop" not in names_of(rows)  # no token has one


def test_a_first_token_that_only_rounding_moves_has_no_direction() -> None:
    """Without a scale on the embedding loop 2 reads of a first token what loop 1 read: the same state comes out."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        rows = rows_of(checkpoint(BUNDLED / "r3", dtype).measure([tokens(24, 250)]))
        assert (2, "angular_change", "raw", None, 0) not in rows
        assert rows[2, "angular_change", "raw", None, None].count == 23
        assert (3, "angular_change", "raw", None, 1) not in rows


def test_zero_states_have_no_rank() -> None:
    case = random_model(plt_num_loops=1)
    with torch.no_grad():
        for weight in case.model.parameters():
            weight.zero_()
    rows = rows_of(case.measure([tokens(5)]))
    assert "effective_rank" not in names_of(rows)
    assert not any(cell.nonfinite for cell in rows.values())


def test_one_loop_gives_what_is_defined_and_nothing_as_zero() -> None:
    rows = rows_of(random_model(plt_num_loops=1).measure([tokens(9)]))
    assert {loop for loop, *_ in rows} == {1}
    later = {
        "angular_change",
        "offset_cost",
        "effective_offset_cost",
        "attention_kl",
        "gate",
        "output_shift",
        "peak_loop",
    }
    assert not names_of(rows) & later
    assert {variant for _, name, variant, _, _ in rows if name == "fixed_point_gap"} == {
        "raw/as_first",
        "normed/as_first",
    }
    assert {variant for _, name, variant, _, _ in rows if name == "attention_entropy"} == {"mixed"}


def test_a_sample_of_padding_alone_is_refused() -> None:
    ids, mask = padded([tokens(4), tokens(3)])
    mask[1] = False
    with pytest.raises(ValueError, match="a sample without a token cannot be measured"):
        random_model(plt_num_loops=1).measure_batch(ids, mask)


@pytest.mark.parametrize("ids", [torch.zeros(0, 5, dtype=torch.int64), torch.zeros(1, 5)])
def test_no_samples_and_ids_that_are_not_whole_are_refused(ids: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="expected at least one, of int64"):
        random_model(plt_num_loops=1).measure_batch(ids, torch.ones_like(ids, dtype=torch.bool))


@pytest.mark.parametrize("bad", [53, -1])
def test_ids_outside_of_the_vocabulary_are_refused(bad: int) -> None:
    ids, mask = padded([[3, bad, 5]])
    with pytest.raises(ValueError, match="outside of the model's vocabulary of 53"):
        random_model(plt_num_loops=1).measure_batch(ids, mask)


def test_a_negative_id_is_named() -> None:
    ids, mask = padded([[3, -1, 5]])
    with pytest.raises(ValueError, match="-1"):
        random_model(plt_num_loops=1).measure_batch(ids, mask)


# --- padding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
def test_what_stands_in_padding_changes_nothing(left: bool) -> None:
    case, samples = random_model(), [tokens(11), tokens(4, seed=1)]
    ids, mask = padded(samples, left=left)
    other = torch.where(mask, ids, torch.tensor(tokens(ids.numel(), seed=9)).view_as(ids))
    first, second = case.measure_batch(ids, mask), case.measure_batch(other, mask)
    assert first.rows.equals(second.rows)
    assert first.heads.table().equals(second.heads.table())


@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
def test_a_padding_token_whose_embedding_is_not_finite_changes_nothing(left: bool) -> None:
    case, samples = random_model(plt_num_loops=2), [tokens(11), tokens(4, seed=1)]
    with torch.no_grad():
        case.model.model.embed_tokens.weight[0] = math.nan
    findings = case.measure(samples, left=left)
    for index, sample in enumerate(samples):
        assert_rows(rows_of(findings, index), rows_of(case.measure([sample])), EXACT)


# --- not finite ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("keep", [True, False], ids=["kept", "layer by layer"])
def test_one_bad_embedding_is_counted_apart_and_touches_no_other_sample(poison: float, keep: bool) -> None:
    case, healthy = random_model(), tokens(10, vocab=40)
    poisoned = [*healthy[:6], 50, *healthy[7:]]
    before = rows_of(case.measure([healthy]))
    with torch.no_grad():
        case.model.model.embed_tokens.weight[50] = poison
    findings = case.measure([poisoned, healthy], keep=keep)
    assert_rows(rows_of(findings, 1), before, EXACT)

    rows = rows_of(findings, 0)
    for cell in rows.values():
        assert cell.value is None or math.isfinite(cell.value)
        assert (cell.value is None) == (cell.count == 0)
    # It and the tokens after it are not finite. (Those before it may be: fused attention kernels multiply its values by
    # their weight of 0, which is NaN.) The first layer's scores are compared before any value is read.
    for name, variant in (("step_size", "raw"), ("output_entropy", ""), ("next_token_nll", "")):
        cell, whole = rows[1, name, variant, None, None], before[1, name, variant, None, None]
        assert cell.count + cell.nonfinite == whole.count
        assert cell.nonfinite >= whole.count - 6
    first = rows[1, "attention_entropy", "mixed", 0, None]
    assert (first.count, first.nonfinite) == (6 * 4, 4 * 4)
    assert rows[1, "effective_rank", "raw", None, None] == (None, 0, 1)
    breadth = [rows[loop, "peak_loop", "", None, None] for loop in (2, 3)]
    assert all(cell.nonfinite == rows[2, "output_shift", "", None, None].nonfinite for cell in breadth)
    for key, cell in rows.items():
        if key[1] == "attention_entropy" and key[0] == 1 and key[4] in (0, 1, 2) and not cell.nonfinite:
            assert cell.value == pytest.approx(before[key].value, rel=1e-9)


def test_a_bad_weight_in_the_layers_leaves_no_finite_state() -> None:
    case = random_model(plt_num_loops=2)
    with torch.no_grad():
        case.model.model.layers[0].mlp.up_proj.weight[0, 0] = math.nan
    rows = rows_of(case.measure([tokens(6)]))
    assert rows[1, "step_size", "raw", None, None] == (None, 0, 6)
    assert rows[2, "output_shift", "", None, None] == (None, 0, 6)
    assert rows[1, "effective_rank", "normed", None, None] == (None, 0, 1)
    assert rows[1, "attention_entropy", "mixed", 0, None].nonfinite == 0  # the first layer attends before it


# --- extremes --------------------------------------------------------------------------------------------------------


def saturated(bias: float, dtype: torch.dtype) -> Case:
    case = random_model(dtype, plt_num_loops=4, num_hidden_layers=1)
    with torch.no_grad():
        for layer in case.model.model.layers:
            layer.self_attn.plt_gate.weight.zero_()
            layer.self_attn.plt_gate.bias.fill_(bias)
    return changed(case, {})


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("bias", [1000.0, -1000.0])
def test_a_gate_of_exactly_0_or_1(bias: float, dtype: torch.dtype) -> None:
    """Both loops' mixtures are then one branch, and the divergence is that branch's own."""
    case, sample = saturated(bias, dtype), tokens(12)
    rows = rows_of(case.measure([sample]))
    branch = "global" if bias > 0 else "local"
    assert value(rows, 2, "gate") == (1.0 if bias > 0 else 0.0)
    assert not any(cell.nonfinite for cell in rows.values())
    for loop in (2, 3, 4):
        for name in ("attention_kl", "attention_entropy"):
            assert value(rows, loop, name, "mixed") == pytest.approx(value(rows, loop, name, branch), abs=2e-6)
    floors = {"": 1e-9 if dtype == torch.float64 else 2e-5, "angular_change": 1e-6 if dtype == torch.float64 else 1e-3}
    if dtype == torch.float64:
        assert_rows(rows, measure_reference(case.reference.trace(sample)), Tolerance(1e-5, floors))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_attention_so_sharp_that_all_but_one_weight_underflow(dtype: torch.dtype) -> None:
    case = random_model(dtype, plt_num_loops=3)
    with torch.no_grad():
        for layer in case.model.model.layers:
            layer.self_attn.q_proj.weight.mul_(300)
    rows = rows_of(case.measure([tokens(12)]))
    assert not any(cell.nonfinite for cell in rows.values())
    assert value(rows, 1, "attention_entropy", "mixed") < 0.05
    for loop in (2, 3):
        for variant in ("mixed", "global", "local"):
            # Small negative values are rounding alone.
            assert value(rows, loop, "attention_kl", variant) > -1e-5
    if dtype == torch.float64:
        expected = measure_reference(changed(case, {}).reference.trace(tokens(12)))
        for loop in (2, 3):  # logarithms of weights that are 0 in floating point are still exact in one branch
            key = (loop, "attention_kl", "global", None, None)
            assert rows[key].value == pytest.approx(expected[key].value, rel=1e-4)


@pytest.mark.parametrize("widest", [None, 9, 5])
def test_a_mixture_whose_widest_branch_may_have_a_window_too(
    widest: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("plt_diagnostics.attention.BLOCK_BYTES", 1)  # the least queries a block
    length, generator = 40, torch.Generator().manual_seed(0)
    q, k, own = torch.randn(3, 1, 2, length, 8, generator=generator, dtype=torch.float64)
    gate = torch.rand(1, 2, length, generator=generator, dtype=torch.float64)
    branches = (Branch("global", q, k, 0.3, widest, gate), Branch("local", q, own, 0.3, 5, 1 - gate))
    seen = torch.ones(length, length, dtype=torch.bool).tril()
    maps = []
    for branch in branches:
        sees = seen if branch.window is None else seen.triu(-branch.window)
        scores = branch.q_BHSK @ branch.k_BGSK.mT * branch.scale
        maps.append(scores.masked_fill(~sees, -math.inf).softmax(-1))
    whole = gate[..., None] * maps[0] + (1 - gate[..., None]) * maps[1]
    for block in blocks(0, [branches], None, torch.ones(1, length, dtype=torch.bool)):
        mixed, rows = block.loops[0].mixed, slice(block.first, block.stop)
        torch.testing.assert_close(mixed.p, whole[:, :, rows, mixed.start : block.stop])
        torch.testing.assert_close(mixed.entropy(), torch.special.entr(whole[:, :, rows]).sum(-1))


def test_all_outputs_tied() -> None:
    case = random_model(plt_num_loops=2)
    with torch.no_grad():
        case.model.lm_head.weight.zero_()
    rows = rows_of(case.measure([tokens(8)]))
    for loop in (1, 2):
        assert value(rows, loop, "logit_lens_rank") == 27  # the middle of 53 that are level
        assert value(rows, loop, "output_entropy") == pytest.approx(math.log(53), rel=1e-12)
        assert value(rows, loop, "next_token_nll") == pytest.approx(math.log(53), rel=1e-12)
    assert value(rows, 2, "output_shift") == 0


def test_outputs_so_sharp_that_probabilities_underflow() -> None:
    case = random_model(torch.float32, plt_num_loops=2)
    with torch.no_grad():
        case.model.lm_head.weight.mul_(1000)
    case, sample = changed(case, {}), tokens(8)
    rows, expected = rows_of(case.measure([sample])), measure_reference(case.reference.trace(sample))
    assert not any(cell.nonfinite for cell in rows.values())
    for name, loop in (("next_token_nll", 1), ("next_token_nll", 2), ("output_shift", 2)):
        assert value(rows, loop, name) == pytest.approx(value(expected, loop, name), rel=1e-3)


# --- half precision --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.inference_mode()
def test_a_mixture_sums_to_1_in_half_precision(dtype: torch.dtype) -> None:
    """1 less a gate in half precision would be rounded."""
    adapter, ids = PLTAdapter(random_model(dtype).model), torch.tensor([tokens(12)])
    run = adapter.run(ids, torch.ones_like(ids, dtype=torch.bool), further=False, keep=True)
    for layer, loops in enumerate(adapter.attention(run)):
        for block in blocks(layer, loops, None, torch.ones_like(ids, dtype=torch.bool)):
            for loop in block.loops:
                torch.testing.assert_close(loop.mixed.p.sum(-1), torch.ones(1, *loop.mixed.p.shape[1:3]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_states_are_measured_in_float32(dtype: torch.dtype) -> None:
    """The reference reads the half-precision states that the model really has; only its arithmetic is wider."""
    case, sample = random_model(dtype, scale=0.2, plt_num_loops=3), tokens(14)
    case = changed(case, {})
    adapter = PLTAdapter(case.model)
    ids, mask = padded([sample])
    with torch.inference_mode():
        run = adapter.run(ids, mask, further=False, keep=False)
        logits = [adapter.logits(h)[0].double().numpy() for h in run.raw]
        raw = [h[0].double().numpy() for h in run.raw]
    rows = rows_of(case.measure([sample]))
    assert not any(cell.nonfinite for cell in rows.values())
    for loop in (1, 2, 3):
        steps = np.linalg.norm(raw[loop] - raw[loop - 1], axis=-1)
        assert value(rows, loop, "step_size", "raw") == pytest.approx(steps.mean(), rel=1e-6)
        assert value(rows, loop, "effective_rank", "raw") == pytest.approx(rank_by_svd(raw[loop]), rel=1e-5)
        log_p = log_softmax(logits[loop])
        assert value(rows, loop, "output_entropy") == pytest.approx(entropy(log_p).mean(), rel=1e-5)
        if loop > 1:
            offsets = np.linalg.norm(raw[loop - 1][1:] - raw[loop - 1][:-1], axis=-1)
            assert value(rows, loop, "offset_cost", "raw") == pytest.approx(offsets.mean(), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_models_are_near_the_same_weights_in_float64(dtype: torch.dtype) -> None:
    case, sample = random_model(dtype, scale=0.2, plt_num_loops=2), tokens(14)
    rows, expected = rows_of(case.measure([sample])), measure_reference(changed(case, {}).reference.trace(sample))
    near = 0.02 if dtype == torch.float16 else 0.1
    for name, variant in (
        ("step_size", "raw"),
        ("effective_rank", "normed"),
        ("offset_cost", "normed"),
        ("attention_entropy", "mixed"),
        ("gate", ""),
        ("next_token_nll", ""),
    ):
        loop = 2
        assert value(rows, loop, name, variant) == pytest.approx(value(expected, loop, name, variant), rel=near), name


# --- effective rank --------------------------------------------------------------------------------------------------


@settings(max_examples=25, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    rows=st.integers(1, 30),
    columns=st.integers(1, 30),
    rank=st.integers(1, 6),
    tail=st.sampled_from([0.0, 1e-14, 1e-9, 1e-6, 1e-3]),
    size=st.sampled_from([1e-150, 1e-3, 1.0, 1e150]),
    seed=st.integers(0, 2**16),
)
def test_nearly_deficient_matrices(rows: int, columns: int, rank: int, tail: float, size: float, seed: int) -> None:
    random = np.random.default_rng(seed)
    matrix = random.normal(size=(rows, rank)) @ random.normal(size=(rank, columns))
    matrix = size * (matrix + tail * random.normal(size=(rows, columns)))
    expected = rank_by_svd(matrix)
    assert effective_rank(torch.from_numpy(matrix)) == pytest.approx(expected, rel=1e-4)
    assert 1 - 1e-9 <= expected <= min(rows, columns) + 1e-9


@pytest.mark.parametrize("tail", [0.0, 1e-7])
def test_a_large_matrix_of_rank_3(tail: float) -> None:
    random = np.random.default_rng(0)
    matrix = random.normal(size=(2048, 3)) @ random.normal(size=(3, 512)) + tail * random.normal(size=(2048, 512))
    found = effective_rank(torch.from_numpy(matrix))
    assert found == pytest.approx(rank_by_svd(matrix), rel=1e-4)
    if tail == 0:
        assert 2.5 < found < 3 + 1e-6


def test_heads_that_attend_alike_have_rank_1() -> None:
    row = torch.rand(1, 50, dtype=torch.float64)
    alike = row.expand(8, 50)
    assert float(rank_of_gram(alike @ alike.T)) == pytest.approx(1, abs=1e-5)
    apart = torch.eye(8, dtype=torch.float64)
    assert float(rank_of_gram(apart)) == pytest.approx(8, rel=1e-12)


def test_matrices_without_a_rank() -> None:
    whole = torch.rand(4, 5)
    assert math.isfinite(effective_rank(whole))
    assert math.isnan(effective_rank(torch.zeros(4, 5)))
    for bad in (math.nan, math.inf, -math.inf):
        whole[2, 3] = bad
        assert math.isnan(effective_rank(whole))
