"""The suites end to end: the installed command, the official harnesses, real containers, real repositories."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from mini import HANGING, PROBLEM, SECRET, WRONG, Cli, Instance, build, write_rows
from scripted import FIX, SOLUTION, SUBMIT, ScriptedDecoder, ScriptedServer, block, by_step

from plt_benchmarks.protocols import SandboxError
from plt_benchmarks.swe.rows import swebench_task
from plt_eval.errors import UserError
from plt_eval.sandbox.owners import process_identity
from plt_eval.store import Run, list_runs
from plt_eval.swe.containers import LABEL, RUN_LABEL, DockerHost

pytestmark = [pytest.mark.docker, pytest.mark.usefixtures("only_containers")]
NOT_APPLYING = "--- a/nowhere.py\n+++ b/nowhere.py\n@@ -1 +1 @@\n-x\n+y\n"


def containers(label: str = LABEL) -> list[str]:
    told = subprocess.run(
        ["docker", "ps", "-aq", "--filter", f"label={label}"], capture_output=True, text=True, check=True
    )
    return told.stdout.split()


def only_run(folder: Path) -> Run:
    (run,) = list_runs(folder / "results" / "runs")
    return run


def outcomes(folder: Path) -> dict[str, str]:
    return {sample.sample_id: sample.detail.get("outcome", sample.error) for sample in only_run(folder).samples()}


def write_predictions(path: Path, patches: dict[str, str]) -> Path:
    rows = [{"instance_id": i, "model_name_or_path": "org/model", "model_patch": p} for i, p in patches.items()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# --- judging ----------------------------------------------------------------------------------------------


def test_gold_resolves_with_both_log_parsers(cli: Cli, tmp_path: Path, calc: Instance, cargo: Instance) -> None:
    write_rows(tmp_path / "rows.jsonl", calc, cargo)
    done = cli("run", "--suite", "swe", "--data", "rows.jsonl", "--gold", "--json")
    (result,) = json.loads(done.stdout)
    assert result["metrics"]["swe.resolved"]["value"] == 1.0
    assert "exec 2>&1" in done.stderr
    assert "merged-streams" in only_run(tmp_path).manifest.identity.suite_version
    assert containers() == []


def test_every_outcome_has_its_class(cli: Cli, tmp_path: Path, calc: Instance, cargo: Instance) -> None:
    """And a patch that changed is judged again, in the same run; the others are not."""
    write_rows(tmp_path / "rows.jsonl", calc, cargo)
    command = ["run", "--suite", "swe", "--data", "rows.jsonl", "--predictions", "p.jsonl", "--test-timeout", "20"]
    write_predictions(tmp_path / "p.jsonl", {calc.id: calc.patch(WRONG), cargo.id: cargo.patch(HANGING)})
    cli(*command)
    assert outcomes(tmp_path) == {calc.id: "unresolved", cargo.id: "tests_timed_out"}
    judged = only_run(tmp_path).path / "judged"
    hanging = next((judged / cargo.id).iterdir())
    before = (hanging / "verdict.json").stat().st_mtime_ns

    write_predictions(tmp_path / "p.jsonl", {calc.id: NOT_APPLYING, cargo.id: cargo.patch(HANGING)})
    cli(*command)
    assert outcomes(tmp_path) == {calc.id: "patch_failed", cargo.id: "tests_timed_out"}
    assert (hanging / "verdict.json").stat().st_mtime_ns == before
    assert len(list((judged / calc.id).iterdir())) == 2

    write_predictions(tmp_path / "p.jsonl", {calc.id: " \n", cargo.id: cargo.gold})
    cli(*command)
    assert outcomes(tmp_path) == {calc.id: "empty_patch", cargo.id: "resolved"}
    metrics = only_run(tmp_path).metrics()
    assert metrics is not None
    assert {name: metric.value for name, metric in metrics.metrics.items()} == {
        "swe.resolved": 0.5,
        "swe.outcome/empty_patch": 0.5,
    }
    assert containers() == []


def test_verdicts_are_those_of_the_official_command_on_the_exported_predictions(
    cli: Cli, tmp_path: Path, calc: Instance, cargo: Instance
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", calc, cargo)
    write_predictions(tmp_path / "p.jsonl", {calc.id: calc.patch(WRONG), cargo.id: cargo.gold})
    cli("run", "--suite", "swe", "--data", "rows.jsonl", "--predictions", "p.jsonl")
    exported = only_run(tmp_path).path / "predictions.jsonl"
    subprocess.run(
        [
            sys.executable, "-m", "swebench.harness.run_evaluation", "-d", str(rows), "-p", str(exported),
            "-id", "official", "--max_workers", "1",
        ],
        cwd=tmp_path, check=True, capture_output=True, timeout=200,
    )  # fmt: skip
    (report,) = tmp_path.glob("*.official.json")
    official = json.loads(report.read_text())
    assert official["resolved_ids"] == [cargo.id]
    assert official["unresolved_ids"] == [calc.id]
    assert outcomes(tmp_path) == {calc.id: "unresolved", cargo.id: "resolved"}


def test_multi_swe_bench_tells_gold_wrong_not_applying_and_hanging_apart(
    cli: Cli, tmp_path: Path, multi: Instance
) -> None:
    write_rows(tmp_path / "rows.jsonl", multi)
    command = ["run", "--suite", "multi-swe-bench", "--data", "rows.jsonl"]
    cli(*command, "--gold")
    assert outcomes(tmp_path) == {multi.id: "resolved"}
    exported = json.loads((only_run(tmp_path).path / "predictions.jsonl").read_text())
    assert exported == {"org": "tokio-rs", "repo": "bytes", "number": 9001, "fix_patch": multi.gold}
    wanted = {
        multi.patch(WRONG): "unresolved",
        NOT_APPLYING: "patch_failed",
        "": "empty_patch",
        multi.patch(HANGING): "tests_timed_out",
    }
    for number, (patch, outcome) in enumerate(wanted.items()):
        (tmp_path / "p.jsonl").write_text(json.dumps({**exported, "fix_patch": patch}) + "\n")
        limit = ("--test-timeout", "8") if outcome == "tests_timed_out" else ()
        cli(*command, "--predictions", "p.jsonl", *limit, "--results", f"r{number}")
        (run,) = list_runs(tmp_path / f"r{number}")
        assert [sample.detail["outcome"] for sample in run.samples()] == [outcome]
    assert containers() == []


def test_a_missing_image_is_missing_and_no_verdict(cli: Cli, tmp_path: Path, calc: Instance) -> None:
    gone = {**calc.row, "instance_id": "mini__calc-404", "image": "plt-eval-test.invalid/nobody/nothing:latest"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(gone) + "\n" + json.dumps(calc.row) + "\n")
    done = cli("run", "--suite", "swe", "--data", "rows.jsonl", "--gold", "--keep-images", "none", code=1)
    assert "missing image plt-eval-test.invalid/nobody/nothing:latest" in done.stderr
    assert "1 of 2 images are not on this machine" in done.stderr
    assert "1 of 2 samples are missing and not counted" in done.stderr
    metrics = only_run(tmp_path).metrics()
    assert metrics is not None
    assert (metrics.missing, metrics.metrics["swe.resolved"].n, metrics.metrics["swe.resolved"].value) == (1, 1, 1.0)


def test_no_daemon_is_one_line(cli: Cli, tmp_path: Path, calc: Instance, monkeypatch: pytest.MonkeyPatch) -> None:
    write_rows(tmp_path / "rows.jsonl", calc)
    monkeypatch.setenv("DOCKER_HOST", "unix:///nowhere/docker.sock")
    done = cli("run", "--suite", "swe", "--data", "rows.jsonl", "--gold", code=2)
    assert done.stderr.strip().count("\n") == 0
    assert "no Docker daemon answers" in done.stderr


def test_containers_have_no_network_unless_the_script_installs(
    cli: Cli, tmp_path: Path, calc: Instance, cargo: Instance
) -> None:
    """Both ask the kernel for its network interfaces while they are judged."""
    rows = []
    for instance, extra in ((calc, ""), (cargo, "\npython3 -m pip install nothing-of-this-name")):
        script = instance.row["eval_script"].replace("git config", f"cat /proc/net/dev{extra}\ngit config", 1)
        rows.append({**instance.row, "eval_script": script})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = cli("run", "--suite", "swe", "--data", "rows.jsonl", "--gold")
    assert "tests of 1 of 2 instances install or fetch packages" in done.stderr
    logs = {path.parent.name: path.read_text() for path in tmp_path.rglob("test_output.txt")}
    assert "eth0" not in logs[calc.id]
    assert "eth0" in logs[cargo.id]
    (tmp_path / "wheels").mkdir()
    cli("run", "--suite", "swe", "--data", "rows.jsonl", "--gold", "--wheels", "wheels", "--results", "r")
    logs = {path.parent.name: path.read_text() for path in (tmp_path / "r").rglob("test_output.txt")}
    assert "eth0" not in logs[cargo.id]


def test_an_image_without_kill_times_out_all_the_same(cli: Cli, tmp_path: Path, calc: Instance) -> None:
    """The harness wants to `kill` what hangs; where the image has no such program, Docker refuses and it gives up."""
    image = "plt-eval-test/no-kill:latest"
    (tmp_path / "image").mkdir()
    build(tmp_path / "image", image, f"FROM {calc.image}\nRUN rm -f /bin/kill /usr/bin/kill\n")
    (tmp_path / "rows.jsonl").write_text(json.dumps({**calc.row, "image": image}) + "\n")
    write_predictions(tmp_path / "p.jsonl", {calc.id: calc.patch(HANGING)})
    cli("run", "--suite", "swe", "--data", "rows.jsonl", "--predictions", "p.jsonl", "--test-timeout", "3")
    assert outcomes(tmp_path) == {calc.id: "tests_timed_out"}


def test_images_that_cannot_fit_are_refused_before_anything_is_pulled(
    calc: Instance, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [
        {
            **calc.row,
            "instance_id": f"mini__many-{i}",
            "version": f"1.{i}",
            "image": f"plt-eval-test.invalid/{i}:latest",
        }
        for i in range(40)
    ]
    tasks = [swebench_task("row", row) for row in rows]
    said: list[str] = []
    host = DockerHost(notify=said.append)
    host.open("disk")
    monkeypatch.setattr(DockerHost, "free_disk", lambda _: 100 << 30)
    with pytest.raises(UserError, match=r"40 of 40 images .* needs about 125 GiB, but only 100 GiB are free"):
        host.plan(tasks)
    host.keep = "none"
    host.plan(tasks)
    assert "pulling them with --keep-images none needs about 17 GiB, 100 GiB are free" in said[-1]
    monkeypatch.setattr(DockerHost, "free_disk", lambda _: 1 << 30)
    with pytest.raises(SandboxError, match=r"disk full: 1\.0 GiB are free"):
        host.ensure(tasks[0])


# --- the agent --------------------------------------------------------------------------------------------


def test_an_agent_solves_both_at_an_endpoint(
    cli: Cli, tmp_path: Path, calc: Instance, cargo: Instance, model: ScriptedServer
) -> None:
    write_rows(tmp_path / "rows.jsonl", calc, cargo)
    done = cli("run", "--suite", "swe", "--data", "rows.jsonl", *model.options(), "--workers", "2", "--json")
    (result,) = json.loads(done.stdout)
    assert result["metrics"]["swe.resolved"]["value"] == 1.0
    assert PROBLEM in model.asked[0]["messages"][1]["content"]
    run = only_run(tmp_path)
    assert {json.loads(line)["model_name_or_path"] for line in (run.path / "predictions.jsonl").open()} == {
        "org__scripted"
    }
    shown = cli("show", run.manifest.run_id, "--instance", calc.id).stdout
    assert "Submitted after 4 model calls" in shown
    assert FIX in shown
    assert '"outcome": "resolved"' in shown
    assert containers() == []


def test_an_agent_solves_it_with_calls_of_a_tool(
    cli: Cli, tmp_path: Path, calc: Instance, model: ScriptedServer
) -> None:
    write_rows(tmp_path / "rows.jsonl", calc)
    model.as_tool_call = True
    cli("run", "--suite", "swe", "--data", "rows.jsonl", *model.options(), "--agent-actions", "tools")
    assert outcomes(tmp_path) == {calc.id: "resolved"}
    assert model.asked[0]["tools"][0]["function"]["name"] == "bash"
    last = model.asked[-1]["messages"]
    assert [message["role"] for message in last[2:4]] == ["assistant", "tool"]
    assert last[3]["tool_call_id"] == last[2]["tool_calls"][0]["id"]


def test_an_agent_solves_multi_swe_bench_and_sees_no_answers(
    cli: Cli, tmp_path: Path, multi: Instance, calc: Instance, model: ScriptedServer
) -> None:
    look = (
        "ls /home/*.patch /home/fix-run.sh; git remote -v; git branch -a; git tag; git log --all --oneline | cat; "
        f"git cat-file -t {multi.future}; git fsck --unreachable --no-reflogs; git stash list; cat /proc/net/dev"
    )
    model.answer = by_step((look, *SOLUTION[1:]))
    for suite, instance in (("multi-swe-bench", multi), ("swe", calc)):
        write_rows(tmp_path / f"{suite}.jsonl", instance)
        model.asked.clear()
        cli("run", "--suite", suite, "--data", f"{suite}.jsonl", *model.options(), "--results", suite)
        (run,) = list_runs(tmp_path / suite)
        assert [sample.detail["outcome"] for sample in run.samples()] == ["resolved"]
        seen = model.asked[1]["messages"][-1]["content"]
        assert "cannot access '/home/*.patch'" in seen
        assert "could not get object info" in seen  # the commit of the future
        for secret in (SECRET, "example.org", "v1.1", "unreachable", "eth0", instance.future[:8] + " "):
            assert secret not in seen.replace(f"cat-file -t {instance.future}", ""), secret
        assert "v1.0" in seen  # tags up to the base stay: version tools need them


@pytest.mark.parametrize(
    ("answer", "options", "outcome"),
    [
        (by_step(["true"]), ["--agent-steps", "3"], "gave_up_steps"),
        (by_step(["sleep 2"]), ["--agent-wall-time", "3"], "gave_up_time"),
        (lambda _: "I would rather not.", [], "gave_up_format"),
        (by_step(["true"]), ["--agent-context", "64"], None),
        (by_step(["git diff > patch.txt", SUBMIT]), [], "empty_patch"),
    ],
)
def test_giving_up_has_its_classes(
    cli: Cli,
    tmp_path: Path,
    calc: Instance,
    model: ScriptedServer,
    answer: Any,
    options: list[str],
    outcome: str | None,
) -> None:
    write_rows(tmp_path / "rows.jsonl", calc)
    model.answer = answer
    if outcome is None:
        model.refuse_over, outcome = 100, "gave_up_context"
    cli("run", "--suite", "swe", "--data", "rows.jsonl", *model.options(), *options)
    assert outcomes(tmp_path) == {calc.id: outcome}


def test_an_endpoint_that_refuses_long_conversations_gets_shorter_ones(
    cli: Cli, tmp_path: Path, calc: Instance, model: ScriptedServer
) -> None:
    def answer(messages: list[dict[str, Any]]) -> str:
        """It keeps no count: the history may be cut."""
        last = messages[-1]["content"]
        steps = {"six": "seq 1 1500", "1499": "seq 2000 3400", "3399": FIX + "; echo fixed", "fixed": SOLUTION[2]}
        for sign, command in steps.items():
            if sign in last:
                return block(command if sign != "fixed" else command + "; echo written")
        return block(SUBMIT if "written" in last else "echo six")

    model.answer, model.refuse_over = answer, 18_000
    write_rows(tmp_path / "rows.jsonl", calc)
    cli("run", "--suite", "swe", "--data", "rows.jsonl", *model.options())
    assert outcomes(tmp_path) == {calc.id: "resolved"}
    accepted = [body for body in model.asked if sum(len(m["content"]) for m in body["messages"]) <= 18_000]
    assert any(
        "earlier messages of this conversation are left out" in body["messages"][1]["content"] for body in accepted
    )
    assert all(PROBLEM in body["messages"][1]["content"] for body in accepted)


def test_floods_and_commands_without_end_are_ended(
    cli: Cli, tmp_path: Path, calc: Instance, model: ScriptedServer
) -> None:
    commands = ("yes", "sleep 4321 & sleep 4321", "ps ax", "echo a\0b", "echo " + 200_000 * "x", *SOLUTION[1:])
    model.answer = by_step(commands)
    write_rows(tmp_path / "rows.jsonl", calc)
    cli("run", "--suite", "swe", "--data", "rows.jsonl", *model.options(), "--agent-command-timeout", "8")
    assert outcomes(tmp_path) == {calc.id: "resolved"}
    last = [message["content"] for message in model.asked[-1]["messages"]]
    assert "wrote more than 4 MiB" in last[3]
    assert "ran for more than 8 seconds" in last[5]
    assert "sleep 4321" not in last[7]
    assert "cannot be run: embedded null byte" in last[9]
    assert "cannot be run: [Errno 7]" in last[11]


def test_an_agent_solves_it_with_a_model_of_this_process(tmp_path: Path, calc: Instance, cargo: Instance) -> None:
    """Two agents, one engine: its prompts, its template and its tokens are real, and only which tokens the model would
    choose is written down."""
    import torch
    from rich.console import Console

    from plt_benchmarks.swe.suites import SWE
    from plt_eval.engines.base import Engine
    from plt_eval.engines.hf import HFEngine
    from plt_eval.runner import Settings
    from plt_eval.swe.command import SweOptions, run_swe
    from plt_model import PLTConfig, PLTForCausalLM
    from plt_model.tokenizer import byte_tokenizer

    torch.manual_seed(0)
    shape = {"vocab_size": 259, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "bos_token_id": 1, "eos_token_id": 2}
    model = PLTForCausalLM(PLTConfig(**shape, **heads, max_position_embeddings=12_000, plt_num_loops=2))
    model.save_pretrained(tmp_path / "model")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    tokenizer.save_pretrained(tmp_path / "model")
    engine = HFEngine(str(tmp_path / "model"), loops=2, notify=lambda _: None)

    def answer(text: str) -> str:
        last = text.rpartition("<user>")[2]
        if "earlier messages" in text:
            assert PROBLEM in text
        for sign, command in (
            ("3399", FIX + "; echo fixed"), ("fixed", SOLUTION[2] + "; echo written"), ("written", SUBMIT),
        ):  # fmt: skip
            if sign in last:
                return block(command)
        return block("seq 2000 3400")

    decoder = ScriptedDecoder(engine.prompts, answer)
    engine.decoder = decoder
    write_rows(tmp_path / "rows.jsonl", calc, cargo)
    said: list[str] = []

    def make() -> Engine:
        return engine

    (result,) = run_swe(
        SWE, SweOptions(workers=2), tmp_path / "rows.jsonl", None, Settings(results=tmp_path / "runs"),
        lambda: [make], lambda settings, _: settings, Console(stderr=True), said.append,
    )  # fmt: skip
    assert result.metrics.metrics["swe.resolved"].value == 1.0
    assert result.run.manifest.identity.loops == 2
    assert sum(decoder.batches) == 8
    assert any("earlier messages of this conversation are left out" in text for text in decoder.read)
    assert max(map(len, decoder.read)) < 12_000


# --- ends -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGINT])
def test_stopped_in_the_middle_it_goes_on_and_leaves_no_container(
    cli: Cli, tmp_path: Path, calc: Instance, cargo: Instance, model: ScriptedServer, by: signal.Signals
) -> None:
    write_rows(tmp_path / "rows.jsonl", calc, cargo)
    slow = ("sleep 30", *SOLUTION[1:])
    # One instance is solved and judged first; the other one's agent is at work when the end comes.
    command = ["run", "--suite", "swe", "--data", "rows.jsonl", *model.options(), "--workers", "1"]
    model.answer = lambda messages: by_step(SOLUTION if len(model.asked) <= 4 else slow)(messages)
    process = subprocess.Popen(
        [sys.executable, "-m", "plt_eval", *command], cwd=tmp_path, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (len(model.asked) >= 5 and containers() and _judged(tmp_path) == 1):
        time.sleep(0.1)
    assert _judged(tmp_path) == 1
    os.kill(process.pid, by)
    _, told = process.communicate(timeout=60)
    if by is signal.SIGINT:
        assert process.returncode == 130
        assert "stopped with 1 of 2 samples done" in told
        assert containers() == []
    else:
        assert containers() != []
        assert {_label(container, RUN_LABEL) for container in containers()} == {
            next((tmp_path / "results" / "runs").iterdir()).name
        }
    model.answer = by_step(SOLUTION)
    asked = len(model.asked)
    cli(*command)
    assert len(model.asked) - asked == 4  # the one that was done is not asked for again
    assert outcomes(tmp_path) == {calc.id: "resolved", cargo.id: "resolved"}
    assert containers() == []


def _judged(folder: Path) -> int:
    return sum(path.read_text().count("\n") for path in folder.glob("results/runs/*/samples.jsonl"))


def _label(container: str, name: str) -> str:
    told = subprocess.run(
        ["docker", "inspect", "-f", f'{{{{index .Config.Labels "{name}"}}}}', container],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return told.stdout.strip()


def _is_harness(process: psutil.Process) -> bool:
    """Of one that has ended there is no command line."""
    try:
        return "plt_benchmarks.swe.child" in process.cmdline()
    except psutil.Error:
        return False


def test_killed_while_judging_it_judges_again(cli: Cli, tmp_path: Path, calc: Instance) -> None:
    """The harness' process goes with its parent, and its container when the next run begins."""
    write_rows(tmp_path / "rows.jsonl", calc)
    write_predictions(tmp_path / "p.jsonl", {calc.id: calc.patch(HANGING)})
    command = ["run", "--suite", "swe", "--data", "rows.jsonl", "--predictions", "p.jsonl", "--test-timeout", "8"]
    process = subprocess.Popen(
        [sys.executable, "-m", "plt_eval", *command], cwd=tmp_path, stderr=subprocess.DEVNULL, text=True
    )
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and not containers():
        time.sleep(0.1)
    children = psutil.Process(process.pid).children(recursive=True)
    harness = [child for child in children if _is_harness(child)]
    assert harness
    process.kill()
    process.wait()
    deadline = time.monotonic() + 60
    while any(map(_is_harness, harness)):
        assert time.monotonic() < deadline, "the harness outlives us"
        time.sleep(0.1)
    assert containers() != []
    cli(*command)
    assert outcomes(tmp_path) == {calc.id: "tests_timed_out"}
    assert containers() == []


def test_containers_of_the_living_are_left_alone(calc: Instance) -> None:
    """Only a dead process' container is an orphan."""
    mine = [f"--label={LABEL}={process_identity(os.getpid())}", f"--label={RUN_LABEL}=mine"]
    dead = f"{process_identity(os.getpid()).rpartition('/')[0]}/1"
    subprocess.run(["docker", "run", "-d", *mine, calc.image, "sleep", "60"], check=True, capture_output=True)
    subprocess.run(
        ["docker", "run", "-d", f"--label={LABEL}={dead}", calc.image, "sleep", "60"], check=True, capture_output=True
    )
    try:
        other = DockerHost(notify=lambda _: None)
        other.open("other")
        other.remove_containers({})
        assert [_label(container, RUN_LABEL) for container in containers()] == ["mine"]
    finally:
        for container in containers():
            subprocess.run(["docker", "rm", "-f", container], check=True, capture_output=True)
    assert containers() == []


def test_pulled_images_go_when_nothing_needs_them_any_more(calc: Instance) -> None:
    """Nothing can be pulled here: two tags of an image stand for two that were."""
    tags = ["plt-eval-test/pulled:1", "plt-eval-test/pulled:2"]
    tasks = [
        swebench_task("row", {**calc.row, "instance_id": f"mini__pulled-{i}", "image": tag})
        for i, tag in enumerate(tags)
    ]
    for keep, left in (("none", 0), ("env", 1), ("all", 2)):
        for tag in tags:
            subprocess.run(["docker", "tag", calc.image, tag], check=True)
        host = DockerHost(keep=keep, notify=lambda _: None)  # type: ignore[arg-type]
        host.open("images")
        host.plan([*tasks, tasks[0]])
        host._pulled = dict.fromkeys(tags, "mini/calc 1.0")
        host.release(tasks[0])
        assert _exists(tags[0])  # one more task has it
        for task in tasks:
            host.release(task)
        assert sum(map(_exists, tags)) == left
    for tag in tags:
        subprocess.run(["docker", "rmi", tag], capture_output=True)
    assert _exists(calc.image)


def _exists(image: str) -> bool:
    return subprocess.run(["docker", "image", "inspect", image], capture_output=True).returncode == 0
