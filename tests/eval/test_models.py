"""What `--model` may say: folders, bundled families, their members, and mistakes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from toy_parts import NoSandbox, SumSuite

from plt_eval import models
from plt_eval.cli.main import main
from plt_eval.errors import UserError
from plt_eval.models import bundled_families, names_family, no_such_model, resolve_model, resolve_models
from plt_eval.store import list_runs

LOOPS = (1, 2, 3)


def write_family(root: Path, name: str, loops: tuple[int, ...] = LOOPS, *, weights: bool = False) -> Path:
    """A family whose members are no more than their configurations, or real ones: tiny, random, each another."""
    for count in loops:
        member = root / name / f"r{count}"
        member.mkdir(parents=True)
        (member / "config.json").write_text("{}")
        if weights:
            write_member(member, count)
    card = {"schema_version": 1, "name": name, "loops": list(loops), "recipe": "quick", "licence": "Apache-2.0"}
    (root / name / "family.json").write_text(json.dumps(card))
    return root / name


def write_member(folder: Path, loops: int) -> None:
    import torch

    from plt_model import PLTConfig, PLTForCausalLM
    from plt_model.tokenizer import byte_tokenizer

    shape = {"vocab_size": 259, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    shape |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "bos_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(loops)
    PLTForCausalLM(PLTConfig(**shape, plt_num_loops=loops)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_family(tmp_path / "bundled", "plt-tiny")
    write_family(tmp_path / "bundled", "coder", (2, 4))
    return tmp_path / "bundled"


# --- names ------------------------------------------------------------------------------------------------


def test_a_family_is_at_each_loop_count_the_member_trained_with_it(root: Path) -> None:
    found = resolve_models("plt-tiny", [3, 1], root=root)
    assert [(model.folder, model.label, model.loops, model.family) for model in found] == [
        (root / "plt-tiny" / "r3", "plt-tiny:r3", 3, "plt-tiny"),
        (root / "plt-tiny" / "r1", "plt-tiny:r1", 1, "plt-tiny"),
    ]


def test_a_family_without_loop_counts_is_all_its_members(root: Path) -> None:
    assert [model.label for model in resolve_models("coder", None, root=root)] == ["coder:r2", "coder:r4"]


def test_a_member_runs_at_its_own_loop_count_or_at_any_other(root: Path) -> None:
    (own,) = resolve_models("plt-tiny:r3", None, root=root)
    assert (own.folder.name, own.loops) == ("r3", 3)
    others = resolve_models("plt-tiny:r3", [2, 9], root=root)
    assert [(model.folder.name, model.label, model.loops) for model in others] == [
        ("r3", "plt-tiny:r3", 2),
        ("r3", "plt-tiny:r3", 9),
    ]


def test_a_folder_is_itself_and_wins_over_a_name_only_as_a_path(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plt-tiny").mkdir()
    (tmp_path / "mine:r1").mkdir()
    assert resolve_model("plt-tiny", 2, root=root).folder == root / "plt-tiny" / "r2"
    for path in ("./plt-tiny", str(tmp_path / "plt-tiny")):
        assert not names_family(path, root=root)
        found = resolve_model(path, 2, root=root)
        assert (found.folder.resolve(), found.label, found.loops, found.family) == (
            tmp_path / "plt-tiny",
            "plt-tiny",
            2,
            None,
        )
    assert resolve_models("mine:r1", None, root=root) == [resolve_model("mine:r1", root=root)]
    assert resolve_model("mine:r1", root=root).loops is None


@pytest.mark.parametrize(
    ("name", "loops", "message"),
    [
        ("plt-tiny", [4], "--model plt-tiny at 4 loops: no such member of the family; it has plt-tiny:r1, plt-tiny:r2"),
        ("plt-tiny:r4", None, "--model plt-tiny:r4: no such member of the family; it has plt-tiny:r1"),
        (
            "plt-tiny:3",
            None,
            "--model plt-tiny:3: a member of plt-tiny is one of plt-tiny:r1, plt-tiny:r2, plt-tiny:r3",
        ),
        ("plt-tiny:r0", None, "--model plt-tiny:r0: a member of plt-tiny is one of"),
        ("plt-tiny:r2/x", None, "--model plt-tiny:r2/x: a member of plt-tiny is one of"),
        ("plt-tny", [1], "did you mean plt-tiny?); bundled: coder, plt-tiny"),
        ("PLT-Tiny:r2", None, "did you mean plt-tiny:r2?); bundled:"),
        ("nothing-like-it-at-all", None, "no such model folder, nor a bundled model; bundled: coder, plt-tiny"),
        ("no/where", None, "--model no/where: no such model folder"),
    ],
)
def test_mistakes_are_one_line(root: Path, name: str, loops: list[int] | None, message: str) -> None:
    with pytest.raises(UserError) as caught:
        resolve_models(name, loops, root=root)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_family_alone_is_no_single_model(root: Path) -> None:
    with pytest.raises(UserError, match="that is a family of 3; choose one of plt-tiny:r1, plt-tiny:r2, plt-tiny:r3"):
        resolve_model("plt-tiny", root=root)


def test_nothing_bundled_says_nothing_of_bundled_models(tmp_path: Path) -> None:
    assert bundled_families(tmp_path / "nowhere") == {}
    assert no_such_model("x", root=tmp_path) == "x: no such model folder"


def test_a_path_is_no_misspelt_name(root: Path) -> None:
    assert no_such_model("models/plt-tin", root=root) == "models/plt-tin: no such model folder"


@pytest.mark.parametrize(
    ("card", "message"),
    [
        ('{"name": "plt-tiny"', "family.json: damaged:"),
        ('{"name": "plt-tiny"}', "family.json: field loops: Field required"),
        ('{"name": "plt-tiny", "loops": []}', "family.json: field loops: "),
        ('{"name": "other", "loops": [1]}', "the name is 'other', but the folder is 'plt-tiny'"),
        ('{"name": "plt-tiny", "loops": [1, 7]}', "names the member r7, but r7/config.json does not exist"),
    ],
)
def test_a_damaged_family_names_its_file(root: Path, card: str, message: str) -> None:
    (root / "plt-tiny" / "family.json").write_text(card)
    with pytest.raises(UserError) as caught:
        resolve_models("plt-tiny:r1", None, root=root)
    assert message in str(caught.value)


def test_what_is_bundled_here_is_sound() -> None:
    for name, family in bundled_families().items():
        for model in resolve_models(name, None):
            assert (model.folder / "config.json").is_file()
            assert json.loads((model.folder / "config.json").read_text())["plt_num_loops"] == model.loops
        assert family.loops == tuple(sorted(family.loops))


# --- on the command line, with real (tiny, random) checkpoints ----------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with a family of three real members, told apart by their weights."""
    return write_family(tmp_path_factory.mktemp("package") / "bundled", "plt-tiny", weights=True).parent


@pytest.fixture
def bundle(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """That bundle as the installed one, the toy suite in the registry, and an empty working directory."""
    monkeypatch.setattr(models, "BUNDLED", trained)
    monkeypatch.setattr("plt_benchmarks.registry.get_suite", lambda *_: [SumSuite(2)])
    monkeypatch.setattr("plt_eval.sandbox.open_sandbox", lambda *_, **__: NoSandbox())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return trained


def run(*arguments: str) -> tuple[int, list[tuple[str, int | None]]]:
    """The exit code, and (model, loops) of every run in the store."""
    with pytest.raises(SystemExit) as caught:
        main(["run", "--suite", "sums", "--device", "cpu", *arguments])
    runs = [run.manifest.identity for run in list_runs(Path("results/runs"))]
    return int(caught.value.code or 0), [(identity.model, identity.loops) for identity in runs]


@pytest.mark.usefixtures("bundle")
def test_each_member_is_evaluated_at_its_own_loop_count(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--model", "plt-tiny", "--loops", "1,3") == (0, [("plt-tiny:r1", 1), ("plt-tiny:r3", 3)])
    out, err = capsys.readouterr()
    assert "plt-tiny:r3" in out
    assert "trained for one loop count" not in err, "every member runs as it was trained"
    hashes = {run.manifest.identity.engine_identity["weights_sha256"] for run in list_runs(Path("results/runs"))}
    assert len(hashes) == 2


@pytest.mark.usefixtures("bundle")
def test_without_a_model_the_bundled_family_is_run_and_that_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--run-id", "all") == (0, [(f"plt-tiny:r{loops}", loops) for loops in LOOPS])
    assert "note: no --model: evaluating the bundled family plt-tiny" in capsys.readouterr().err
    assert {path.name for path in Path("results/runs").iterdir()} == {f"all-sums-r{loops}" for loops in LOOPS}


@pytest.mark.usefixtures("bundle")
def test_one_member_at_another_loop_count_warns(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--model", "plt-tiny:r3", "--loops", "2") == (0, [("plt-tiny:r3", 2)])
    assert "running 2 loops on a checkpoint made for 3" in capsys.readouterr().err


def test_a_folder_of_the_same_name_is_run_as_a_path(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(bundle / "plt-tiny" / "r2", "plt-tiny")
    assert run("--model", "./plt-tiny") == (0, [("plt-tiny", 2)])
    assert "bundled" not in capsys.readouterr().err
    assert run("--model", "plt-tiny", "--loops", "1")[1][1:] == [("plt-tiny:r1", 1)]
    assert "the folder of that name here is --model ./plt-tiny" in capsys.readouterr().err


@pytest.mark.usefixtures("bundle")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--loops", "1-5"], "--model plt-tiny at 4 loops: no such member of the family"),
        (
            ["--model", "plt-tyni"],
            "--model plt-tyni: no such model folder, nor a bundled model (did you mean plt-tiny?)",
        ),
        (["--model", "plt-tiny:2"], "--model plt-tiny:2: a member of plt-tiny is one of"),
    ],
)
def test_mistakes_on_the_command_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*arguments) == (2, []), "nothing was run, not even the counts that exist"
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("plt-eval: error: ")
    assert message in line


def test_names_are_resolved_without_torch() -> None:
    code = "import sys, plt_eval.models as m; m.bundled_families(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
