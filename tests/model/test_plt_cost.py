"""What a long request costs in `sdpa` mode: no S x S tensor, and local attention in time O(S * w)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from plt_cases import build, positions, tiny, tokens
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from plt_model import PLTCache, PLTForCausalLM

LONG = 4096
WINDOW = 64


class Watch(TorchDispatchMode):
    """Notes the shape of all that any operation returns, and how many (query, key) pairs attention looks at."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()
        self.pairs = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        shapes = [tuple(x.shape) for x in tree_leaves(out) if isinstance(x, Tensor)]
        self.shapes.update(shapes)
        name = func.overloadpacket.__name__
        if "scaled_dot_product" in name or "attention" in name:
            query, key = args[0], args[1]
            self.pairs += query.shape[-2] * key.shape[-2] * query.shape[:-2].numel()
        elif name in ("bmm", "baddbmm"):
            self.pairs += shapes[0][-1] * shapes[0][-2] * shapes[0][0]
        return out

    @property
    def square(self) -> list[tuple[int, ...]]:
        """The shapes that end in at least S x S."""
        return [s for s in self.shapes if len(s) >= 2 and min(s[-2:]) >= LONG]

    @property
    def largest(self) -> int:
        """Elements of the largest tensor."""
        return max(torch.Size(s).numel() for s in self.shapes)


def model_of(backend: str = "sdpa", **settings: Any) -> PLTForCausalLM:
    small = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "plt_num_loops": 2}
    return build(tiny(**small, plt_window_size=[WINDOW, 0], **settings), dtype=torch.float32, backend=backend)


def watch(model: PLTForCausalLM, length: int, **inputs: Any) -> Watch:
    ids = torch.tensor([tokens(length)])
    with torch.no_grad(), Watch() as seen:
        model(ids, **inputs)
    return seen


def padding(length: int, pad: int) -> dict[str, Tensor]:
    mask = torch.tensor([[0] * pad + [1] * (length - pad)])
    return {"attention_mask": mask, "position_ids": positions(mask)}


@pytest.mark.parametrize("mode", [{}, {"plt_loop_mode": "sequential"}, {"plt_clp_shift": False}], ids=str)
@pytest.mark.parametrize("pad", [0, 100], ids="pad-{}".format)
def test_no_square_tensor(pad: int, mode: dict[str, Any]) -> None:
    seen = watch(model_of(**mode), LONG, **(padding(LONG, pad) if pad else {}))
    assert not seen.square
    # With padding, the global branch may hold a mask for a slice of queries.
    assert seen.largest <= (LONG * LONG // 4 if pad else LONG * 128)


def test_no_square_tensor_when_reading_in_chunks() -> None:
    model = model_of()
    ids = torch.tensor([tokens(LONG)])
    cache = PLTCache(model.config)
    with torch.no_grad(), Watch() as seen:
        for start, stop in ((0, LONG // 2), (LONG // 2, LONG)):
            model(ids[:, start:stop], past_key_values=cache, use_cache=True)
    assert not seen.square
    assert seen.largest <= LONG * LONG // 4


def test_no_square_tensor_in_training() -> None:
    model = model_of().train()
    ids = torch.tensor([tokens(LONG)])
    with Watch() as seen:
        model(ids, labels=ids).loss.backward()
    assert not seen.square
    assert seen.largest <= LONG * 256


def test_the_plain_backend_does_build_one() -> None:
    """Control: a square tensor would be seen."""
    assert watch(model_of("eager"), 512).largest >= 512 * 512


@pytest.mark.parametrize("pad", [0, 100], ids="pad-{}".format)
def test_local_attention_is_linear_in_the_length(pad: int) -> None:
    """What the local branch adds to the pairs looked at: at most those of its window and of one slice's overlap."""

    def local_pairs(length: int) -> int:
        inputs = padding(length, pad) if pad else {}
        with_local, without = model_of(), model_of(plt_gswa=False)
        return watch(with_local, length, **inputs).pairs - watch(without, length, **inputs).pairs

    short, long = local_pairs(LONG // 2), local_pairs(LONG)
    heads = 2
    assert heads * LONG * (WINDOW + 1) <= long <= heads * LONG * (WINDOW + 1024)
    assert long <= 2.1 * short


def test_a_step_looks_at_each_key_once() -> None:
    """Decoding: pass 0's keys for R rows, and the window's for the R - 1 later ones."""
    model = model_of()
    cache = PLTCache(model.config)
    with torch.no_grad():
        model(torch.tensor([tokens(300)]), past_key_values=cache, use_cache=True)
        with Watch() as seen:
            model(torch.tensor([[5]]), past_key_values=cache, use_cache=True)
    heads, loops = 2, 2
    assert seen.pairs == heads * (loops * 301 + (loops - 1) * (WINDOW + 1))
