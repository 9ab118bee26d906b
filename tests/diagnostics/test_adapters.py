"""The adapters: what they say of a model is what the model itself computes, for a PLT and for a foreign family."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from foreign.checkpoint import write_ouro
from torch import Tensor, nn

from plt_diagnostics import MEASUREMENTS, measure, open_model
from plt_diagnostics.adapters import FAMILIES
from plt_diagnostics.adapters.hooks import Calls, Capture, heads
from plt_diagnostics.adapters.ouro import OuroAdapter
from plt_diagnostics.adapters.plt import PLTAdapter
from plt_diagnostics.adapters.protocol import LoopedModel, LoopRun, right_padded
from plt_diagnostics.attention import blocks
from plt_model import PLTConfig, PLTForCausalLM
from plt_model.loading import CheckpointError

DOCS = Path(__file__).resolve().parents[2] / "docs" / "adapters.md"
FIXTURES = Path(__file__).resolve().parents[1] / "fixtures" / "plt"

PLT: dict[str, Any] = {
    "vocab_size": 37,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "plt_num_loops": 3,
    "plt_window_size": [3, 0],
    "plt_emb_scale": 0.8,
    "plt_hidden_scale": 0.6,
    "eos_token_id": 2,
}
VARIETIES: dict[str, dict[str, Any]] = {
    "plt": {},
    "raw-hidden": {"plt_normalize_per_loop": False},
    "no-shift": {"plt_clp_shift": False},
    "no-gswa": {"plt_gswa": False},
    "query-gate": {"plt_gate_use_hidden_states": False},
    "sequential": {"plt_loop_mode": "sequential"},
    "one-loop": {"plt_num_loops": 1},
}
PADDINGS = ("none", "right", "left")


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def modules_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """transformers copies remote code to a cache of the user's: another one, for the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        yield


@pytest.fixture(scope="module")
def ouro(tmp_path_factory: pytest.TempPathFactory, modules_cache: None) -> Path:  # noqa: ARG001
    return write_ouro(tmp_path_factory.mktemp("ouro") / "ouro-small")


def plt(dtype: torch.dtype = torch.float32, **changes: Any) -> PLTForCausalLM:
    """A random model whose gates, norms and attention are far from even."""
    torch.manual_seed(3)
    model = PLTForCausalLM(PLTConfig(**{**PLT, **changes})).eval().to(dtype)
    for name, weights in model.named_parameters():
        if "norm" in name:
            weights.uniform_(0.3, 1.7)
        else:
            weights.normal_(std=0.4)
    return model


def batch(padding: str, length: int = 11, vocab: int = 37) -> tuple[Tensor, Tensor]:
    """Two samples, the second one shorter where there is padding."""
    ids = torch.randint(3, vocab, (2, length))
    mask = torch.ones_like(ids).bool()
    if padding == "right":
        mask[1, -4:] = False
    if padding == "left":
        mask[1, :4] = False
    return ids, mask


def opened(folder: Path, **how: Any) -> OuroAdapter:
    model = open_model(folder, dtype=torch.float64, trust_remote_code=True, **how)
    assert isinstance(model, OuroAdapter)
    return model


def distributions(model: LoopedModel, run: LoopRun) -> list[list[dict[str, Tensor]]]:
    """[layer][loop] -> the branches' and the mixture's [B, H, S, S], whole."""
    length = run.ids_BS.shape[1]
    found = []
    for layer, loops in enumerate(model.attention(run)):
        parts = list(blocks(layer, loops, run.key_mask_BS, run.mask_BS))
        per_loop = []
        for loop in range(len(loops)):
            whole: dict[str, Tensor] = {}
            for part in parts:
                taken = {"mixed": part.loops[loop].mixed, **part.loops[loop].branches}
                for name, distribution in taken.items():
                    p = distribution.p
                    into = whole.setdefault(name, p.new_zeros(*p.shape[:2], length, length))
                    columns = slice(distribution.start, distribution.start + p.shape[-1])
                    into[:, :, part.first : part.stop, columns] = p
            per_loop.append(whole)
        found.append(per_loop)
    return found


def table(model: LoopedModel, ids: Tensor, mask: Tensor, names: list[str] | None = None) -> pd.DataFrame:
    """The sample-level rows of a measurement."""
    rows = measure(model, ids, mask, samples=list(range(len(ids))), measurements=names).rows.to_pandas()
    return rows[rows["layer"].isna() & rows["position"].isna()]


def same(found: Tensor, expected: Tensor, mask: Tensor, tolerance: float = 0.0) -> None:
    """Equal at the real tokens."""
    torch.testing.assert_close(found[mask], expected[mask], rtol=0, atol=tolerance)


# --- the protocol ---


@pytest.mark.parametrize("variety", VARIETIES)
def test_the_plt_adapter_is_a_looped_model(variety: str) -> None:
    assert isinstance(PLTAdapter(plt(**VARIETIES[variety])), LoopedModel)


def test_the_ouro_adapter_is_a_looped_model(ouro: Path) -> None:
    model = opened(ouro)
    assert isinstance(model, LoopedModel)
    assert (model.name, model.hands_on, model.shifts) == ("ouro", "normed", False)
    assert model.dtype == torch.float64
    assert model.device == torch.device("cpu")
    assert tuple(vars(model.shape).values()) == (4, 2, 4, 24, 41)


def test_a_class_without_one_of_the_methods_is_no_looped_model() -> None:
    class Half:
        name = "half"

        def run(self) -> None: ...

    assert not isinstance(Half(), LoopedModel)


def test_right_padding_is_told_from_the_rest() -> None:
    answers = {padding: right_padded(batch(padding)[1]) for padding in PADDINGS}
    assert answers == {"none": True, "right": True, "left": False}
    assert not right_padded(torch.tensor([[True, False, True]]))


# --- hooks ---


class Layer(nn.Module):
    """Called in the ways that layers of transformers are: the state by place or by name, alone or first of a tuple."""

    def __init__(self, as_tuple: bool) -> None:
        super().__init__()
        self.as_tuple = as_tuple
        self.q_proj = nn.Linear(6, 6)

    def forward(self, hidden_states: Tensor, shift: Tensor, *, scale: float = 1.0) -> Tensor | tuple[Tensor, str]:
        y = self.q_proj(hidden_states) * scale + shift
        return (y, "weights") if self.as_tuple else y


@pytest.mark.parametrize("as_tuple", [False, True], ids=["tensor", "tuple"])
def test_a_call_can_be_made_again_on_another_input(as_tuple: bool) -> None:
    layer, x, other = Layer(as_tuple), torch.randn(2, 6), torch.randn(2, 6)
    with Calls([layer]) as calls:
        layer(x, torch.tensor(3.0), scale=2.0)
        layer(hidden_states=x, shift=torch.tensor(5.0))
    layer(x, torch.tensor(7.0))
    assert torch.equal(calls.again(0, 0, other), layer.q_proj(other) * 2 + 3)
    assert torch.equal(calls.again(0, 1, other), layer.q_proj(other) + 5)
    assert calls.inputs == [[]], "inputs are large: kept on demand only"
    with pytest.raises(IndexError):
        calls.again(0, 2, other)


def test_inputs_are_kept_on_demand() -> None:
    layer, x = Layer(False), torch.randn(2, 6)
    with Calls([layer], inputs=True) as calls:
        layer(x, torch.tensor(3.0))
    assert calls.inputs == [[x]]


def test_capture_keeps_what_parts_put_out_while_it_is_open() -> None:
    layers, x = [Layer(False), Layer(False)], torch.randn(2, 6)
    with suppress(ZeroDivisionError), Capture(layers, ("q_proj",)) as capture:
        layers[1](x, torch.tensor(0.0))
        layers[1](2 * x, torch.tensor(0.0))
        raise ZeroDivisionError
    layers[1](3 * x, torch.tensor(0.0))
    assert capture.take(0, "q_proj") == []
    first, second = capture.take(1, "q_proj")
    assert torch.equal(first, layers[1].q_proj(x))
    assert torch.equal(second, layers[1].q_proj(2 * x))
    assert capture.take(1, "q_proj") == [], "taken once"


def test_heads_are_split_as_attention_splits_them() -> None:
    x = torch.arange(2 * 3 * 8).view(2, 3, 8)
    assert heads(x, 4).shape == (2, 2, 3, 4)
    assert torch.equal(heads(x, 4)[1, 1, 2], x[1, 2, 4:])


# --- the Parallel Loop Transformer ---


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("variety", VARIETIES)
def test_plt_states_are_the_models_own_to_the_bit(variety: str, padding: str) -> None:
    model, (ids, mask) = plt(**VARIETIES[variety]), batch(padding)
    run = PLTAdapter(model).run(ids, mask, further=False, keep=True)
    given = None if padding == "right" else mask
    out = model.model(ids, attention_mask=given, output_loop_states=True)
    assert torch.equal(run.raw[0], model.model.embed_tokens(ids))
    assert len(run.raw) == len(out.loop_states) + 1
    for found, expected in zip(run.raw[1:], out.loop_states, strict=True):
        assert torch.equal(found, expected)
    assert run.further is None


@pytest.mark.parametrize("padding", PADDINGS)
def test_right_padding_changes_nothing_that_counts(padding: str) -> None:
    """Without a mask on the right the real tokens are still those of a run that gets the mask."""
    model, (ids, mask) = plt(torch.float64), batch(padding)
    run = PLTAdapter(model).run(ids, mask, further=False, keep=False)
    out = model.model(ids, attention_mask=mask, output_loop_states=True)
    for found, expected in zip(run.raw[1:], out.loop_states, strict=True):
        same(found, expected, mask, 1e-12)


@pytest.mark.parametrize("keep_bytes", [0, 2**30], ids=["replayed", "kept"])
@pytest.mark.parametrize("variety", ["plt", "raw-hidden", "no-shift", "query-gate"])
def test_plt_gates_are_the_models_own(variety: str, keep_bytes: int) -> None:
    model, (ids, mask) = plt(**VARIETIES[variety]), batch("none")
    adapter = PLTAdapter(model, keep_bytes=keep_bytes)
    out = model.model(ids, output_loop_states=True)
    for layer, loops in enumerate(adapter.attention(adapter.run(ids, mask, further=False, keep=True))):
        assert [len(branches) for branches in loops] == [1, 2, 2]
        for r, (global_, local) in enumerate(loops[1:]):
            assert torch.equal(global_.weight_BHS, out.loop_gates[r][layer])
            assert torch.equal(local.weight_BHS, 1 - out.loop_gates[r][layer])
            assert (global_.name, global_.window, local.name, local.window) == ("global", None, "local", 3)


@pytest.mark.parametrize("variety", VARIETIES)
def test_plt_replay_gives_what_was_kept(variety: str) -> None:
    model, (ids, mask) = plt(**VARIETIES[variety]), batch("left")
    seen = []
    for keep_bytes in (0, 2**30):
        adapter = PLTAdapter(model, keep_bytes=keep_bytes)
        run = adapter.run(ids, mask, further=False, keep=True)
        assert bool(run.kept) == (keep_bytes > 0)
        seen.append([branch for layer in adapter.attention(run) for loop in layer for branch in loop])
        assert not run.kept, "what was yielded is let go"
    for replayed, kept in zip(*seen, strict=True):
        assert torch.equal(replayed.q_BHSK, kept.q_BHSK)
        assert torch.equal(replayed.k_BGSK, kept.k_BGSK)
        assert (replayed.weight_BHS is None) == (kept.weight_BHS is None)
        assert kept.weight_BHS is None or torch.equal(replayed.weight_BHS, kept.weight_BHS)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("variety", ["plt", "sequential", "no-gswa"])
def test_plt_attention_rebuilds_the_layers_output(variety: str, padding: str) -> None:
    """The distributions, applied to values projected apart, give what o_proj is given: they are those that the model
    attended with, branch by branch and mixed. Loops after the first of a PLT read loop 1's values globally."""
    model, (ids, mask) = plt(torch.float64, **VARIETIES[variety]), batch(padding)
    values, outputs = _taps(model)
    adapter = PLTAdapter(model, keep_bytes=2**30)
    run = adapter.run(ids, mask, further=False, keep=True)
    for layer, loops in enumerate(distributions(adapter, run)):
        v = [x.unflatten(-1, (-1, 8)).transpose(1, 2).repeat_interleave(2, 1) for x in values[layer]]
        gates = model.model(ids, attention_mask=mask, output_loop_states=True).loop_gates
        for r, found in enumerate(loops):
            first = 0 if variety != "sequential" else r
            expected = found["global"] @ v[first]
            if "local" in found:
                g = gates[r - 1][layer][..., None]
                expected = g * expected + (1 - g) * (found["local"] @ v[r])
            same(outputs[layer][r], expected.transpose(1, 2).flatten(2), mask, 1e-12)


def _taps(model: PLTForCausalLM) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
    """What each layer's v_proj puts out and o_proj takes in, call by call."""
    layers = model.model.layers
    values: list[list[Tensor]] = [[] for _ in layers]
    outputs: list[list[Tensor]] = [[] for _ in layers]
    for i, layer in enumerate(layers):
        layer.self_attn.v_proj.register_forward_hook(lambda _m, _x, y, i=i: values[i].append(y))
        layer.self_attn.o_proj.register_forward_pre_hook(lambda _m, x, i=i: outputs[i].append(x[0]))
    return values, outputs


@pytest.mark.parametrize("variety", ["plt", "raw-hidden", "no-shift", "no-gswa", "sequential"])
def test_a_further_loop_is_what_one_loop_more_gives(variety: str) -> None:
    changes, (ids, mask) = VARIETIES[variety], batch("left")
    run = PLTAdapter(plt(**changes)).run(ids, mask, further=True, keep=False)
    more = plt(**{**changes, "plt_num_loops": 4}).model(ids, attention_mask=mask, output_loop_states=True)
    assert torch.equal(run.further, more.loop_states[-1])


def test_a_plt_of_one_loop_has_no_further_one() -> None:
    assert PLTAdapter(plt(plt_num_loops=1)).run(*batch("none"), further=True, keep=False).further is None


@pytest.mark.parametrize("variety", ["plt", "raw-hidden", "sequential"])
def test_as_first_is_the_plain_model_on_the_state(variety: str) -> None:
    """A model of one loop that is given z(r) in the embedding's place."""
    changes, (ids, mask) = VARIETIES[variety], batch("left")
    adapter = PLTAdapter(plt(**changes))
    run = adapter.run(ids, mask, further=False, keep=False)
    state = run.raw[2] if variety == "raw-hidden" else adapter.norm(run.raw[2])
    plain = plt(**{**changes, "plt_num_loops": 1, "plt_loop_mode": "plt"})
    out = plain.model(inputs_embeds=state, attention_mask=mask, output_loop_states=True)
    assert torch.equal(adapter.as_first(run, run.raw[2]), out.loop_states[0])


def test_the_sequential_baseline_applies_one_block_again_and_again() -> None:
    adapter = PLTAdapter(plt(plt_loop_mode="sequential"))
    run = adapter.run(*batch("none"), further=True, keep=False)
    for r in (1, 2):
        assert torch.equal(adapter.as_first(run, run.raw[r]), run.raw[r + 1])
    kept, handed_on = adapter.loop_input(run, run.raw[1])
    assert not kept.any()
    assert torch.equal(handed_on, run.raw[1])


def test_loop_input_shifted_and_summed_is_what_a_plt_loop_reads() -> None:
    model, (ids, mask) = plt(), batch("none")
    read: list[Tensor] = []
    model.model.layers[0].register_forward_pre_hook(lambda _m, x: read.append(x[0]))
    adapter = PLTAdapter(model)
    run = adapter.run(ids, mask, further=False, keep=False)
    kept, handed_on = adapter.loop_input(run, adapter.norm(run.raw[1]))
    torch.testing.assert_close(read[1][:, 1:], kept[:, 1:] + handed_on[:, :-1], rtol=0, atol=1e-6)
    torch.testing.assert_close(read[1][:, 0], kept[:, 0], rtol=0, atol=1e-6)


def test_open_model_opens_a_released_checkpoint_in_either_mode() -> None:
    folder = FIXTURES / "a_r2_w4"
    ids, mask = batch("none")
    own = open_model(folder)
    assert (own.name, own.shape.loops, own.shifts, own.hands_on) == ("plt", 2, True, "normed")
    sequential = open_model(folder, loop_mode="sequential", dtype=torch.float64)
    assert (sequential.name, sequential.shifts, sequential.dtype) == ("plt-sequential", False, torch.float64)
    with pytest.warns(UserWarning, match="running 3 loops on a checkpoint made for 2"):
        assert len(open_model(folder, loops=3).run(ids, mask, further=False, keep=False).raw) == 4


# --- Ouro ---


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("loops", [1, 3, 4])
def test_ouro_states_are_the_models_own(ouro: Path, loops: int, padding: str) -> None:
    model, (ids, mask) = opened(ouro, loops=loops), batch(padding)
    run = model.run(ids, mask, further=True, keep=True)
    output, states, _ = model.base(ids, mask, use_cache=False)
    assert torch.equal(run.raw[0], model.base.embed_tokens(ids))
    assert len(run.raw) == len(states) + 1 == loops + 1
    for raw, normed in zip(run.raw[1:], states, strict=True):
        assert not torch.allclose(raw, normed)
        same(model.norm(raw), normed, mask, 1e-12)
    logits = model.model(ids, mask, use_cache=False).logits
    same(model.logits(run.raw[-1]), logits, mask, 1e-12)
    same(output.last_hidden_state, states[-1], mask)


@pytest.mark.parametrize("keep_bytes", [0, 2**30], ids=["replayed", "kept"])
@pytest.mark.parametrize("padding", PADDINGS)
def test_ouro_distributions_are_the_weights_of_eager_attention(ouro: Path, padding: str, keep_bytes: int) -> None:
    model, (ids, mask) = opened(ouro), batch(padding)
    weights = _weights(model, ids, mask)
    adapter = OuroAdapter(model.model, keep_bytes=keep_bytes)
    run = adapter.run(ids, mask, further=True, keep=True)
    assert bool(run.kept) == (keep_bytes > 0)
    found = distributions(adapter, run)
    assert not run.kept
    assert [len(loops) for loops in found] == [4, 4]
    for layer, loops in enumerate(found):
        for r, branches in enumerate(loops):
            assert set(branches) == {"mixed", "global"}
            same(branches["mixed"].transpose(1, 2), weights[layer][r].transpose(1, 2), mask, 1e-10)


def test_ouro_distributions_in_float32_too(ouro: Path) -> None:
    model = open_model(ouro, trust_remote_code=True)
    assert model.dtype == torch.float32
    ids, mask = batch("none", length=40)
    weights = _weights(model, ids, mask)
    for layer, loops in enumerate(distributions(model, model.run(ids, mask, further=False, keep=True))):
        for r, branches in enumerate(loops):
            same(branches["mixed"], weights[layer][r], torch.ones_like(weights[layer][r]).bool(), 1e-5)


def _weights(model: Any, ids: Tensor, mask: Tensor) -> list[list[Tensor]]:
    """[layer][loop] -> [B, H, S, S] as the model's own attention returns them."""
    seen: list[list[Tensor]] = [[] for _ in model.base.layers]
    handles = [
        layer.self_attn.register_forward_hook(lambda _m, _x, y, i=i: seen[i].append(y[1]))
        for i, layer in enumerate(model.base.layers)
    ]
    model.base(ids, mask, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


def test_ouro_windows_are_counted_as_transformers_does(tmp_path: Path, modules_cache: None) -> None:  # noqa: ARG001
    kinds = ["full_attention", "sliding_attention"]
    folder = write_ouro(tmp_path / "ouro-sliding", layer_types=kinds, sliding_window=4)
    model, (ids, mask) = opened(folder), batch("none")
    weights = _weights(model, ids, mask)
    found = distributions(model, model.run(ids, mask, further=False, keep=True))
    assert int((weights[1][0][0, 0, -1] > 0).sum()) == 4
    for layer, loops in enumerate(found):
        for r, branches in enumerate(loops):
            same(branches["mixed"].transpose(1, 2), weights[layer][r].transpose(1, 2), mask, 1e-10)
    assert {"attention_kl", "head_cosine"} <= set(table(model, ids, mask)["measurement"])


@pytest.mark.parametrize("loops", [1, 3])
def test_ouro_runs_one_block_again_and_again(ouro: Path, loops: int) -> None:
    """as_first and as_next are the same loop, and one loop more gives it too."""
    model, (ids, mask) = opened(ouro, loops=loops), batch("left")
    run = model.run(ids, mask, further=True, keep=False)
    assert run.further is not None
    again = [model.as_first(run, raw) for raw in run.raw[1:]]
    for found, expected in zip(again, [*run.raw[2:], run.further], strict=True):
        same(found, expected, mask, 1e-12)
    more = opened(ouro, loops=loops + 1).run(ids, mask, further=False, keep=False)
    same(run.further, more.raw[-1], mask)
    kept, handed_on = model.loop_input(run, run.raw[1])
    assert not kept.any()
    assert torch.equal(handed_on, run.raw[1])


def test_ouro_is_left_as_it_was(ouro: Path) -> None:
    model = opened(ouro, loops=2)
    model.run(*batch("none"), further=True, keep=True)
    assert (model.base.total_ut_steps, model.model.config.total_ut_steps) == (2, 2)
    hooked = [m for m in model.model.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert hooked == []


@pytest.mark.parametrize("loops", [1, 4])
def test_every_measurement_is_made_of_ouro_or_is_absent(ouro: Path, loops: int) -> None:
    model, (ids, mask) = opened(ouro, loops=loops), batch("right")
    rows = table(model, ids, mask)
    found = set(rows["measurement"])
    later = {"angular_change", "attention_kl", "output_shift", "offset_cost", "peak_loop"}
    never = {"gate", "effective_offset_cost"}
    assert found == set(MEASUREMENTS) - never - (later if loops == 1 else set())
    assert set(rows.loc[rows["measurement"] == "attention_entropy", "variant"]) == {"mixed"}
    assert rows["value"].notna().all()
    assert not rows["nonfinite"].any()
    assert set(rows["loop"]) == set(range(1, loops + 1))


def test_ouro_in_bfloat16_is_measured_in_float32(ouro: Path) -> None:
    """States are rounded; what is made of them is not rounded again, so entropies are near those of full precision."""
    ids, mask = batch("left")
    narrow = open_model(ouro, dtype=torch.bfloat16, trust_remote_code=True)
    assert narrow.dtype == torch.bfloat16
    names = ["attention_entropy", "output_entropy", "step_size"]
    tables = [table(model, ids, mask, names) for model in (narrow, opened(ouro))]
    rounded, exact = (t.groupby(["measurement", "variant", "loop"], observed=True)["value"].mean() for t in tables)
    assert not tables[0]["nonfinite"].any()
    pd.testing.assert_series_equal(rounded, exact, rtol=0.1)


@pytest.mark.parametrize("variety", VARIETIES)
def test_every_measurement_is_made_of_a_plt_or_is_absent(variety: str) -> None:
    model = PLTAdapter(plt(torch.float64, **VARIETIES[variety]))
    rows = table(model, *batch("right"))
    absent = set(MEASUREMENTS) - set(rows["measurement"])
    gateless = {"gate"} if variety in ("sequential", "no-gswa") else set()
    unshifted = {"effective_offset_cost"} if variety in ("sequential", "no-shift") else set()
    later = {"angular_change", "attention_kl", "effective_offset_cost", "gate", "offset_cost", "output_shift"}
    assert absent == (later | {"peak_loop"} if variety == "one-loop" else gateless | unshifted)
    assert not rows["nonfinite"].any()


def test_a_measurement_of_ouro_against_its_definition(ouro: Path) -> None:
    """Through all layers of the package: entropies and step sizes from the model's own weights and states."""
    model, (ids, mask) = opened(ouro), batch("right")
    rows = table(model, ids, mask, ["attention_entropy", "step_size", "next_token_nll"])
    value = rows.set_index(["measurement", "variant", "loop", "sample"])["value"]
    _, states, _ = model.base(ids, mask, use_cache=False)
    weights = _weights(model, ids, mask)
    for sample, real in enumerate(mask):
        for r in range(1, 5):
            w = torch.stack([layer[r - 1][sample][:, real] for layer in weights])
            entropy = torch.special.entr(w).sum(-1).mean()
            assert value["attention_entropy", "mixed", r, sample] == pytest.approx(float(entropy), abs=1e-9)
            before = model.norm(model.base.embed_tokens(ids)) if r == 1 else states[r - 2]
            step = (states[r - 1] - before).norm(dim=-1)[sample][real].mean()
            assert value["step_size", "normed", r, sample] == pytest.approx(float(step), abs=1e-9)
            log_p = model.model.lm_head(states[r - 1])[sample][real].log_softmax(-1)
            nll = -log_p[:-1].gather(1, ids[sample][real][1:, None]).mean()
            assert value["next_token_nll", "", r, sample] == pytest.approx(float(nll), abs=1e-9)


# --- opening folders ---


def test_more_loops_than_trained_are_warned_about(ouro: Path) -> None:
    with pytest.warns(UserWarning, match="running 6 loops on a checkpoint made for 4"):
        assert opened(ouro, loops=6).shape.loops == 6
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert opened(ouro, loops=2).shape.loops == 2


def refused(act: Callable[[], object], *parts: str) -> None:
    """A ValueError of one line that holds these parts."""
    with pytest.raises(ValueError, match=re.escape(parts[0])) as caught:
        act()
    message = str(caught.value)
    assert "\n" not in message
    assert all(part in message for part in parts), message
    assert isinstance(caught.value, CheckpointError)


def test_code_of_others_runs_only_on_demand(ouro: Path, tmp_path: Path) -> None:
    copy = tmp_path / "ouro-bomb"
    copy.mkdir()
    (copy / "config.json").write_text((ouro / "config.json").read_text())
    (copy / "configuration_ouro.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    refused(lambda: open_model(copy), str(copy), "'ouro'", "--trust-remote-code", "trust_remote_code=True")
    assert not (tmp_path / "ran").exists()


def test_an_unknown_family_is_told_which_there_are(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    refused(lambda: open_model(tmp_path), "'llama'", *FAMILIES, "plt_diagnostics.adapters.protocol")
    (tmp_path / "config.json").write_text("[]")
    refused(lambda: open_model(tmp_path), "model_type is None")
    (tmp_path / "config.json").write_text('{"model_type": ["ouro"]}')
    refused(lambda: open_model(tmp_path), "model_type is ['ouro']")
    (tmp_path / "config.json").write_text("{")
    refused(lambda: open_model(tmp_path), "config.json", "not valid JSON")
    refused(lambda: open_model(tmp_path / "nowhere"), "no such model folder")


@pytest.mark.parametrize(
    ("how", "parts"),
    [
        ({"loop_mode": "sequential"}, ("loop_mode is 'sequential'", "unset")),
        ({"loops": 0}, ("loops is 0", "at least 1")),
    ],
    ids=["mode", "loops"],
)
def test_what_ouro_has_no_use_for_is_refused(ouro: Path, how: dict[str, Any], parts: tuple[str, ...]) -> None:
    refused(lambda: opened(ouro, **how), *parts)


def changed(ouro: Path, folder: Path, change: Callable[[Path], object]) -> Path:
    """A copy of the checkpoint, changed."""
    folder.mkdir()
    for file in ouro.iterdir():
        if file.is_file():
            (folder / file.name).write_bytes(file.read_bytes())
    change(folder)
    return folder


def replaced(name: str, old: str, new: str) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new))

    return change


def resized(folder: Path) -> None:
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "vocab_size": 43}))


def deeper(folder: Path) -> None:
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "num_hidden_layers": 3}))


CODE = "modeling_ouro.py"


@pytest.mark.parametrize(
    ("name", "change", "parts"),
    [
        ("broken", replaced(CODE, "from torch import Tensor, nn", "import nothing_of_this_name"), ("transformers 5",)),
        ("raises", replaced(CODE, "self.post_init()", "raise KeyError('default')"), ("KeyError: 'default'",)),
        ("deeper", deeper, ("tensors are missing", "model.layers.2.")),
        ("resized", resized, ("ouro-resized",)),
        ("renamed", replaced(CODE, "self.norm", "self.last_norm"), ("missing", "last_norm")),
        ("stepless", replaced(CODE, "self.total_ut_steps", "self.steps"), ("model.total_ut_steps",)),
        ("unset", replaced(CODE, "init.copy_(module.inv_freq", "(lambda *_: 0)(module.inv_freq"), ("rotary",)),
        ("headless", replaced(CODE, "head_dim = config, layer_idx, config.head_dim", "size = 1, 2, 6"), ("head_dim",)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_does_not_fit_is_one_line(
    ouro: Path, tmp_path: Path, name: str, change: Callable[[Path], object], parts: tuple[str, ...]
) -> None:
    folder = changed(ouro, tmp_path / f"ouro-{name}", change)
    refused(lambda: opened(folder), *parts)


def test_a_norm_that_is_called_at_other_times_is_noticed(ouro: Path, tmp_path: Path) -> None:
    twice = replaced(CODE, "x = self.norm(x)\n", "x = self.norm(self.norm(x))\n")
    model = opened(changed(ouro, tmp_path / "ouro-twice", twice))
    refused(lambda: model.run(*batch("none"), further=False, keep=False), "8 times in 4 loops")
    assert model.base.total_ut_steps == 4


def test_a_forward_made_for_another_transformers_is_one_line(ouro: Path, tmp_path: Path) -> None:
    other = replaced(CODE, "x = self.embed_tokens(input_ids)\n", "x = self.embed_tokens(input_ids, old=1)\n")
    model = opened(changed(ouro, tmp_path / "ouro-other", other))
    refused(lambda: model.run(*batch("none"), further=False, keep=False), "OuroForCausalLM", "transformers 5", "old")


@pytest.mark.parametrize("lack", [MemoryError, torch.OutOfMemoryError, RuntimeError])
def test_a_lack_of_memory_stays_what_it_is(ouro: Path, lack: type[Exception]) -> None:
    model = opened(ouro)

    def fail(*_: object) -> None:
        raise lack("no more")

    model.base.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(lack, match="no more"):
        model.run(*batch("none"), further=False, keep=False)


# --- an adapter of one's own ---


def test_the_documented_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = re.findall(r"```python\n(.*?class .*?)```", DOCS.read_text(), re.DOTALL)
    assert len(example.splitlines()) < 60
    names: dict[str, Any] = {}
    exec(compile(example, str(DOCS), "exec"), names)  # the block of the page, as a reader would run it
    assert "step_size" in capsys.readouterr().out
    model = names["model"]
    assert isinstance(model, LoopedModel)
    ids, mask = batch("right", vocab=model.shape.vocab)
    rows = table(model, ids, mask)
    assert set(MEASUREMENTS) - set(rows["measurement"]) == {"gate", "effective_offset_cost"}
    assert not rows["nonfinite"].any()
    llama = names["llama"]
    run = model.run(ids, mask, further=False, keep=True)
    same(model.norm(run.raw[1]), llama.model(ids, attention_mask=mask).last_hidden_state, mask, 1e-5)
    llama.set_attn_implementation("eager")
    attentions = llama.model(ids, attention_mask=mask, output_attentions=True).attentions
    for found, expected in zip(distributions(model, run), attentions, strict=True):
        same(found[0]["mixed"].transpose(1, 2), expected.transpose(1, 2), mask, 1e-5)
