"""The decode kernel for CPUs against its truth in plain torch; how it is built, and what happens where it cannot be."""

from __future__ import annotations

import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from plt_cases import needs_compiler, quick
from test_kernel_gswa_decode import TOLERANCE, Case, case
from torch import Tensor

from plt_model.kernels import KernelUnavailable
from plt_model.kernels.gswa_decode import cpu, naive


@pytest.fixture(scope="module")
def kernel() -> Callable[..., Tensor]:
    """Built by the machine's compiler."""
    return cpu.load()


@pytest.fixture(params=[1, 2, 5], ids="threads-{}".format)
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def check(kernel: Callable[..., Tensor], inputs: Case) -> None:
    found, expected = kernel(*inputs.args()), naive.gswa_decode(*inputs.args())
    assert found.shape == inputs.q.shape
    assert found.dtype == inputs.q.dtype
    gap = (found.double() - expected.double()).abs().nan_to_num(float("inf")).max().item()
    assert gap <= TOLERANCE[inputs.q.dtype]


@pytest.mark.parametrize("loops", [1, 2, 3, 4], ids="R{}".format)
@pytest.mark.parametrize("lengths", [[1], [600], [1, 7, 0, 150, 65]], ids=str)
@pytest.mark.usefixtures("threads")
@needs_compiler
def test_it_agrees_with_the_truth(kernel: Callable[..., Tensor], lengths: list[int], loops: int) -> None:
    check(kernel, case(lengths=lengths, loops=loops, capacity=700, device="cpu"))


@given(data=st.data())
@quick(60)
@needs_compiler
def test_any_shape(kernel: Callable[..., Tensor], data: st.DataObject) -> None:
    groups = data.draw(st.integers(1, 4), "groups")
    inputs = case(
        lengths=data.draw(st.lists(st.integers(0, 300), min_size=1, max_size=4), "lengths"),
        loops=data.draw(st.integers(1, 5), "loops"),
        heads=groups * data.draw(st.integers(1, 7), "heads a group"),
        groups=groups,
        size=data.draw(st.sampled_from([1, 6, 7, 16, 24, 64, 80, 128]), "size"),
        capacity=data.draw(st.integers(300, 900), "capacity"),
        window=data.draw(st.sampled_from([0, 1, 5, 64, 70]), "window"),
        rings=data.draw(st.booleans(), "rings"),
        dtype=data.draw(st.sampled_from(list(TOLERANCE)), "dtype"),
        device="cpu",
    )
    check(kernel, inputs)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e30], ids=str)
@needs_compiler
def test_what_nobody_wrote_does_not_leak(kernel: Callable[..., Tensor], poison: float, dtype: torch.dtype) -> None:
    clean, dirty = (
        case(lengths=[1, 4, 77], capacity=300, size=64, dtype=dtype, poison=value, device="cpu")
        for value in (None, poison if dtype != torch.float16 or poison != 1e30 else 6e4)
    )
    assert torch.equal(kernel(*dirty.args()), kernel(*clean.args()))


@needs_compiler
def test_scores_that_float32_cannot_hold_the_exponential_of(kernel: Callable[..., Tensor]) -> None:
    """Softmax subtracts the largest first; far smaller ones weigh nothing."""
    inputs = case(lengths=[90], size=16, device="cpu")
    inputs.q.mul_(300)
    check(kernel, inputs)


@needs_compiler
def test_views_and_strides(kernel: Callable[..., Tensor]) -> None:
    inputs = case(lengths=[33, 60], capacity=64, heads=4, groups=2, device="cpu")
    q, keys, values, *rest = inputs.args()
    assert q is not None
    assert keys is not None
    assert values is not None
    wide = torch.randn(q.shape[0], q.shape[1], q.shape[2] + 3, q.shape[3])
    wide[:, :, : q.shape[2]] = q
    turned = keys.transpose(2, 3).contiguous().transpose(2, 3)
    longer = torch.cat([values, values], dim=2)[:, :, : values.shape[2]]
    assert torch.equal(kernel(wide[:, :, : q.shape[2]], turned, longer, *rest), kernel(*inputs.args()))


@needs_compiler
def test_a_type_that_it_does_not_take(kernel: Callable[..., Tensor]) -> None:
    with pytest.raises(RuntimeError, match="takes float32, float16 and bfloat16, not Double"):
        kernel(*case(lengths=[3], dtype=torch.float64, device="cpu").args())


# --- building -----------------------------------------------------------------------------------------


def _fake_compiler(folder: Path, script: str) -> Path:
    path = folder / "g++"
    path.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_no_compiler_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(KernelUnavailable, match="needs a C\\+\\+ compiler: found neither"):
        cpu._built()


def test_a_build_that_fails_names_its_error_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = _fake_compiler(
        tmp_path, 'case "$1" in --version) echo fake 1;; *) echo "x.cpp:3: error: no" >&2; exit 1;; esac'
    )
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("PLT_KERNEL_CACHE", str(tmp_path / "kernels"))
    with pytest.raises(KernelUnavailable, match=r"cannot be built with .*g\+\+: x\.cpp:3: error: no"):
        cpu._built()
    assert list((tmp_path / "kernels").iterdir()) == []


def test_what_is_not_a_library_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = tmp_path / "broken.so"
    made.write_bytes(b"no library")
    monkeypatch.setattr(cpu, "_built", lambda: made)
    with pytest.raises(KernelUnavailable, match="cannot be loaded from"):
        cpu.load.__wrapped__()


@needs_compiler
def test_another_source_or_processor_is_another_library(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = cpu._compiler()
    name = cpu._name(compiler)
    assert cpu._name(compiler) == name
    monkeypatch.setattr(cpu, "_processor", lambda: "another")
    assert cpu._name(compiler) != name


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    monkeypatch.setenv("PLT_KERNEL_CACHE", str(tmp_path / "file" / "below"))
    with pytest.raises(KernelUnavailable, match="cannot be built in"):
        cpu._built()


def test_importing_the_step_builds_nothing(tmp_path: Path) -> None:
    code = "import plt_model.decode.session, sys; assert 'torch.utils.cpp_extension' not in sys.modules"
    subprocess.run(
        [sys.executable, "-c", code], check=True, env={"PLT_KERNEL_CACHE": str(tmp_path), "PATH": ""}, timeout=120
    )
    assert list(tmp_path.iterdir()) == []
