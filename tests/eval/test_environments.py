"""Environments of their own, and `plt-eval install`."""

from __future__ import annotations

import os
import shutil
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
    told: list[str] = []
    tiny.install(told.append)
    assert tiny.present
    assert [line.split()[0] for line in told] == ["a", "pip", "packages"]
    assert told[-1] == "packages to install: 1"


@pytest.mark.parametrize("kind", ["a link to it", "of a Python elsewhere", "through links"])
def test_jobs_find_environments_wherever_they_and_their_pythons_are(kind: str, tmp_path: Path) -> None:
    """Without pip: the folder of an environment is all that a job needs."""
    base = Path(sys.base_prefix)
    if kind == "of a Python elsewhere":
        elsewhere = tmp_path / "opt" / "python"
        (elsewhere / "bin").mkdir(parents=True)
        real = Path(os.path.realpath(base / "bin" / "python3"))
        shutil.copy2(real, elsewhere / "bin" / "python3")
        (elsewhere / "lib").symlink_to(base / "lib")
        own = elsewhere / "bin" / "python3"
    else:
        own = base / "bin" / "python3"
    folder = tmp_path / "venv"
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "python").symlink_to("python3")
    (folder / "bin" / "python3").symlink_to(own)
    (folder / "pyvenv.cfg").write_text(f"home = {own.parent}\ninclude-system-site-packages = false\n")
    site = folder / "lib" / "python{}.{}".format(*sys.version_info) / "site-packages"
    site.mkdir(parents=True)
    (site / "tiny_thing.py").write_text("answer = 42\n")
    if kind == "a link to it":
        (tmp_path / "link").symlink_to(folder)
        folder = tmp_path / "link"
    elif kind == "through links":
        (tmp_path / "over").symlink_to(tmp_path)
        folder = tmp_path / "over" / "venv"
    job = SandboxJob("import tiny_thing; print(tiny_thing.answer)", environment=folder)
    outcome = open_sandbox("bubblewrap").run(job)
    assert (outcome.exit_code, outcome.stdout) == (0, b"42\n"), outcome.stderr


def test_other_requirements_are_another_environment(tiny: Environment) -> None:
    assert Environment("tiny", "x", ("other",)).folder != tiny.folder


def test_what_it_can_do_without_is_told(tiny: Environment, package: Path) -> None:
    extras = (("a thing", ("-c", "raise SystemExit('no thing here')")), ("nothing", ("-c", "import tiny_thing")))
    added = Environment("tiny", "suite tiny", ("pip",), tiny.options, bare=(str(package),), extras=extras)
    said: list[str] = []
    added.install(said.append)
    assert added.present
    assert added.folder != tiny.folder
    (missing,) = [line for line in said if line.startswith("without")]
    assert missing.startswith("without a thing (")
    assert missing.endswith("no thing here)")


def test_what_pip_refuses_is_one_line(tiny: Environment) -> None:
    broken = Environment("tiny", "suite tiny", ("no-such-thing-anywhere",), ("--no-index",))
    with pytest.raises(SuiteError, match=r"pip install .*exit code 1: .*no-such-thing-anywhere"):
        broken.install(lambda _: None)
    assert not broken.present
    assert not tiny.present


def test_what_looks_whole_is_whole(tiny: Environment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_TARGET", str(tmp_path / "elsewhere"))  # as PYTHONPATH, it has no effect
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "elsewhere"))
    tiny.install(lambda _: None)
    assert list(tiny.folder.glob("lib/python3*/site-packages/tiny_thing.py"))
    assert not (tmp_path / "elsewhere").exists()
    python = tiny.python
    there = os.readlink(python)
    python.unlink()
    python.symlink_to("/no/such/python")
    assert not tiny.present, "its Python is gone"
    python.unlink()
    python.symlink_to(there)
    assert tiny.present

    def cut_short(folder: Path) -> None:
        raise KeyboardInterrupt(folder)

    monkeypatch.setattr("plt_benchmarks.environments.shutil.rmtree", cut_short)
    with pytest.raises(KeyboardInterrupt):
        tiny.install(lambda _: None)
    assert python.exists()
    assert not tiny.present, "its removal was cut short"


def test_two_that_install_at_once_do_not_meet(tiny: Environment) -> None:
    code = (
        "import sys; from plt_benchmarks.environments import Environment\n"
        f"tiny = Environment('tiny', 'suite tiny', {tiny.requirements!r}, {tiny.options!r})\n"
        "tiny.install(print, again=False); print('present' if tiny.present else 'absent')"
    )
    both = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    told = [process.communicate(timeout=300)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert all(text.endswith("present\n") for text in told)
    assert sum("a virtual environment" in text for text in told) == 1
    assert subprocess.check_output([str(tiny.python), "-c", "import tiny_thing; print(tiny_thing.answer)"]) == b"42\n"


def test_a_place_that_cannot_be_written(tiny: Environment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PLT_EVAL_ENVIRONMENTS", str(tmp_path / "file"))
    with pytest.raises(SuiteError, match=r"environment tiny in .*file"):
        tiny.install(lambda _: None)


class TestOldestPython:
    """Environments for programs that take any Python from a version on."""

    def test_one_that_runs_is_found(self, package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        programs = tmp_path / "programs"
        programs.mkdir()
        (programs / "python9.1").write_text("#!/bin/sh\necho 'pyenv: python9.1: command not found' >&2\nexit 127\n")
        (programs / "python9.3").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
        for path in programs.iterdir():
            path.chmod(0o755)
        monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
        monkeypatch.setenv("PYENV_ROOT", str(tmp_path / "pyenv"))
        monkeypatch.setenv("PLT_EVAL_ENVIRONMENTS", str(tmp_path / "environments"))
        newer = Environment("newer", "suite newer", (str(package),), ("--no-index",), oldest_python=(9, 1))
        newer.install(lambda _: None)
        assert newer.present
        assert newer.folder != Environment("newer", "suite newer", (str(package),), ("--no-index",)).folder
        (programs / "python9.3").unlink()
        with pytest.raises(
            SuiteError, match=r"environment newer is for Python 9\.1 or newer, found 3\.\d+: install it"
        ):
            newer.install(lambda _: None)
        assert newer.present, "it is left as it was"

    def test_the_running_one_is_good_enough(self) -> None:
        assert Environment("x", "x", (), oldest_python=(3, 11))._base_python() == sys.executable

    def test_one_version_is_that_version(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PATH", "/usr/bin:/bin")
        versions = tmp_path / "versions" / "9.1.4" / "bin"
        versions.mkdir(parents=True)
        (versions / "python9.1").symlink_to(sys.executable)
        monkeypatch.setenv("PYENV_ROOT", str(tmp_path))
        exact = Environment("x", "x", (), python_version="9.1")
        assert exact._base_python() == str(versions / "python9.1")
        (versions / "python9.1").unlink()
        with pytest.raises(SuiteError, match=r"environment x is for Python 9\.1, found"):
            exact._base_python()


def test_an_unknown_name(capsys: pytest.CaptureFixture[str]) -> None:
    code, _ = _install(capsys, "nothing-like-it")
    assert code == 2


def test_without_a_name_they_are_listed(
    tiny: Environment, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("plt_benchmarks.registry._ENVIRONMENTS", (tiny,))
    for arguments, code, text in (
        ((), 0, "tiny: for suite tiny; not installed\n"),
        (("--again",), 2, "--again has no effect without a name; there are tiny"),
        (("tinny",), 2, "tinny: no such environment (did you mean tiny?); there are tiny"),
    ):
        with pytest.raises(SystemExit) as caught:
            main(["install", *arguments])
        out, err = capsys.readouterr()
        assert int(caught.value.code or 0) == code
        assert text in out + err


def _install(capsys: pytest.CaptureFixture[str], name: str) -> tuple[int, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main(["install", name])
    return int(caught.value.code or 0), capsys.readouterr().out
