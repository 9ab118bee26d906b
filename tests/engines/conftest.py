"""Checkpoints, and engines on them that are closed again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hf_parts import SHAPE, TEMPLATE, save

from plt_eval.engines.hf import HFEngine
from plt_model import PLTConfig, PLTForCausalLM


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = PLTConfig(**SHAPE, plt_num_loops=2, plt_window_size=[6, 0], plt_hidden_scale=0.3)
    return save(tmp_path_factory.mktemp("plt"), PLTForCausalLM(config))


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("chat"), PLTForCausalLM(PLTConfig(**SHAPE)), TEMPLATE)


@pytest.fixture
def open_engine() -> Iterator[Callable[..., HFEngine]]:
    opened: list[HFEngine] = []

    def build(model: Path, **options: object) -> HFEngine:
        opened.append(HFEngine(str(model), **({"device": "cpu", "notify": lambda _: None} | options)))
        return opened[-1]

    yield build
    for engine in opened:
        engine.close()
