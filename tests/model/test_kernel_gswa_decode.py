"""The decode kernel against its truth in plain torch: shapes, lengths, poison, types; and compiled for sm_90."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from plt_cases import quick
from torch import Tensor
from triton_interpreter import DEVICE, HOPPER_SHARED_BYTES, compile_for_hopper

from plt_model.kernels import KernelUnavailable
from plt_model.kernels.gswa_decode import gswa_decode, naive, why_not

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
"""Largest difference allowed from the truth, which rounds once at the end: float32 sums in another order, and for the
half types a rounding of weights and result, on values below 4."""


@dataclass(frozen=True)
class Case:
    """The inputs of one call, in the order of the kernel's arguments."""

    q: Tensor
    keys: Tensor
    values: Tensor
    ring_keys: Tensor | None
    ring_values: Tensor | None
    gate: Tensor | None
    lengths: Tensor

    def args(self) -> tuple[Tensor | None, ...]:
        return (self.q, self.keys, self.values, self.ring_keys, self.ring_values, self.gate, self.lengths)


def case(
    *,
    lengths: list[int],
    loops: int = 3,
    heads: int = 4,
    groups: int = 2,
    size: int = 8,
    capacity: int | None = None,
    window: int = 5,
    rings: bool = True,
    dtype: torch.dtype = torch.float32,
    device: str = DEVICE,
    poison: float | None = float("nan"),
    seed: int = 0,
) -> Case:
    """Random inputs; every place that no slot has written holds `poison`."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    slots, capacity = len(lengths), capacity or max(*lengths, 1)
    keys, values = draw(slots, groups, capacity, size), draw(slots, groups, capacity, size)
    ring = (slots, loops - 1, groups, window + 1, size)
    with_rings = rings and loops > 1
    ring_keys, ring_values = (draw(*ring), draw(*ring)) if with_rings else (None, None)
    if poison is not None:
        for n, length in enumerate(lengths):
            for held in (keys, values, ring_keys, ring_values):
                if held is not None:
                    held[n, ..., length:, :] = poison
    gate = torch.rand(slots, loops - 1, heads, generator=generator).to(dtype) if with_rings else None
    parts = (draw(slots, loops, heads, size), keys, values, ring_keys, ring_values, gate, torch.tensor(lengths))
    return Case(*(None if part is None else part.to(device) for part in parts))


def check(inputs: Case, tolerance: float | None = None) -> Tensor:
    """The kernel says what the truth says -> y."""
    found, expected = gswa_decode(*inputs.args()), naive.gswa_decode(*inputs.args())
    assert found.shape == expected.shape == inputs.q.shape
    assert found.dtype == inputs.q.dtype
    gap = (found.double() - expected.double()).abs().nan_to_num(float("inf")).max().item()
    assert gap <= (tolerance or TOLERANCE[inputs.q.dtype])
    return found


@pytest.mark.parametrize("loops", [1, 2, 3, 4], ids="R{}".format)
@pytest.mark.parametrize("lengths", [[1], [6], [1, 7, 0, 150, 33]], ids=str)
def test_it_agrees_with_the_truth(lengths: list[int], loops: int) -> None:
    check(case(lengths=lengths, loops=loops))


@pytest.mark.parametrize(("heads", "groups"), [(1, 1), (3, 1), (4, 4), (6, 2), (20, 4)], ids=str)
def test_heads_that_share_keys(heads: int, groups: int) -> None:
    check(case(lengths=[70, 9], heads=heads, groups=groups))


@pytest.mark.parametrize("size", [8, 64, 80, 128])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_head_sizes_and_types(dtype: torch.dtype, size: int) -> None:
    check(case(lengths=[130, 20], size=size, dtype=dtype, heads=2, groups=1))


@pytest.mark.parametrize("window", [0, 1, 64])
def test_windows(window: int) -> None:
    check(case(lengths=[1, 2, 64, 65, 66, 131], window=window, loops=2, heads=2, groups=1))


@pytest.mark.parametrize("loops", [1, 3])
def test_without_a_local_branch(loops: int) -> None:
    check(case(lengths=[40, 5], loops=loops, rings=False))


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf"), 1e30], ids=str)
def test_what_nobody_wrote_does_not_leak(poison: float) -> None:
    clean = case(lengths=[1, 4, 77], capacity=300, poison=None)
    dirty = case(lengths=[1, 4, 77], capacity=300, poison=poison)
    assert torch.equal(gswa_decode(*dirty.args()), gswa_decode(*clean.args()))


def test_an_idle_slot_gives_zeros_whatever_it_holds() -> None:
    inputs = case(lengths=[0, 3])
    assert inputs.gate is not None
    inputs.q[0], inputs.gate[0] = float("nan"), float("nan")
    y = gswa_decode(*inputs.args())
    assert torch.equal(y[0], torch.zeros_like(y[0]))
    assert y[1].isfinite().all()


def test_scores_that_overflow_an_exponential() -> None:
    inputs = case(lengths=[90, 8])
    check(replace(inputs, q=inputs.q * 300), tolerance=2e-3)


def test_a_slot_is_not_moved_by_its_neighbours() -> None:
    inputs = case(lengths=[50, 50, 50])
    for n in (1, 2):
        for held in inputs.args():
            assert held is not None
            held[n] = held[0]
    y = gswa_decode(*inputs.args())
    assert torch.equal(y[0], y[1])
    assert torch.equal(y[0], y[2])


def test_views_are_read_as_they_are() -> None:
    """What a step hands over: queries cut from the packed projection, the first slots and the reach of a cache."""
    plain = case(lengths=[20, 7], capacity=40, heads=4, groups=2)
    packed = torch.full((2, 3, 9, 8), float("nan"), device=DEVICE)
    packed[:, :, :4] = plain.q
    turned = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (plain.keys, plain.values)]
    spread = plain.keys.new_full((2, 2, 40, 16), float("nan"))
    spread[..., ::2] = plain.keys
    assert plain.gate is not None
    gate = plain.gate.transpose(1, 2).contiguous().transpose(1, 2)
    for keys in (turned[0], spread[..., ::2]):
        views = replace(plain, q=packed[:, :, :4], keys=keys[:, :, :25], values=turned[1][:, :, :25], gate=gate)
        assert not any(t.is_contiguous() for t in (views.q, views.keys, views.values, gate))
        torch.testing.assert_close(check(views), check(plain), rtol=0, atol=2e-6)


def test_every_input_counts() -> None:
    """A part that was left unread, or a pass that read its neighbour's ring, would show here."""
    inputs = case(lengths=[30], loops=4)
    before = gswa_decode(*inputs.args())
    assert inputs.ring_keys is not None
    assert inputs.gate is not None
    for i in range(3):
        changed = inputs.ring_keys.clone()
        changed[:, i] += torch.randn_like(changed[:, i])
        moved = (gswa_decode(*replace(inputs, ring_keys=changed).args()) - before).abs().amax((0, 2, 3))
        assert [bool(m > 1e-3) for m in moved] == [r == i + 1 for r in range(4)]
    closed = gswa_decode(*replace(inputs, gate=torch.ones_like(inputs.gate)).args())
    plain = gswa_decode(*replace(inputs, ring_keys=None, ring_values=None, gate=None).args())
    torch.testing.assert_close(closed, plain, rtol=0, atol=1e-6)


@given(data=st.data())
@quick(8)
def test_any_shape(data: st.DataObject) -> None:
    groups, shared, loops = (data.draw(st.integers(1, most)) for most in (3, 5, 4))
    check(
        case(
            lengths=data.draw(st.lists(st.integers(0, 140), min_size=1, max_size=3)),
            capacity=data.draw(st.integers(140, 150)),
            loops=loops,
            heads=groups * shared,
            groups=groups,
            size=data.draw(st.integers(1, 40)) * 2,
            window=data.draw(st.integers(0, 70)),
            rings=data.draw(st.booleans()),
            seed=data.draw(st.integers(0, 99)),
        )
    )


def test_inputs_that_contradict_one_another() -> None:
    inputs = case(lengths=[9, 4])
    assert inputs.gate is not None
    for wrong, words in (
        (replace(inputs, gate=None), "all three or none"),
        (replace(inputs, gate=inputs.gate[:, :1]), r"do not fit queries \[2, 3, 4, 8\]"),
        (replace(inputs, values=inputs.values[:, :, :3]), r"values \[2, 2, 3, 8\]"),
        (replace(inputs, lengths=inputs.lengths[:1]), r"lengths has shape \[1\]: expected \[2\]"),
        (replace(inputs, q=inputs.q.double()), "does not take torch.float64"),
    ):
        with pytest.raises(ValueError, match=words):
            gswa_decode(*wrong.args())


def test_what_it_cannot_serve_has_a_reason() -> None:
    inputs = case(lengths=[3])
    assert why_not(inputs.q, inputs.keys) is None
    assert why_not(inputs.q.double(), inputs.keys) == "torch.float64 (it takes float32, float16 and bfloat16)"
    assert "heads of 512" in str(why_not(inputs.q.expand(1, 3, 4, 8).repeat(1, 1, 1, 64), inputs.keys))
    assert "200 rows" in str(why_not(torch.zeros(1, 4, 100, 8), inputs.keys))


def test_a_compiler_sees_its_shape_without_running_it() -> None:
    inputs = [None if x is None else x.to("meta") for x in case(lengths=[5, 9]).args()]
    y = gswa_decode(*inputs)
    assert y.device.type == "meta"
    assert y.shape == (2, 3, 4, 8)


def test_without_a_device_it_says_so() -> None:
    code = """
import torch
from plt_model.kernels.gswa_decode import gswa_decode
x = torch.zeros(1, 1, 1, 8)
gswa_decode(x, x, x, None, None, None, torch.ones(1, dtype=torch.long))
"""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=100)
    assert f"{KernelUnavailable.__name__}: the Triton kernels need tensors on a CUDA device" in done.stderr


def test_it_compiles_for_sm_90() -> None:
    """At the 7B shape, R = 1, 2 and 4: within the shared memory of a thread block, and nothing spilled."""
    kernels = compile_for_hopper("""
from plt_model.kernels.gswa_decode import triton_kernel
triton_kernel._processors = lambda device: 132
def empty(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")
for loops in (1, 2, 4):
    cache = empty(1, 8, 4096, 128)
    ring = empty(1, loops - 1, 8, 65, 128) if loops > 1 else None
    gate = empty(1, loops - 1, 40) if loops > 1 else None
    lengths = empty(1, dtype=torch.long)
    triton_kernel.launch(empty(1, loops, 40, 128), cache, cache, ring, ring, gate, lengths)
""")
    assert [kernel.name for kernel in kernels] == ["parts_kernel", "merge_kernel"] * 3
    for kernel in kernels:
        assert kernel.cubin_bytes > 0
        assert kernel.shared_bytes <= HOPPER_SHARED_BYTES
        assert kernel.stack_bytes == 0


@pytest.mark.gpu
@pytest.mark.parametrize("loops", [1, 2, 4], ids="R{}".format)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_the_7b_shape_on_a_device(dtype: torch.dtype, loops: int) -> None:
    for lengths in ([4096], [1, 64, 65, 66, 1000, 2049, 4095, 0]):
        inputs = case(
            lengths=lengths, loops=loops, heads=40, groups=8, size=128, capacity=4096, window=64, dtype=dtype,
            device="cuda",
        )  # fmt: skip
        check(inputs)


@pytest.mark.gpu
def test_a_graph_replays_it_at_other_lengths() -> None:
    """One capture serves every length up to its reach: nothing about the lengths was fixed on the host."""
    inputs = case(lengths=[500, 30], loops=2, heads=40, groups=8, size=128, window=64, device="cuda", poison=None)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        gswa_decode(*inputs.args())
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = gswa_decode(*inputs.args())
    for lengths in ([500, 30], [1, 499], [64, 65], [0, 66]):
        inputs.lengths.copy_(torch.tensor(lengths))
        graph.replay()
        expected = naive.gswa_decode(*inputs.args())
        assert (y - expected).abs().max() <= 1e-5
