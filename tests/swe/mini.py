"""Miniature instances with everything that real ones have: a repository with history, a future that holds the fix, a
remote, an image of their own, tests that fail before the fix, and rows in the official forms.

`calc` is judged by its pytest lines, `cargo` by another log parser; `bytes` is in Multi-SWE-bench's form, under the
name of a repository that its harness knows.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Cli = Callable[..., subprocess.CompletedProcess[str]]
"""`plt-eval` with these arguments, in a folder of its own."""
BASE = "plt-eval-swe-base:latest"
BUGGY = "def add(a, b):\n    return a - b\n\n\ndef twice(a):\n    return 2 * a\n"
FIXED = BUGGY.replace("a - b", "a + b")
OLD_TEST = "from calc import twice\n\n\ndef test_twice():\n    assert twice(2) == 4\n"
NEW_TEST = OLD_TEST.replace("import twice", "import add, twice") + "\n\ndef test_add():\n    assert add(2, 3) == 5\n"
RUNNER = """import sys
import test_calc

for name in sorted(n for n in dir(test_calc) if n.startswith("test_")):
    try:
        getattr(test_calc, name)()
        print(f"test {name} ... ok", flush=True)
    except AssertionError:
        print(f"test {name} ... FAILED", flush=True)
        print("a failure, on the other stream", file=sys.stderr, flush=True)
"""
SECRET = "the-fix-of-the-future"
PROBLEM = "add(2, 3) is -1. I expected 5."
WRONG = "    return a * b"
HANGING = "    while True:\n        pass"


@dataclass(frozen=True)
class Instance:
    """An instance and what its repository has: the commit that it starts from, and the one with the fix."""

    id: str
    image: str
    workdir: str
    row: dict[str, Any] = field(repr=False)
    base: str
    future: str
    gold: str

    def patch(self, body: str) -> str:
        """A patch that applies, with `body` as the body of add()."""
        return self.gold.replace("+    return a + b", "\n".join("+" + line for line in body.split("\n"))).replace(
            "@@ -1,5 +1,5 @@", f"@@ -1,5 +1,{5 + body.count(chr(10))} @@"
        )


def git(folder: Path, *arguments: str) -> str:
    """Run git in `folder`; its output."""
    names = {f"GIT_{who}_{what}": "mini@example.org" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    dates = {"GIT_AUTHOR_DATE": "2024-01-01T00:00:00Z", "GIT_COMMITTER_DATE": "2024-01-01T00:00:00Z"}
    done = subprocess.run(
        ["git", "-C", str(folder), *arguments],
        env={**os.environ, **names, **dates},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


def make_repository(folder: Path) -> dict[str, str]:
    """A clone with history up to the bug, the fix on the main branch after it, tags and a remote. Names -> commits."""
    upstream = folder / "upstream"
    upstream.mkdir(parents=True)
    git(upstream, "init", "-q", "-b", "main")

    def commit(message: str, files: dict[str, str]) -> str:
        for name, text in files.items():
            (upstream / name).write_text(text)
        git(upstream, "add", "-A")
        git(upstream, "commit", "-qm", message)
        return git(upstream, "rev-parse", "HEAD").strip()

    commit("the beginning", {"calc.py": "def twice(a):\n    return 2 * a\n", "test_calc.py": OLD_TEST})
    git(upstream, "tag", "-a", "v1.0", "-m", "first")
    base = commit("add", {"calc.py": BUGGY, "run_tests.py": RUNNER})
    commit("fix add", {"calc.py": FIXED})
    future = commit(SECRET, {"test_calc.py": NEW_TEST, "CHANGES": SECRET + "\n"})
    git(upstream, "tag", "-a", "v1.1", "-m", "fixed")
    clone = folder / "repository"
    git(folder, "clone", "-q", str(upstream), str(clone))
    git(clone, "remote", "set-url", "origin", "https://example.org/mini/calc.git")
    git(clone, "checkout", "-q", "--detach", base)
    git(clone, "gc", "-q")
    shutil.rmtree(upstream)
    return {"base": base, "future": future}


def _patches(repository: Path, commits: dict[str, str]) -> tuple[str, str]:
    wanted = (commits["base"], commits["future"], "--no-renames", "--")
    return git(repository, "diff", wanted[0], wanted[1], "--", "calc.py"), git(
        repository, "diff", wanted[0], wanted[1], "--", "test_calc.py"
    )


def build(folder: Path, image: str, dockerfile: str) -> None:
    """Build `image` from `folder`, without a network."""
    (folder / "Dockerfile").write_text(dockerfile)
    done = subprocess.run(
        ["docker", "build", "-q", "--network", "none", "-t", image, str(folder)],
        capture_output=True,
        text=True,
        env={**os.environ, "DOCKER_BUILDKIT": "0"},
    )
    assert done.returncode == 0, done.stderr


def swebench_instance(
    folder: Path, number: int, *, base: str, parser: str = "parse_log_pytest", stop_signal: str | None = None
) -> Instance:
    """One in the form of swebench 5, with its image built; `docker stop` waits 15 s for it without a `stop_signal`."""
    commits = make_repository(folder)
    gold, test = _patches(folder / "repository", commits)
    name = f"mini__calc-{number}"
    image = f"plt-eval-test/sweb.eval.x86_64.mini_1776_calc-{number}:latest"
    stop = "" if stop_signal is None else f"STOPSIGNAL {stop_signal}\n"
    build(folder, image, f"FROM {base}\nCOPY repository /testbed\nWORKDIR /testbed\n{stop}")
    pytest_names = {"old": "test_calc.py::test_twice", "new": "test_calc.py::test_add"}
    names = pytest_names if parser == "parse_log_pytest" else {"old": "test_twice", "new": "test_add"}
    command = "python3 -m pytest -rA -p no:cacheprovider test_calc.py"
    if parser != "parse_log_pytest":
        command = "python3 run_tests.py"
    script = f"""#!/bin/bash
set -uxo pipefail
cd /testbed
git config --global --add safe.directory /testbed
git checkout {commits["base"]} test_calc.py
git apply -v - <<'EOF_114329324912'
{test}
EOF_114329324912
: '>>>>> Start Test Output'
{command}
: '>>>>> End Test Output'
git checkout {commits["base"]} test_calc.py
"""
    row = {
        "repo": "mini/calc", "instance_id": name, "base_commit": commits["base"], "patch": gold, "test_patch": test,
        "problem_statement": PROBLEM, "hints_text": "", "created_at": "2024-01-01T00:00:00Z", "version": "1.0",
        "FAIL_TO_PASS": json.dumps([names["new"]]), "PASS_TO_PASS": json.dumps([names["old"]]),
        "environment_setup_commit": commits["base"], "eval_script": script, "log_parser": parser,
        "eval_type": "pass_and_fail", "image": image,
    }  # fmt: skip
    return Instance(name, image, "/testbed", row, commits["base"], commits["future"], gold)


def multi_swe_instance(folder: Path, *, base: str, number: int = 9001) -> Instance:
    """One in Multi-SWE-bench's form: cargo's lines, as its harness reads those of tokio-rs/bytes."""
    commits = make_repository(folder)
    gold, test = _patches(folder / "repository", commits)
    (folder / "fix.patch").write_text(gold)
    (folder / "test.patch").write_text(test)
    head = "#!/bin/bash\nset -e\ncd /home/bytes\n"
    (folder / "run.sh").write_text(head + "python3 run_tests.py\n")
    (folder / "test-run.sh").write_text(head + "git apply /home/test.patch\npython3 run_tests.py\n")
    (folder / "fix-run.sh").write_text(head + "git apply /home/test.patch /home/fix.patch\npython3 run_tests.py\n")
    image = f"mswebench/tokio-rs_m_bytes:pr-{number}"
    scripts = "run.sh test-run.sh fix-run.sh fix.patch test.patch"
    build(folder, image, f"FROM {base}\nCOPY repository /home/bytes\nCOPY {scripts} /home/\nWORKDIR /home/bytes\n")

    def result(passed: list[str], failed: list[str]) -> dict[str, Any]:
        return {
            "passed_count": len(passed), "failed_count": len(failed), "skipped_count": 0, "passed_tests": passed,
            "failed_tests": failed, "skipped_tests": [],
        }  # fmt: skip

    added = {"test_add": {"run": "NONE", "test": "FAIL", "fix": "PASS"}}
    row = {
        "org": "tokio-rs", "repo": "bytes", "number": number, "state": "closed", "title": "Fix add", "body": "It adds.",
        "base": {"label": "tokio-rs:master", "ref": "master", "sha": commits["base"]},
        "resolved_issues": [{"number": 1, "title": "add subtracts", "body": PROBLEM}],
        "fix_patch": gold, "test_patch": test, "fixed_tests": added,
        "p2p_tests": {"test_twice": {"run": "PASS", "test": "PASS", "fix": "PASS"}}, "f2p_tests": added,
        "s2p_tests": {}, "n2p_tests": {}, "run_result": result(["test_twice"], []),
        "test_patch_result": result(["test_twice"], ["test_add"]),
        "fix_patch_result": result(["test_add", "test_twice"], []),
    }  # fmt: skip
    return Instance(f"tokio-rs__bytes-{number}", image, "/home/bytes", row, commits["base"], commits["future"], gold)


def write_rows(path: Path, *instances: Instance) -> Path:
    """Their rows as JSON lines."""
    path.write_text("".join(json.dumps(instance.row) + "\n" for instance in instances))
    return path
