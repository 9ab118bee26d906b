"""Half precision stays finite and near float32; float32 decoding stays near the full forward."""

from __future__ import annotations

import pytest
import torch
from plt_cases import BACKENDS, MODES, assert_close, build, fixture, gap, left_padded, positions, row, tiny, tokens
from torch import Tensor

from plt_model import PLTCache, PLTForCausalLM

HALF = {torch.bfloat16: 0.5, torch.float16: 0.06}
"""Largest difference of a logit from float32, of logits with a spread of about 1.5: measured 0.2 and 0.02."""

DTYPES = pytest.mark.parametrize("dtype", HALF, ids=str)


def token_by_token(model: PLTForCausalLM, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    cache = PLTCache(model.config)
    logits = []
    with torch.no_grad():
        for t in range(ids.shape[1]):
            seen = None if mask is None else mask[:, : t + 1]
            where = None if seen is None else positions(seen)[:, -1:]
            out = model(
                ids[:, t : t + 1], attention_mask=seen, position_ids=where, past_key_values=cache, use_cache=True
            )
            logits.append(out.logits)
    return torch.cat(logits, dim=1)


@DTYPES
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["a_r2_w4", "c_r4_w64_s160", "e_r2_nonorm_noscale", "f_r1"])
def test_half_precision_is_near_the_fixtures(name: str, backend: str, dtype: torch.dtype) -> None:
    case = fixture(name)
    model = PLTForCausalLM.from_pretrained(case.folder, dtype=dtype, attn_implementation=backend).eval()
    with torch.no_grad():
        logits = model(row(case.ids)).logits[0]
    assert logits.dtype == dtype
    assert logits.isfinite().all()
    assert_close(logits, case.expected["logits"], HALF[dtype], name)
    close = (logits.float() - case.expected["logits"]).abs().mean() / case.expected["logits"].std()
    assert close < 0.1


@DTYPES
@pytest.mark.parametrize("mode", MODES)
def test_half_precision_decodes(mode: str, dtype: torch.dtype) -> None:
    """Also over rows whose first positions are all padding: nothing there may spread as NaN."""
    wide = build(tiny(**MODES[mode]), dtype=torch.float32)
    model = build(tiny(**MODES[mode]), dtype=dtype, backend="sdpa")
    ids, mask, where = left_padded([tokens(12), tokens(3, seed=1)])
    with torch.no_grad():
        expected = wide(ids, attention_mask=mask, position_ids=where).logits
    found = token_by_token(model, ids, mask)
    assert found.dtype == dtype
    spread = expected[mask.bool()].std().item()
    error = (found.float() - expected)[mask.bool()]
    assert error.isfinite().all()
    assert error.abs().mean() < (0.06 if dtype == torch.bfloat16 else 0.01) * spread


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("loops", [1, 2, 3, 4], ids="R{}".format)
@pytest.mark.parametrize("mode", MODES)
def test_float32_decoding_is_near_the_full_forward(mode: str, loops: int, backend: str) -> None:
    model = build(tiny(**MODES[mode], plt_num_loops=loops), dtype=torch.float32, backend=backend)
    ids, mask, where = left_padded([tokens(14), tokens(5, seed=1)])
    with torch.no_grad():
        whole = model(ids, attention_mask=mask, position_ids=where).logits
    found = token_by_token(model, ids, mask)
    assert_close(found[mask.bool()], whole[mask.bool()], 1e-4)
    assert_close(token_by_token(model, ids[:1])[0], whole[0], 1e-4)


@pytest.mark.parametrize("name", ["a_r2_w4", "c_r4_w64_s160"])
def test_float32_decoding_of_the_fixtures(name: str) -> None:
    case = fixture(name)
    model = PLTForCausalLM.from_pretrained(case.folder, dtype=torch.float32).eval()
    assert gap(token_by_token(model, row(case.ids))[0], case.expected["logits"]) <= 1e-4


@DTYPES
def test_the_carried_vectors_keep_the_models_type(dtype: torch.dtype) -> None:
    for kind in (dtype, torch.float32):
        model = build(tiny(), dtype=kind, backend="sdpa")
        cache = PLTCache(model.config)
        with torch.no_grad():
            for piece in (tokens(5), [7], [8]):
                model(row(piece), past_key_values=cache, use_cache=True)
                assert cache.carry.dtype == kind


@pytest.mark.parametrize("decode", [False, True], ids=["forward", "decode"])
def test_large_states_do_not_overflow_in_float16(decode: bool) -> None:
    """The square of a state may not fit into float16: norms are computed in float32."""
    found = []
    for dtype in (torch.float16, torch.float32):
        model = build(tiny(), dtype=dtype, backend="sdpa")
        with torch.no_grad():
            model.model.embed_tokens.weight.mul_(400)
            ids = row(tokens(9))
            found.append((token_by_token(model, ids) if decode else model(ids).logits).float())
    assert found[0].isfinite().all()
    assert (found[0] - found[1]).abs().mean() < 0.05 * found[1].std()


@DTYPES
def test_half_precision_trains(dtype: torch.dtype) -> None:
    model = build(tiny(), dtype=dtype, backend="sdpa").train()
    ids = row(tokens(12))
    model(ids, labels=ids).loss.backward()
    wide = build(tiny(), dtype=torch.float32).train()
    wide(ids, labels=ids).loss.backward()
    for (name, found), expected in zip(model.named_parameters(), wide.parameters(), strict=True):
        assert found.grad.isfinite().all(), name
        angle = torch.nn.functional.cosine_similarity(found.grad.float().flatten(), expected.grad.flatten(), dim=0)
        assert angle > 0.95, f"gradient of {name}: cosine {angle:.3f}"
