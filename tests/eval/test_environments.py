"""Environments of their own, and `plt-eval install`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from plt_benchmarks.environments import Environment
from plt_benchmarks.protocols import SandboxJob, SuiteError
from plt_eval.cli.main import main
from plt_eval.sandbox import open_sandbox


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A package that pip can install without a network."""
    folder = tmp_path / "package"
    folder.mkdir()
    (folder / "pyproject.toml").write_text(
        '[build-system]\nrequires = []\nbuild-backend = "own"\nbackend-path = ["."]\n'
    )
    (folder / "own.py").write_text(
        "import zipfile, os\n"
        "def build_wheel(folder, *_, **__):\n"
        "    name = 'tiny_thing-1.0-py3-none-any.whl'\n"
        "    info = 'tiny_thing-1.0.dist-info'\n"
        "    with zipfile.ZipFile(os.path.join(folder, name), 'w') as wheel:\n"
        "        wheel.writestr('tiny_thing.py', 'answer = 42\\n')\n"
        "        wheel.writestr(f'{info}/METADATA', 'Metadata-Version: 2.1\\nName: tiny-thing\\nVersion: 1.0\\n')\n"
        "        wheel.writestr(f'{info}/WHEEL', 'Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n')\n"
        "        wheel.writestr(f'{info}/RECORD', '')\n"
        "    return name\n"
    )
    return folder


@pytest.fixture
def tiny(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Environment:
    monkeypatch.setenv("PLT_EVAL_ENVIRONMENTS", str(tmp_path / "environments"))
    return Environment("tiny", "suite tiny", (str(package),), ("--no-index",))


def test_one_is_made_once_and_its_python_runs_jobs_in_the_sandbox(
    tiny: Environment, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not tiny.present
    assert tiny.need().mend == "plt-eval install tiny"
    with pytest.raises(SuiteError, match="suite tiny needs an environment of its own: plt-eval install tiny"):
        _ = tiny.python
    monkeypatch.setattr("plt_benchmarks.registry._ENVIRONMENTS", (tiny,))
    assert _install(capsys, "tiny") == (0, f"tiny: installed, in {tiny.folder}\n")
    assert _install(capsys, "tiny") == (0, f"tiny: there already, in {tiny.folder}\n")
    assert tiny.need().present
    code = "import tiny_thing; print(tiny_thing.answer)"
    assert subprocess.check_output([str(tiny.python), "-c", code]) == b"42\n"
    outcome = open_sandbox("bubblewrap").run(SandboxJob(code, environment=tiny.folder))
    assert (outcome.exit_code, outcome.stdout) == (0, b"42\n"), outcome.stderr
    spoil = f"open({str(tiny.folder / 'spoilt')!r}, 'w')"
    assert b"Read-only file system" in open_sandbox("bubblewrap").run(SandboxJob(spoil, environment=tiny.folder)).stderr
    assert open_sandbox("unsafe-subprocess").run(SandboxJob(code, environment=tiny.folder)).stdout == b"42\n"


def test_one_that_was_cut_short_is_made_anew(tiny: Environment) -> None:
    (tiny.folder / "bin").mkdir(parents=True)
    (tiny.folder / "bin" / "python").symlink_to(sys.executable)
    assert not tiny.present
    tiny.install(lambda _: None)
    assert tiny.present


def test_other_requirements_are_another_environment(tiny: Environment) -> None:
    assert Environment("tiny", "x", ("other",)).folder != tiny.folder


def test_what_pip_refuses_is_one_line(tiny: Environment) -> None:
    broken = Environment("tiny", "suite tiny", ("no-such-thing-anywhere",), ("--no-index",))
    with pytest.raises(SuiteError, match=r"pip install .*exit code 1: .*no-such-thing-anywhere"):
        broken.install(lambda _: None)
    assert not broken.present
    assert not tiny.present


def test_an_unknown_name(capsys: pytest.CaptureFixture[str]) -> None:
    code, _ = _install(capsys, "nothing-like-it")
    assert code == 2


def _install(capsys: pytest.CaptureFixture[str], name: str) -> tuple[int, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main(["install", name])
    return int(caught.value.code or 0), capsys.readouterr().out
