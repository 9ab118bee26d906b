"""The fused G-SWA kernels against their truth in plain torch, forward and every gradient; the truth against the model's
attention and against finite differences; and that the kernels compile for sm_90 as they would be launched there.

Inputs are views into buffers that hold NaN everywhere else, and outputs start as NaN, so a read or a missing write
outside the lines shows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from plt_cases import quick
from torch import Tensor
from triton_interpreter import DEVICE, HOPPER_SHARED_BYTES, compile_for_hopper

from plt_model import kernels
from plt_model.attention_plt import causal_attention, window_attention
from plt_model.kernels.gswa_prefill import causal, gswa, naive, triton_kernel

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
"""Largest difference of y allowed from the truth, which computes in float32 and rounds once at the end, as a part of
the truth's largest number: a few roundings of each type. Gradients may differ twice as much: they start from a y that
has been rounded to the type."""

LAUNCHED_TILES = triton_kernel.tiles

NAMES = ("q", "shared_k", "shared_v", "own_k", "own_v", "gate")


@dataclass(frozen=True)
class Sizes:
    """Of one call. `padding`: how many positions of the first row are padding on the left (the others have fewer)."""

    queries: int
    keys: int
    own_keys: int
    window: int
    batch: int = 1
    heads: int = 2
    groups: int = 1
    size: int = 16
    padding: int | None = None

    def __str__(self) -> str:
        padded = "" if self.padding is None else f"-pad{self.padding}"
        positions = f"S{self.queries}-T{self.keys}-U{self.own_keys}-w{self.window}"
        return f"{positions}-B{self.batch}-H{self.heads}-G{self.groups}-K{self.size}{padded}"

    def tensors(self, dtype: torch.dtype, device: str = DEVICE, seed: int = 0) -> list[Tensor]:
        """q, shared k and v, own k and v, gate: all wanting gradients."""
        generator = torch.Generator().manual_seed(seed)
        rows = [(self.heads, self.queries), *[(self.groups, self.keys)] * 2, *[(self.groups, self.own_keys)] * 2]
        drawn = [torch.randn(self.batch, *shape, self.size, generator=generator) for shape in rows]
        gate = torch.rand(self.batch, self.heads, self.queries, generator=generator)
        views = [_view_in_nan(x.to(device, dtype)) for x in drawn]
        return [*views, gate.transpose(1, 2).contiguous().transpose(1, 2).to(device, dtype).requires_grad_()]

    def mask(self, device: str = DEVICE) -> Tensor | None:
        if self.padding is None:
            return None
        first = torch.tensor([max(0, self.padding - 2 * row) for row in range(self.batch)])
        return (torch.arange(self.keys)[None] >= first[:, None]).to(device)


def _view_in_nan(x_BHSK: Tensor) -> Tensor:
    """The same numbers as a transposed view of a larger buffer that is NaN around them. Sizes that are multiples of 16
    keep their alignment, which the kernels then make use of."""
    batch, heads, rows, size = x_BHSK.shape
    edge = 8 if size % 16 == 0 else 3
    buffer = torch.full((batch, rows + 3, heads, size + 2 * edge), float("nan")).to(x_BHSK)
    view = buffer[:, 1 : rows + 1, :, edge : size + edge].transpose(1, 2)
    return view.copy_(x_BHSK).requires_grad_()


@pytest.fixture(scope="module", autouse=True)
def _small_tiles_and_nan_outputs() -> Iterator[None]:
    """Many tiles in few positions, and more queries than keys in one, so that mixing the two up shows."""
    patch = pytest.MonkeyPatch()
    patch.setattr(triton_kernel, "tiles", lambda *_: triton_kernel.Tiles(rows=32, columns=16, warps=4, stages=1))
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills new memory with NaN
    yield
    torch.use_deterministic_algorithms(False)
    patch.undo()


def difference(found: Tensor, truth: Tensor) -> float:
    """The largest, as a part of the truth's largest number (or of 1: a gradient may vanish)."""
    assert found.shape == truth.shape
    assert found.dtype == truth.dtype
    assert found.isfinite().all()
    found, truth = found.detach().float(), truth.detach().float()
    return float((found - truth).abs().max() / truth.abs().max().clamp_min(1))


def assert_agree(
    call: Callable[..., Tensor], truth: Callable[..., Tensor], inputs: list[Tensor], **options: object
) -> None:
    """Forward and every gradient."""
    found, expected = call(*inputs, **options), truth(*inputs, **options)
    tolerance = TOLERANCE[inputs[0].dtype]
    assert difference(found, expected) < tolerance, "y"
    dy = torch.randn(found.shape, generator=torch.Generator().manual_seed(1)).to(found)
    gradients = (torch.autograd.grad(y, inputs, dy) for y in (found, expected))
    for name, gradient, expected_gradient in zip(NAMES, *gradients, strict=False):
        assert difference(gradient, expected_gradient) < 2 * tolerance, f"gradient of {name}"


SIZES = [
    Sizes(70, 70, 70, 20),
    Sizes(1, 1, 1, 64),
    Sizes(1, 40, 20, 19, size=8),
    Sizes(5, 5, 5, 64, size=8),
    Sizes(37, 80, 50, 13, batch=2, heads=4, groups=2, size=24),
    Sizes(33, 33, 33, 0, heads=3),
    Sizes(32, 64, 64, 16, groups=2, size=80),
    Sizes(20, 90, 23, 3, size=40),
    Sizes(70, 70, 70, 20, padding=45),
    Sizes(37, 80, 50, 13, batch=2, padding=60),
    Sizes(37, 80, 37, 40, padding=9),
]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_it_agrees_with_the_truth_in_float32(sizes: Sizes) -> None:
    assert_agree(gswa, naive.gswa, sizes.tensors(torch.float32), window=sizes.window, key_mask_BT=sizes.mask())


@pytest.mark.parametrize("sizes", [SIZES[5], SIZES[7], SIZES[10]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_it_agrees_with_the_truth_in_half_types(sizes: Sizes, dtype: torch.dtype) -> None:
    assert_agree(gswa, naive.gswa, sizes.tensors(dtype), window=sizes.window, key_mask_BT=sizes.mask())


@pytest.mark.parametrize("sizes", [SIZES[1], SIZES[4], SIZES[9]], ids=str)
def test_the_global_branch_alone_agrees_with_the_truth(sizes: Sizes) -> None:
    assert_agree(causal, naive.causal, sizes.tensors(torch.float32)[:3], key_mask_BT=sizes.mask())


@st.composite
def any_sizes(draw: st.DrawFn) -> Sizes:
    queries, window = draw(st.integers(1, 50)), draw(st.integers(0, 40))
    own_keys = queries + draw(st.integers(0, 40))
    keys = own_keys + draw(st.integers(0, 40))
    groups, shared_by = draw(st.sampled_from([(1, 1), (1, 3), (2, 2)]))
    return Sizes(
        queries, keys, own_keys, window, batch=draw(st.integers(1, 2)), heads=groups * shared_by, groups=groups,
        size=draw(st.sampled_from([2, 8, 16, 20])), padding=draw(st.none() | st.integers(0, keys)),
    )  # fmt: skip


@quick(8)
@given(sizes=any_sizes(), seed=st.integers(0, 99))
def test_it_agrees_at_any_sizes(sizes: Sizes, seed: int) -> None:
    inputs = sizes.tensors(torch.float32, seed=seed)
    assert_agree(gswa, naive.gswa, inputs, window=sizes.window, key_mask_BT=sizes.mask())


def test_it_agrees_with_the_tiles_it_is_launched_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_kernel, "tiles", LAUNCHED_TILES)
    sizes = Sizes(150, 170, 160, 64, size=24)
    assert_agree(gswa, naive.gswa, sizes.tensors(torch.float16), window=sizes.window)


def test_padding_in_the_middle_and_on_the_right_is_seen_by_none_but_itself() -> None:
    sizes = Sizes(40, 60, 50, 12, batch=2)
    mask = torch.rand(sizes.batch, sizes.keys, generator=torch.Generator().manual_seed(3)) < 0.6
    mask[0, -9:] = False
    assert_agree(gswa, naive.gswa, sizes.tensors(torch.float32), window=sizes.window, key_mask_BT=mask.to(DEVICE))


def test_scores_far_apart_neither_overflow_nor_vanish() -> None:
    sizes = Sizes(40, 40, 40, 7)
    inputs = sizes.tensors(torch.float32)
    with torch.no_grad():
        inputs[0].mul_(200)
    y, truth = (call(*inputs, window=7) for call in (gswa, naive.gswa))
    assert difference(y, truth) < 1e-4


@pytest.mark.parametrize("padding", [None, 25])
def test_it_agrees_with_the_attention_of_the_model(padding: int | None) -> None:
    sizes = Sizes(30, 50, 40, 9, batch=2, heads=4, groups=2, size=24, padding=padding)
    inputs, mask = [x.detach() for x in sizes.tensors(torch.float32)], sizes.mask()
    q, k, v, own_k, own_v, gate = inputs
    own_mask = None if mask is None else mask[:, -40:]
    global_ = causal_attention(q, k, v, mask, backend="eager")
    local = window_attention(q, own_k, own_v, own_mask, window=9, backend="eager")
    g = gate[..., None]
    mixed = g * global_ + (1 - g) * local
    assert difference(naive.gswa(*inputs, window=9, key_mask_BT=mask), mixed) < 2e-6
    assert difference(gswa(*inputs, window=9, key_mask_BT=mask), mixed) < 2e-6
    assert difference(causal(q, k, v, key_mask_BT=mask), global_) < 2e-6


@pytest.mark.parametrize("padding", [None, 4])
def test_the_gradients_of_the_truth_are_those_of_finite_differences(padding: int | None) -> None:
    sizes = Sizes(5, 9, 7, 2, size=3, padding=padding)
    inputs = [x.detach().contiguous().requires_grad_() for x in sizes.tensors(torch.float64, "cpu")]
    assert torch.autograd.gradcheck(lambda *x: naive.gswa(*x, window=2, key_mask_BT=sizes.mask("cpu")), inputs)


@pytest.mark.parametrize("wanted", [["q"], ["shared_v"], ["own_k", "gate"]], ids="+".join)
def test_it_gives_the_gradients_of_whatever_is_asked_for(wanted: list[str]) -> None:
    inputs = [
        x.detach().requires_grad_(name in wanted)
        for name, x in zip(NAMES, SIZES[7].tensors(torch.float32), strict=True)
    ]
    asked = [x for x in inputs if x.requires_grad]
    found, truth = (torch.autograd.grad(call(*inputs, window=3).square().sum(), asked) for call in (gswa, naive.gswa))
    for gradient, expected in zip(found, truth, strict=True):
        assert difference(gradient, expected) < TOLERANCE[torch.float32] * 3


def test_gradients_may_be_off_and_inputs_may_lie_anyhow_and_the_result_is_the_same_to_the_bit() -> None:
    inputs = Sizes(37, 60, 50, 13, groups=2).tensors(torch.float32)
    y = gswa(*inputs, window=13)
    assert y.transpose(1, 2).is_contiguous(), "as the next projection reads it"
    with torch.inference_mode():
        plain = gswa(*inputs, window=13)
        scattered = [x.transpose(1, -1).contiguous().transpose(1, -1) for x in inputs]
        assert torch.equal(gswa(*scattered, window=13), y)
    assert not plain.requires_grad
    assert torch.equal(plain, y)
    twice = [torch.autograd.grad(gswa(*inputs, window=13).square().sum(), inputs) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*twice, strict=True))


def test_one_key_for_all_sequences_may_be_an_expanded_view() -> None:
    sizes = Sizes(20, 20, 20, 4, batch=3)
    inputs = sizes.tensors(torch.float32)
    inputs[1] = inputs[1][:1].detach().expand(3, -1, -1, -1).requires_grad_()
    assert_agree(gswa, naive.gswa, inputs, window=4)


def test_the_gate_may_be_wider_than_the_heads() -> None:
    inputs = SIZES[7].tensors(torch.float16)
    inputs[-1] = inputs[-1].detach().float().requires_grad_()
    assert_agree(gswa, naive.gswa, inputs, window=3)


@pytest.mark.skipif(DEVICE != "cpu", reason="counts products in Triton's interpreter")
def test_the_local_branch_costs_what_the_window_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of tiles grow with S for the local branch, forward and backward, and with S^2 for the global one."""
    from triton.runtime.interpreter import InterpreterBuilder

    products = 0
    multiply = InterpreterBuilder.create_dot

    def count(*args: object) -> object:
        nonlocal products
        products += 1
        return multiply(*args)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", count)

    def cost(queries: int) -> tuple[int, int]:
        nonlocal products
        inputs = Sizes(queries, queries, queries, 16, heads=1).tensors(torch.float32)
        spent = []
        for call in (lambda: causal(*inputs[:3]), lambda: gswa(*inputs, window=16)):
            products = 0
            call().sum().backward()
            spent.append(products)
        return spent[0], spent[1] - spent[0]

    costs = [cost(queries) for queries in (64, 128, 192)]
    steps = [(after[0] - before[0], after[1] - before[1]) for before, after in pairwise(costs)]
    assert steps[0][1] == steps[1][1], "each 64 queries more cost the local branch the same"
    assert steps[1][0] > 1.5 * steps[0][0], "but the global branch more and more"


BAD: dict[str, Callable[[list[Tensor]], list[Tensor]]] = {
    "q is torch.float64": lambda x: [t.double() for t in x],
    "own_v is torch.float16: expected torch.float32": lambda x: [*x[:4], x[4].half(), x[5]],
    "q has 4 heads: expected a multiple of k's 3": lambda x: [
        x[0],
        *(t[:, :1].repeat(1, 3, 1, 1) for t in x[1:5]),
        x[5],
    ],
    "q has 37 queries: expected 1 to 36": lambda x: [x[0], *(t[:, :, :36] for t in x[1:5]), x[5]],
    "own_k has 36 positions": lambda x: [*x[:3], x[3][:, :, :36], x[4][:, :, :36], x[5]],
    r"gate has shape \[2, 4, 36\]: expected \[2, 4, 37\]": lambda x: [*x[:5], x[5][:, :, :36]],
    "heads have size 257": lambda x: [*(t[..., :1].repeat(1, 1, 1, 257) for t in x[:5]), x[5]],
}


@pytest.mark.parametrize("message", BAD)
def test_what_does_not_fit_is_refused(message: str) -> None:
    inputs = BAD[message](SIZES[4].tensors(torch.float32))
    with pytest.raises(ValueError, match=message):
        gswa(*inputs, window=13)


def test_a_short_mask_and_a_negative_window_are_refused() -> None:
    inputs = SIZES[0].tensors(torch.float32)
    with pytest.raises(ValueError, match=r"key_mask has shape \[1, 69\]: expected \[1, 70\]"):
        gswa(*inputs, window=13, key_mask_BT=torch.ones(1, 69, dtype=torch.bool, device=DEVICE))
    with pytest.raises(ValueError, match="window is -1"):
        gswa(*inputs, window=-1)


def test_a_machine_without_triton_or_without_a_gpu_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = [x.cpu() for x in SIZES[1].tensors(torch.float32)]
    monkeypatch.setattr(kernels, "find_spec", lambda _: None)
    with pytest.raises(kernels.KernelUnavailable, match="triton, which is not installed"):
        gswa(*inputs, window=1)
    monkeypatch.undo()
    monkeypatch.setattr("triton.knobs.runtime.interpret", False)
    with pytest.raises(kernels.KernelUnavailable, match="CUDA device: these are on 'cpu'"):
        causal(*inputs[:3])


HOPPER = """
import sys
from plt_model.kernels.gswa_prefill import causal, gswa
assert "plt_model.kernels.gswa_prefill.triton_kernel" not in sys.modules, "imported before it is called"

def at(dtype, size, call):
    def rows(heads):
        return torch.empty(1, 4096, heads, size, device="meta", dtype=dtype).transpose(1, 2).requires_grad_()

    gate = torch.empty(1, 40, 4096, device="meta", dtype=dtype, requires_grad=True)
    return call(rows(40), *(rows(8) for _ in range(4)), gate)

def mixed(*inputs):
    return gswa(*inputs, window=64)

def padded(*inputs):
    return gswa(*inputs, window=64, key_mask_BT=torch.empty(1, 4096, device="meta", dtype=torch.bool))

def alone(q, k, v, *_):
    return causal(q, k, v)

"""
SPILLED = 64
"""Bytes of a thread's registers that may go to memory: triton 3.6 spills 40 in the keys' gradient, 3.7 none."""

FORWARD, BACKWARD = "forward_kernel", ["dots_kernel", "query_gradient_kernel", "key_gradient_kernel"]


def test_every_kernel_compiles_for_hopper_and_fits_it() -> None:
    """Heads as in the released 7B model, with and without gradients."""
    compiled = compile_for_hopper(
        HOPPER + "at(torch.bfloat16, 128, mixed).sum().backward()\nwith torch.no_grad(): at(torch.bfloat16, 128, mixed)"
    )
    assert [kernel.name for kernel in compiled] == [FORWARD, *BACKWARD, "key_gradient_kernel", FORWARD]
    for kernel in compiled:
        assert kernel.cubin_bytes > 1000
        assert kernel.shared_bytes <= HOPPER_SHARED_BYTES, kernel
        assert kernel.stack_bytes <= SPILLED, f"registers overflow to memory: {kernel}"


@pytest.mark.slow
@pytest.mark.parametrize("call", ["mixed", "padded", "alone"])
@pytest.mark.parametrize(
    ("dtype", "size"), [("bfloat16", 256), ("float16", 128), ("float16", 80), ("float32", 128), ("float32", 256)]
)
def test_every_kernel_compiles_for_hopper_at_other_sizes_and_types(dtype: str, size: int, call: str) -> None:
    compiled = compile_for_hopper(HOPPER + f"at(torch.{dtype}, {size}, {call}).sum().backward()")
    assert {kernel.name for kernel in compiled} == {FORWARD, *BACKWARD}
    assert max(kernel.shared_bytes for kernel in compiled) <= HOPPER_SHARED_BYTES


needs_gpu = pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device")
RELEASED = Sizes(1000, 1500, 1064, 64, heads=40, groups=8, size=128)
"""The heads of the released 7B model, reading the second part of a prompt."""


@pytest.fixture
def _launched_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_kernel, "tiles", LAUNCHED_TILES)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.usefixtures("_launched_tiles")
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize(
    "sizes",
    [
        RELEASED,
        replace(RELEASED, batch=2, padding=700),
        replace(RELEASED, queries=1000, keys=1000, own_keys=1000, window=300),
        replace(RELEASED, heads=16, groups=4, size=64),
        replace(RELEASED, heads=16, groups=4, size=80),
        replace(RELEASED, heads=4, groups=2, size=256),
    ],
    ids=str,
)
def test_on_a_gpu_it_agrees_with_the_truth(sizes: Sizes, dtype: torch.dtype) -> None:
    assert_agree(gswa, naive.gswa, sizes.tensors(dtype), window=sizes.window, key_mask_BT=sizes.mask())


@pytest.mark.gpu
@needs_gpu
@pytest.mark.usefixtures("_launched_tiles")
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_on_a_gpu_the_global_branch_alone_agrees_with_the_truth(dtype: torch.dtype) -> None:
    assert_agree(causal, naive.causal, RELEASED.tensors(dtype)[:3])


@pytest.mark.gpu
@needs_gpu
@pytest.mark.usefixtures("_launched_tiles")
def test_on_a_gpu_a_long_prompt_takes_memory_in_proportion_to_its_length() -> None:
    """16,384 positions of 40 heads, with gradients: one score per pair would be 20 GiB in bfloat16."""
    inputs = replace(RELEASED, queries=16384, keys=16384, own_keys=16384).tensors(torch.bfloat16)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    gswa(*inputs, window=64).sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 2**30
