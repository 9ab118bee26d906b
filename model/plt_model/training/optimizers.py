"""The optimizers that a recipe may name: AdamW, and Muon for the layers' matrices with AdamW for everything else.

Muon (torch.optim.Muon) makes the update of a matrix orthogonal, so that rare directions move as fast as frequent ones.
Small models learn to look things up in their context with it in a fraction of the tokens that AdamW needs; the paper's
recipe is AdamW.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Muon, Optimizer

from plt_model.training.recipe import Optimizer as Settings


def make_optimizer(model: nn.Module, settings: Settings, decayed: Iterable[str]) -> Optimizer:
    """The optimizer of the parameters that train; only those named in `decayed` are pulled towards zero."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    decayed = set(decayed)
    matrices = {name for name in trained if settings.kind == "muon" and is_matrix_of_a_layer(name, trained[name])}
    rest = [name for name in trained if name not in matrices]
    groups = [
        {"params": [trained[name] for name in rest if name in decayed], "weight_decay": settings.weight_decay},
        {"params": [trained[name] for name in rest if name not in decayed], "weight_decay": 0.0},
    ]
    adamw = AdamW(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps)
    if settings.kind == "adamw":
        return adamw
    muon = Muon(
        [trained[name] for name in trained if name in matrices],
        lr=settings.lr if settings.muon_lr is None else settings.muon_lr,
        weight_decay=settings.weight_decay,
        momentum=settings.muon_momentum,
        adjust_lr_fn="match_rms_adamw",
    )
    return Together(muon, adamw)


def is_matrix_of_a_layer(name: str, parameter: nn.Parameter) -> bool:
    """Whether Muon takes it: the weights of attention and MLP, not the gates, norms, embedding and head."""
    return parameter.ndim == 2 and ".layers." in f".{name}" and ".plt_gate." not in name


class Together(Optimizer):
    """Two optimizers over different parameters that step, save and load as one."""

    def __init__(self, first: Optimizer, second: Optimizer) -> None:
        self._parts = (first, second)
        super().__init__([*first.param_groups, *second.param_groups], {})
        # The base class copies the groups; the parts have to see what schedulers write into them.
        self._share()

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step of each; a closure is evaluated once, before both."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self._parts:
            part.step()
        return loss

    def load_state_dict(self, state_dict: Any) -> None:
        """As every optimizer's."""
        super().load_state_dict(state_dict)
        self._share()

    def _share(self) -> None:
        """The parts work on this optimizer's groups and state."""
        first = len(self._parts[0].param_groups)
        self._parts[0].param_groups = self.param_groups[:first]
        self._parts[1].param_groups = self.param_groups[first:]
        for part in self._parts:
            part.state = self.state
