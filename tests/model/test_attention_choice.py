"""Every attention that a PLT can be told to use says what the written-out one says, and builds no S x S tensor."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from plt_cases import build, row, tiny, tokens
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton_interpreter import DEVICE

from plt_model import PLTForCausalLM, attention_flex
from plt_model.attention_plt import BACKENDS, causal_attention, chosen, gated_attention, window_attention
from plt_model.decode.prefill import read_prompt

CLOSE = 5e-5
"""float32 sums in another order."""

FUSED = ("flex_attention", "triton")


def model(backend: str, **settings: Any) -> PLTForCausalLM:
    return build(tiny(**settings), backend=backend).float().to(DEVICE)


def text(count: int, *, seed: int = 0) -> Tensor:
    return row(tokens(count, seed=seed)).to(DEVICE)


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("loops", [1, 3], ids="R{}".format)
def test_logits_are_those_of_eager(backend: str, loops: int) -> None:
    ids = text(29)
    with torch.no_grad():
        expected, found = (model(name, plt_num_loops=loops)(ids, use_cache=False).logits for name in ("eager", backend))
    torch.testing.assert_close(found, expected, rtol=0, atol=CLOSE)


@pytest.mark.parametrize("backend", FUSED)
def test_padding_is_seen_by_nobody(backend: str) -> None:
    ids = torch.cat([text(21), text(21, seed=5)])
    mask = torch.ones_like(ids)
    mask[1, :8] = 0
    with torch.no_grad():
        expected, found = (
            model(name, plt_num_loops=2)(ids, attention_mask=mask, use_cache=False).logits
            for name in ("eager", backend)
        )
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], rtol=0, atol=CLOSE)


@pytest.mark.parametrize("backend", FUSED)
def test_a_prompt_in_chunks(backend: str) -> None:
    ids = text(30)
    with torch.no_grad():
        expected = model("eager", plt_num_loops=3)(ids, use_cache=False).logits[:, -1]
    _, found = read_prompt(model(backend, plt_num_loops=3), ids, chunk=7)
    torch.testing.assert_close(found, expected, rtol=0, atol=CLOSE)


@pytest.mark.parametrize("backend", FUSED)
def test_gradients_are_those_of_eager(backend: str) -> None:
    """FlexAttention has none on a CPU: there sdpa takes over."""
    ids = text(18)
    gradients = []
    for name in ("eager", backend):
        one = model(name, plt_num_loops=3)
        one(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append({key: weight.grad for key, weight in one.named_parameters()})
    for key, expected in gradients[0].items():
        assert expected is not None
        torch.testing.assert_close(gradients[1][key], expected, rtol=1e-4, atol=CLOSE, msg=key)


@pytest.mark.parametrize("backend", FUSED)
def test_autocast_gives_the_kernels_one_type(backend: str) -> None:
    """Rotated queries and keys are float32 there, values are bfloat16."""
    ids, found = text(18), []
    for name in ("sdpa", backend):
        one = model(name, plt_num_loops=2)
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = one(ids, labels=ids, use_cache=False).loss
        loss.backward()
        found.append((loss.detach(), one.model.layers[0].self_attn.v_proj.weight.grad))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=2e-2, atol=0)
    apart = (found[1][1] - found[0][1]).norm() / found[0][1].norm()
    assert apart < 0.05


def test_sdpa_serves_what_the_kernels_do_not() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, 9, 8, generator=generator, dtype=torch.float64) for heads in (4, 2, 2))
    gate = torch.rand(1, 4, 9, dtype=torch.float64)
    expected, found = (gated_attention(q, (k, v), (v, k), gate, window=3, backend=name) for name in ("eager", "triton"))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def flex_inputs(queries: int, keys: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(queries)
    sides = ((4, queries), (2, keys), (2, keys))
    return [torch.randn(1, heads, size, 16, generator=generator).to(DEVICE) for heads, size in sides]


@pytest.mark.filterwarnings("error:flex_attention called without torch.compile")
@pytest.mark.parametrize("window", [5], ids="window-{}".format)
def test_flex_at_many_lengths(window: int | None) -> None:
    """More of them than torch would compile one by one before it goes on without a kernel, and every remainder by the
    vectors of a CPU."""
    sizes = [(300, 300), (130, 300), (257, 260), *[(7, 7 * chunk) for chunk in range(1, 10)]]
    sizes += [(8, keys) for keys in range(8, 42)]
    for size in sizes:
        q, k, v = flex_inputs(*size)
        if window is None:
            expected, found = (causal_attention(q, k, v, backend=name) for name in ("eager", "flex_attention"))
        else:
            expected, found = (
                window_attention(q, k, v, window=window, backend=name) for name in ("eager", "flex_attention")
            )
        torch.testing.assert_close(found, expected, rtol=0, atol=CLOSE, msg=lambda text, size=size: f"{size}: {text}")


def test_flex_reads_the_blocks_in_reach_alone() -> None:
    q = flex_inputs(1000, 1000)[0]
    blocks = attention_flex._blocks(1000, 1000, 64, q.device, attention_flex._seen(q, 0, 64, None))
    assert blocks.kv_num_blocks.flatten().tolist() == [1, *[2] * 7]
    full = attention_flex._blocks(1000, 1000, None, q.device, attention_flex._seen(q, 0, None, None))
    assert full.kv_num_blocks.flatten().tolist() == list(range(1, 9))


class NothingSquare(TorchDispatchMode):
    """Fails where an operator gives a tensor whose last two sides both reach `side`."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for found in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(found, Tensor) and found.dim() >= 2 and min(found.shape[-2:]) >= self.side:
                raise AssertionError(f"{function} made {list(found.shape)}")
        return out


def test_the_watch_sees_a_square() -> None:
    q = torch.zeros(1, 4, 700, 8)
    with NothingSquare(600), torch.no_grad(), pytest.raises(AssertionError, match=r"made \[700, 700\]"):
        causal_attention(q, q, q, backend="eager")


@pytest.mark.parametrize("chunk", [None, 512], ids="chunk-{}".format)
def test_a_long_prompt_builds_nothing_square(chunk: int | None) -> None:
    side = 1500
    one = model("sdpa", plt_num_loops=2)
    with NothingSquare(side), torch.no_grad():
        read_prompt(one, text(side), chunk=chunk)


def test_flex_builds_nothing_square(monkeypatch: pytest.MonkeyPatch) -> None:
    """All around the compiled kernel, which the watch would keep from being compiled."""
    monkeypatch.setattr(attention_flex, "_compiled", lambda _: lambda q, *_: q)
    side = 1500
    one = model("flex_attention", plt_num_loops=2)
    with NothingSquare(side), torch.no_grad():
        read_prompt(one, text(side), chunk=None)


def test_triton_builds_nothing_square() -> None:
    side = 200
    one = model("triton", plt_num_loops=2, num_hidden_layers=1, vocab_size=100)
    with NothingSquare(side), torch.no_grad():
        read_prompt(one, text(side) % 100, chunk=None)


def test_padding_builds_nothing_square() -> None:
    side = 1500
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 4, side, 8, generator=generator), torch.randn(2, 2, side, 8, generator=generator)
    mask = torch.ones(2, side, dtype=torch.bool)
    mask[1, :100] = False
    gate = torch.rand(2, 4, side)
    with NothingSquare(side), torch.no_grad():
        found = gated_attention(q, (k, k), (k, k), gate, mask, window=64, backend="sdpa")
    assert found.shape == q.shape


# --- the choice ---------------------------------------------------------------------------------------


def test_auto_on_a_cpu() -> None:
    assert chosen("auto", "cpu", torch.bfloat16) == ("sdpa", "the fastest that this device and type allow")


@pytest.mark.parametrize("name", ["eager", "sdpa", "flex_attention"])
def test_what_is_asked_for(name: str) -> None:
    assert chosen(name, "cpu", torch.float32) == (name, "as asked for")


@pytest.mark.parametrize(
    ("name", "device", "dtype", "said"),
    [
        ("fast", "cpu", torch.float32, "'fast' is no attention of a PLT: expected auto or one of eager, sdpa, "),
        ("triton", "cuda", torch.float64, "triton cannot be had: it takes float32, float16 and bfloat16, not float64"),
    ],
)
def test_what_cannot_be_had_is_said(name: str, device: str, dtype: torch.dtype, said: str) -> None:
    with pytest.raises(ValueError, match=f"^{said}"):
        chosen(name, device, dtype)


def test_flash_attention_names_what_is_missing() -> None:
    with pytest.raises(ValueError, match=r"flash_attention_2 cannot be had: (the package flash_attn|it takes float16)"):
        chosen("flash_attention_2", "cpu", torch.float32)


def test_triton_off_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import triton

    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    with pytest.raises(ValueError, match="triton cannot be had: the Triton kernels need tensors on a CUDA device"):
        chosen("triton", "cpu", torch.float32)


def test_every_name_is_one_that_a_model_takes() -> None:
    one = model("sdpa")
    for name in BACKENDS:
        if name != "flash_attention_2":  # the package is not there
            one.set_attn_implementation(name)
            assert one.model.layers[0].self_attn.backend == name
