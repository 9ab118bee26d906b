"""Small tasks of lm-eval's, and tiny random checkpoints for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from plt_eval.cli.main import main
from plt_eval.engines.hf import HFEngine
from plt_model import PLTConfig, PLTForCausalLM
from plt_model.tokenizer import byte_tokenizer

FIXTURES = Path(__file__).parents[1] / "fixtures" / "lm_eval"
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
CONTEXT = 96
SHAPE = {
    "vocab_size": 259,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": CONTEXT,
}


def copy_tasks(folder: Path) -> Path:
    """The task files, their data named by its place."""
    for path in FIXTURES.iterdir():
        (folder / path.name).write_text(path.read_text().replace("FOLDER", str(folder)))
    return folder


def llama(folder: Path, template: str | None = None) -> Path:
    return _save(folder, LlamaForCausalLM(LlamaConfig(**SHAPE)), template)


def plt(folder: Path, template: str | None = None) -> Path:
    return _save(folder, PLTForCausalLM(PLTConfig(**SHAPE, plt_num_loops=2, plt_window_size=[8, 0])), template)


def _save(folder: Path, model: torch.nn.Module, template: str | None) -> Path:
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)  # type: ignore[operator]
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


def engine(folder: Path, **options: Any) -> HFEngine:
    return HFEngine(str(folder), device="cpu", compile="off", notify=lambda _: None, **options)


class Command:
    """`plt-eval run` on the tasks of a folder, in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str], tasks: Path, results: Path) -> None:
        self.capsys, self.tasks, self.results = capsys, tasks, results

    def line(self, suite: str, *arguments: str | Path) -> list[str]:
        """The arguments of the command."""
        given = ["run", "--suite", suite, "--results", str(self.results)]
        return [*given, "--include-path", str(self.tasks), *map(str, arguments)]

    def __call__(self, suite: str, *arguments: str | Path, code: int | None = None) -> list[dict[str, Any]]:
        """The runs, in JSON."""
        self.capsys.readouterr()
        with pytest.raises(SystemExit) if code else Ended():
            main([*self.line(suite, *arguments), "--json"])
        out, self.err = self.capsys.readouterr()
        assert "Traceback" not in self.err, self.err
        runs: list[dict[str, Any]] = json.loads(out) if out else []
        return runs

    def error(self, suite: str, *arguments: str | Path) -> str:
        """The one line of a command that must fail."""
        self.capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(self.line(suite, *arguments))
        out, err = self.capsys.readouterr()
        assert ended.value.code == 2, err
        assert out == ""
        line = err.splitlines()[-1]
        assert line.startswith("plt-eval: error: "), err
        return line


class Ended:
    """typer's way out of a command that went well."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> bool:
        return isinstance(error, SystemExit) and error.code in (0, None)
