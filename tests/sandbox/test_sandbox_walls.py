"""What hostile code cannot reach from inside a sandbox, and reaches where nothing holds it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from sandbox_tools import CHECKOUT, QUICK, TEST_IMAGE, attack, said

from plt_benchmarks.protocols import Sandbox, SandboxJob

# --- the network --------------------------------------------------------------------------------------

CONNECT = """
import socket
family, address = ARGS
address = tuple(address) if isinstance(address, list) else address
try:
    with socket.socket(getattr(socket, family)) as s:
        s.settimeout(3)
        s.connect(address)
    print("connected")
except OSError as error:
    print("refused", error)
"""


@pytest.fixture
def listener() -> Iterator[int]:
    with socket.create_server(("0.0.0.0", 0)) as server:
        yield server.getsockname()[1]


def own_addresses() -> list[str]:
    """Loopback, and the address that other machines would see, where there is one."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing
            return ["127.0.0.1", probe.getsockname()[0]]
        except OSError:
            return ["127.0.0.1"]


def test_no_tcp(sandbox: Sandbox, no_sandbox: Sandbox, listener: int) -> None:
    for host in own_addresses():
        assert said(attack(sandbox, CONNECT, "AF_INET", [host, listener])).startswith("refused")
        assert said(attack(no_sandbox, CONNECT, "AF_INET", [host, listener])) == "connected"


@pytest.mark.parametrize("kind", ["path", "abstract"])
def test_no_unix_socket(sandbox: Sandbox, no_sandbox: Sandbox, tmp_path: Path, kind: str) -> None:
    address = str(tmp_path / "socket") if kind == "path" else f"\0plt-eval-{os.urandom(8).hex()}"
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o777)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(address)
        server.listen()
        if kind == "path":
            os.chmod(address, 0o777)
        assert said(attack(sandbox, CONNECT, "AF_UNIX", address)).startswith("refused")
        assert said(attack(no_sandbox, CONNECT, "AF_UNIX", address)) == "connected"


def test_no_line_to_the_hypervisor(sandbox: Sandbox, no_sandbox: Sandbox) -> None:
    program = """
import socket
try:
    socket.socket(socket.AF_VSOCK).close()
    print("open")
except OSError as error:
    print("refused")
"""
    if sandbox.name == "docker":
        pytest.skip("Docker's own filter of system calls decides about vsock: that of old daemons lets it through")
    if said(attack(no_sandbox, program)) != "open":
        pytest.skip("this machine's kernel has no vsock")
    assert said(attack(sandbox, program)) == "refused"


# --- secrets ------------------------------------------------------------------------------------------

READ = """
try:
    print(open(ARGS[0]).read())
except OSError as error:
    print("refused", error)
"""


def test_no_secret_in_the_home_folder(sandbox: Sandbox, no_sandbox: Sandbox) -> None:
    secret = os.urandom(8).hex()
    path = Path.home() / f".plt-eval-test-{secret}"
    path.write_text(secret)
    try:
        assert said(attack(sandbox, READ, str(path))).startswith("refused")
        assert said(attack(no_sandbox, READ, str(path))) == secret
    finally:
        path.unlink()


def test_home_holds_nothing_but_python(sandbox: Sandbox, no_sandbox: Sandbox) -> None:
    program = """
found = []
for folder, folders, files in os.walk(ARGS[0]):
    found += [os.path.join(folder, name) for name in files]
    folders[:] = [name for name in folders if os.path.join(folder, name) not in ARGS[1]]
    if len(found) > 9:
        break
print(json.dumps(found))
"""
    python = [f"{prefix}/{part}" for prefix in (sys.prefix, sys.base_prefix) for part in ("bin", "lib", "lib64")]
    home = str(Path.home())
    seen = json.loads(said(attack(sandbox, program, home, python)))
    assert [name for name in seen if not name.endswith("pyvenv.cfg")] == []
    secret = Path(home, f".plt-eval-test-{os.urandom(8).hex()}")
    secret.touch()
    try:
        assert json.loads(said(attack(no_sandbox, program, home, python)))
    finally:
        secret.unlink()


def test_no_secret_in_the_checkout(sandbox: Sandbox, no_sandbox: Sandbox) -> None:
    path = str(CHECKOUT / "pyproject.toml")
    assert said(attack(sandbox, READ, path)).startswith("refused")
    assert "[project]" in said(attack(no_sandbox, READ, path))
    package = "import importlib.util\nprint(importlib.util.find_spec('plt_eval') is None)"
    assert said(attack(sandbox, package)) == "True"


ENVIRONMENTS = """
seen = [json.dumps(dict(os.environ))]
for pid in filter(str.isdigit, os.listdir("/proc")):
    try:
        seen.append(open(f"/proc/{pid}/environ").read())
    except OSError:
        pass
print(any(ARGS[0] in text for text in seen))
"""


def test_no_secret_in_the_environment(sandbox: Sandbox, no_sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = os.urandom(8).hex()
    monkeypatch.setenv("PLANTED_SECRET", secret)
    # /proc shows the environment that a process was started with, so another process has to carry it.
    with subprocess.Popen(["sleep", "60"], env={**os.environ, "PLANTED_SECRET": secret}) as carrier:
        try:
            assert said(attack(sandbox, ENVIRONMENTS, secret)) == "False"
            assert said(attack(no_sandbox, ENVIRONMENTS, secret)) == "True"
        finally:
            carrier.kill()


# --- writing ------------------------------------------------------------------------------------------

WRITE = """
written = []
for path in ARGS:
    try:
        with open(path, "w") as file:
            file.write("hostile")
        written.append(path)
    except OSError:
        pass
print(json.dumps(written))
"""


def test_no_file_outside(sandbox: Sandbox, no_sandbox: Sandbox, tmp_path: Path) -> None:
    word = f"plt-eval-hostile-{os.urandom(8).hex()}"
    folders = ["/", "/usr", "/usr/local/bin", "/etc", "/dev", "/var/tmp", "/run", "/sandbox", "/sandbox/files"]
    folders += [str(Path.home()), str(CHECKOUT), str(CHECKOUT / "plt_eval"), sys.prefix, f"{sys.base_prefix}/lib"]
    paths = [os.path.join(folder, word) for folder in [*folders, str(tmp_path), "/proc/1", "/proc/sys/kernel"]]
    assert json.loads(said(attack(sandbox, WRITE, *paths))) == []
    allowed = [f"/tmp/{word}", f"/tmp/work/{word}", f"/dev/shm/{word}"]
    assert json.loads(said(attack(sandbox, WRITE, *allowed))) == allowed
    assert [path for path in [*paths, *allowed] if os.path.exists(path)] == []
    control = str(tmp_path / word)
    assert json.loads(said(attack(no_sandbox, WRITE, control))) == [control]
    assert os.path.exists(control)


def test_driver_and_files_cannot_be_changed(sandbox: Sandbox) -> None:
    program = """
def tries(what):
    try:
        what()
    except OSError:
        return False
    return True

own, given = __file__, os.environ["SANDBOX_FILES"] + "/data.bin"
changed = [
    tries(lambda: open(own, "a")), tries(lambda: os.chmod(own, 0o777)), tries(lambda: os.remove(own)),
    tries(lambda: open(given, "a")), tries(lambda: os.chmod(given, 0o777)), tries(lambda: os.remove(given)),
    tries(lambda: os.rename(given, given + "2")), tries(lambda: os.rename(os.environ["SANDBOX_FILES"], "/tmp/x")),
]
print(open(given).read(), any(changed), changed)
"""
    outcome = sandbox.run(SandboxJob("import os\n" + program, files={"data.bin": b"given"}, limits=QUICK))
    assert said(outcome).startswith("given False")


def test_nothing_is_left_for_the_next_job(sandbox: Sandbox) -> None:
    word = os.urandom(8).hex()
    places = [f"/tmp/{word}", f"/dev/shm/{word}"]
    assert json.loads(said(attack(sandbox, WRITE, *places))) == places
    look = "print([path for path in ARGS if os.path.exists(path)])"
    assert said(attack(sandbox, look, *places)) == "[]"


# --- the harness --------------------------------------------------------------------------------------

HARNESS = """
import os, sys, time
from plt_benchmarks.protocols import SandboxJob, SandboxLimits
from plt_eval.sandbox import open_sandbox
sandbox = open_sandbox(sys.argv[1], image=sys.argv[3] if len(sys.argv) > 3 else None)
program = sys.argv[2].replace("HARNESS", str(os.getpid()))
print(sandbox.run(SandboxJob(program, limits=SandboxLimits(wall_s=10))))
"""

SIGNALS = {
    "by its number": "import os\nos.kill(HARNESS, 9)",
    "its parents": """
import os
pids = [os.getppid()]
while pids[-1] > 1 and pids[-1] != HARNESS:
    pids.append(int(open(f"/proc/{pids[-1]}/stat").read().rpartition(")")[2].split()[1]))
for pid in reversed(pids):
    os.kill(pid, 9)
""",
}


def harness_survives(name: str, program: str) -> bool:
    image = [TEST_IMAGE] if name == "docker" else []
    command = [sys.executable, "-c", HARNESS, name, program, *image]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode in (0, -9), done.stderr
    return done.returncode == 0


@pytest.mark.parametrize("how", SIGNALS)
def test_no_signal_reaches_the_harness(sandbox: Sandbox, how: str) -> None:
    assert harness_survives(sandbox.name, SIGNALS[how])
    assert not harness_survives("unsafe-subprocess", SIGNALS[how])


SIGNAL_ALL = """
for pid, number in ((-1, 9), (1, 9), (1, 2), (1, 15)):
    try:
        os.kill(pid, number)
    except OSError:
        pass
print("done")
"""


def test_a_signal_to_everyone_stays_inside(sandbox: Sandbox, marker: str) -> None:
    """There is no control for this one: outside a sandbox it would end the whole session."""
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", marker]) as bystander:
        try:
            outcome = attack(sandbox, SIGNAL_ALL)
            assert said(outcome) == "done"
            assert bystander.poll() is None
        finally:
            bystander.kill()


SIGNAL_LAST = """
for _ in range(500):
    try:
        os.kill(1, 2)
    except PermissionError:
        break
os._exit(7)
"""


def test_a_signal_to_process_1_in_the_last_moment(sandbox: Sandbox) -> None:
    """Nothing comes between the end of a job and the launcher's hearing of it."""
    for _ in range(12):
        outcome = attack(sandbox, SIGNAL_LAST)
        assert (outcome.status, outcome.exit_code) == ("exited", 7), outcome


LOOK_INSIDE = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
found = []
for pid in ARGS:
    if libc.ptrace(16, pid, 0, 0) == 0:
        found.append("attached")
        os.waitpid(pid, 0x40000000)
        libc.ptrace(17, pid, 0, 0)
    for name in ("environ", "mem", "maps"):
        try:
            open(f"/proc/{pid}/{name}", "rb").read(1)
            found.append(name)
        except OSError as error:
            if name == "mem" and error.errno == 5:  # opened, and nothing lies at address 0
                found.append(name)
print(json.dumps(found))
"""


def test_no_look_into_the_harness(sandbox: Sandbox, no_sandbox: Sandbox) -> None:
    with subprocess.Popen(["sleep", "60"]) as other:
        try:
            assert json.loads(said(attack(sandbox, LOOK_INSIDE, other.pid))) == []
            assert "environ" in json.loads(said(attack(no_sandbox, LOOK_INSIDE, other.pid)))
            assert "attached" in json.loads(said(attack(no_sandbox, LOOK_INSIDE, other.pid)))
        finally:
            other.kill()


# --- rights -------------------------------------------------------------------------------------------


def test_no_rights(sandbox: Sandbox) -> None:
    program = """
status = dict(line.split(":", 1) for line in open("/proc/self/status").read().splitlines())
print(json.dumps([os.getuid(), os.geteuid(), os.getgid(), int(status["CapPrm"], 16), int(status["CapEff"], 16),
                  int(status["CapAmb"], 16), int(status["NoNewPrivs"])]))
"""
    uid, effective, gid, *capabilities, no_new = json.loads(said(attack(sandbox, program)))
    assert uid == effective
    assert uid > 1000
    assert gid > 1000
    assert capabilities == [0, 0, 0]
    assert no_new == 1


def test_no_namespace_of_its_own(sandbox: Sandbox, no_sandbox: Sandbox) -> None:
    program = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
won = []
for name, call in {
    "unshare": lambda: libc.unshare(0x10000000),
    "clone": lambda: libc.syscall(56, 0x10000000 | 17, 0, 0, 0, 0),
}.items():
    if os.fork() == 0:
        result = call()
        os._exit(1 if result < 0 else 0)
    if os.wait()[1] == 0:
        won.append(name)
print(json.dumps(won))
"""
    if os.uname().machine != "x86_64":
        pytest.skip("the number of the clone call is that of x86_64")
    assert json.loads(said(attack(sandbox, program))) == []
    assert json.loads(said(attack(no_sandbox, program))) == ["unshare", "clone"]


def test_a_broken_launcher_is_the_jobs_own_loss(sandbox: Sandbox) -> None:
    """An ordinary user's job has the same user id as its launcher, and may write into its memory."""
    program = """
import re
hit = False
try:
    with open("/proc/1/maps") as maps, open("/proc/1/mem", "r+b", buffering=0) as memory:
        for line in maps:
            found = re.match(r"([0-9a-f]+)-([0-9a-f]+) rw", line)
            if found:
                start, end = (int(text, 16) for text in found.groups())
                memory.seek(start)
                memory.write(bytes(end - start))
                hit = True
except OSError:
    pass
print("hit" if hit else "refused", flush=True)
"""
    outcome = attack(sandbox, program)
    assert outcome.status == "exited"
    assert outcome.exit_code in (0, -9)
    if os.geteuid() == 0 and type(sandbox).__name__ == "Bubblewrap":
        assert outcome.stdout == b"refused\n"
    assert said(attack(sandbox, "print('still works')")) == "still works"
