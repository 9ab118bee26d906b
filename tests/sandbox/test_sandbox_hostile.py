"""What hostile code tries inside each sandbox, and the same code where nothing holds it, to show that it works."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sandbox_tools import CHECKOUT, carriers

from plt_benchmarks.protocols import Sandbox, SandboxJob, SandboxLimits, SandboxOutcome

MB = 1 << 20
QUICK = SandboxLimits(wall_s=20, cpu_s=20, memory=400 * MB)


def attack(sandbox: Sandbox, program: str, *arguments: Any, limits: SandboxLimits = QUICK) -> SandboxOutcome:
    """Run `program`, which reads its arguments as one line of JSON."""
    text = f"import json, os, sys\nARGS = json.loads(sys.stdin.readline())\n{program}"
    return sandbox.run(SandboxJob(text, json.dumps(arguments).encode() + b"\n", limits=limits))


def said(outcome: SandboxOutcome) -> str:
    assert outcome.status == "exited", outcome
    assert outcome.exit_code == 0, outcome
    return outcome.stdout.decode().strip()


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


# --- outliving the limit ------------------------------------------------------------------------------

DAEMON = """
import signal, subprocess, time
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGALRM):
    signal.signal(number, signal.SIG_IGN)
ready, told = os.pipe()
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        null = os.open("/dev/null", os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(null, stream)
        os.write(told, b"x")
        os.execvp("sleep" if ARGS[1] == "sleep" else sys.executable,
                  [sys.executable, "-c", "while True: pass", ARGS[0]])
    os._exit(0)
os.read(ready, 1)
time.sleep(0.3)
print("daemon is up", flush=True)
"""


def gone(marker: str, within_s: float = 2.0) -> bool:
    deadline = time.monotonic() + within_s
    while carriers(marker) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not carriers(marker)


@pytest.mark.parametrize("ending", ["exit", "kill"])
def test_no_daemon_survives(sandbox: Sandbox, no_sandbox: Sandbox, marker: str, ending: str) -> None:
    """Double fork, a session of its own, every polite signal ignored: after the job's end nothing is there."""
    program = DAEMON + ("" if ending == "exit" else "while True: time.sleep(1)")
    limits = SandboxLimits(wall_s=4, cpu_s=20)
    outcome = attack(sandbox, program, marker, "python", limits=limits)
    assert outcome.stdout == b"daemon is up\n", outcome
    assert outcome.status == ("exited" if ending == "exit" else "wall_limit")
    assert gone(marker)
    if ending == "exit":
        attack(no_sandbox, DAEMON, marker, "python", limits=limits)
        assert not gone(marker, 0.2), "outside a sandbox it must survive, or this test shows nothing"


def test_fork_bomb(sandbox: Sandbox) -> None:
    """It doubles ten times and then burns, so that a sandbox that fails to hold it does not take the machine down."""
    program = """
for _ in range(10):
    try:
        if os.fork() == 0:
            os.setsid()
    except OSError:
        pass
while True:
    pass
"""
    limits = SandboxLimits(wall_s=2, cpu_s=60, processes=24)
    outcome = attack(sandbox, program, limits=limits)
    assert outcome.status == "wall_limit"
    assert outcome.wall_s < 6
    assert said(attack(sandbox, "print('still works')")) == "still works"


COUNT = """
import time
count = 1
try:
    while count < ARGS[0]:
        if os.fork() == 0:
            time.sleep(30)
            os._exit(0)
        count += 1
except OSError:
    pass
print(count, flush=True)
os._exit(0)
"""


def test_processes_are_counted(sandbox: Sandbox) -> None:
    few, many = (SandboxLimits(wall_s=20, memory=4 << 30, processes=count) for count in (10, 80))
    assert said(attack(sandbox, COUNT, 60, limits=few)) == "10"
    assert said(attack(sandbox, COUNT, 60, limits=many)) == "60"


def test_processes_of_another_job_do_not_count(bubblewrap: Sandbox) -> None:
    limits = SandboxLimits(wall_s=20, processes=10)
    counts: list[str] = []
    program = COUNT.replace("print(count, flush=True)", "print(count, flush=True)\ntime.sleep(1)")
    jobs = [
        threading.Thread(target=lambda: counts.append(said(attack(bubblewrap, program, 60, limits=limits))))
        for _ in range(3)
    ]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    assert counts == ["10"] * 3


def test_endless_loop_ends_at_the_wall_limit(sandbox: Sandbox) -> None:
    outcome = attack(sandbox, "while True: pass", limits=SandboxLimits(wall_s=1, cpu_s=60))
    assert outcome.status == "wall_limit"
    assert outcome.exit_code is None
    assert 1 <= outcome.wall_s < 5


BURN = """
import signal, time
count, how, seconds = ARGS
until = time.monotonic() + seconds
def burn(until):
    while time.monotonic() < until:
        pass
if how == "deaf":
    signal.signal(signal.SIGXCPU, signal.SIG_IGN)
if how == "unseen generations":  # whose time no parent is told
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
while "generations" in how and time.monotonic() < until:
    if os.fork() == 0:
        burn(time.monotonic() + (0.02 if how == "short generations" else 0.25))
        os._exit(0)
    try:
        os.wait()
    except ChildProcessError:
        pass
for _ in range(count - 1):
    if os.fork() == 0:
        break
burn(until)
"""


@pytest.mark.parametrize(
    ("processes", "how"), [(1, "plain"), (4, "deaf"), (1, "short generations"), (1, "unseen generations")]
)
def test_processor_time_of_all_processes(sandbox: Sandbox, processes: int, how: str) -> None:
    tight, wide = SandboxLimits(wall_s=30, cpu_s=1), SandboxLimits(wall_s=30, cpu_s=60)
    outcome = attack(sandbox, BURN, processes, how, 25, limits=tight)
    assert outcome.status == "cpu_limit", outcome
    assert outcome.cpu_s is not None
    assert 0.9 <= outcome.cpu_s < 4
    assert said(attack(sandbox, BURN, processes, how, 1, limits=wide)) == ""


# --- memory -------------------------------------------------------------------------------------------

EAT = """
import time
for _ in range(ARGS[0] - 1):
    if os.fork() == 0:
        break
block = bytearray(os.urandom(4096)) * (ARGS[1] * 256)
time.sleep(ARGS[2])
print(len(block))
"""


@pytest.mark.parametrize(("processes", "megabytes"), [(1, 500), (8, 60)])
def test_memory_of_all_processes(sandbox: Sandbox, processes: int, megabytes: int) -> None:
    tight, wide = SandboxLimits(wall_s=30, memory=250 * MB), SandboxLimits(wall_s=30, memory=2000 * MB)
    outcome = attack(sandbox, EAT, processes, megabytes, 3, limits=tight)
    assert outcome.status == "memory_limit", outcome
    assert outcome.exit_code is None
    free = attack(sandbox, EAT, processes, megabytes, 1, limits=wide)
    assert said(free).startswith(str(megabytes * MB))
    assert free.peak_memory is not None
    assert free.peak_memory > megabytes * MB


def test_a_quick_bite_is_seen_too(bubblewrap: Sandbox) -> None:
    """A process that outgrows the limit between two looks and is gone again: the verdict is the same each time."""
    program = "block = bytearray(b'x') * (40 << 20)\nos._exit(0)"
    for _ in range(10):
        outcome = attack(bubblewrap, program, limits=SandboxLimits(memory=35 * MB))
        assert outcome.status == "memory_limit", outcome
    assert said(attack(bubblewrap, program, limits=SandboxLimits(memory=100 * MB))) == ""


def test_shared_memory_is_not_counted_twice(sandbox: Sandbox) -> None:
    program = """
import time
block = bytearray(os.urandom(4096)) * (120 * 256)
for _ in range(3):
    if os.fork() == 0:
        break
time.sleep(1.5)
os._exit(0)
"""
    assert said(attack(sandbox, program, limits=SandboxLimits(memory=300 * MB))) == ""


def test_address_space_of_each_process(sandbox: Sandbox) -> None:
    program = """
try:
    print(len(bytearray(300 << 20)))
except MemoryError:
    print("refused")
"""
    tight = SandboxLimits(address_space=200 * MB)
    assert said(attack(sandbox, program, limits=tight)) == "refused"
    assert said(attack(sandbox, program)) == str(300 * MB)


@pytest.mark.parametrize("folder", ["/tmp", "/tmp/work", "/dev/shm"])
def test_files_fill_no_more_than_their_share(sandbox: Sandbox, folder: str) -> None:
    program = """
try:
    for number in range(12):
        with open(f"{ARGS[0]}/{number}", "wb") as file:
            file.write(bytes(4 << 20))
    print("written")
except OSError as error:
    print("refused", error.errno)
"""
    tight, wide = SandboxLimits(tmp_bytes=20 * MB), SandboxLimits(tmp_bytes=60 * MB)
    assert said(attack(sandbox, program, folder, limits=tight)) == "refused 28"
    assert said(attack(sandbox, program, folder, limits=wide)) == "written"


def test_files_count_as_memory(sandbox: Sandbox) -> None:
    program = """
import time
for number in range(40):
    with open(f"/tmp/{number}", "wb") as file:
        file.write(bytes(4 << 20))
time.sleep(1)
print("written")
"""
    tight = SandboxLimits(memory=100 * MB, tmp_bytes=400 * MB, wall_s=20)
    assert attack(sandbox, program, limits=tight).status == "memory_limit"
    assert said(attack(sandbox, program, limits=SandboxLimits(memory=600 * MB, tmp_bytes=400 * MB))) == "written"


def test_size_of_one_file(sandbox: Sandbox) -> None:
    program = """
try:
    with open("/tmp/big", "wb") as file:
        for _ in range(20):
            file.write(bytes(1 << 20))
    print("written")
except OSError as error:
    print("refused", error.errno)
"""
    assert said(attack(sandbox, program, limits=SandboxLimits(file_bytes=10 * MB))) == "refused 27"
    assert said(attack(sandbox, program, limits=SandboxLimits(file_bytes=30 * MB))) == "written"


MAPPED = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
for _ in range(6):
    address = libc.mmap(None, 100 << 20, 3, {flags}, {fd}, 0)
    if address == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), "mmap")
    ctypes.memset(address, 1, 100 << 20)
    libc.munmap(ctypes.c_void_p(address), (100 << 20) - 4096)
"""
HIDDEN = {
    "memfd": "fd = os.memfd_create('x')\nfor _ in range(60): os.write(fd, bytes(10 << 20))",
    "shmget": """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
libc.shmat.restype = ctypes.c_void_p
for _ in range(6):
    segment = libc.shmget(0, 100 << 20, 0o1600)
    if segment < 0:
        raise OSError(ctypes.get_errno(), "shmget")
    address = libc.shmat(segment, None, 0)
    ctypes.memset(address, 1, 100 << 20)
    libc.shmdt(ctypes.c_void_p(address))
""",
    "anonymous": MAPPED.format(fd="-1", flags="0x21"),
    "/dev/zero": MAPPED.format(fd="os.open('/dev/zero', os.O_RDWR)", flags="0x01"),
    "empty files": """
for number in range(400_000):
    os.close(os.open(f"/tmp/{number}", os.O_CREAT | os.O_WRONLY))
""",
}


@pytest.mark.parametrize("how", HIDDEN)
def test_memory_that_belongs_to_no_process(sandbox: Sandbox, no_sandbox: Sandbox, how: str) -> None:
    program = """
import time
try:
    exec(ARGS[0])
    time.sleep(1)
    print("eaten")
except OSError as error:
    print("refused")
"""
    limits = SandboxLimits(memory=250 * MB, file_bytes=1 << 30, wall_s=20)
    outcome = attack(sandbox, program, HIDDEN[how], limits=limits)
    assert outcome.status == "memory_limit" or said(outcome) == "refused", outcome
    if how != "empty files":
        assert said(attack(no_sandbox, program, HIDDEN[how], limits=limits)) == "eaten"


# --- floods -------------------------------------------------------------------------------------------

FLOOD = """
left, stream = ARGS[0], ARGS[1]
while left > 0:
    left -= os.write(stream, b"x" * min(left, 65536))
"""


@pytest.mark.parametrize("stream", [1, 2])
def test_flood_of_output(sandbox: Sandbox, stream: int) -> None:
    limits = SandboxLimits(wall_s=30, output_bytes=3 * MB)
    outcome = attack(sandbox, FLOOD, 1 << 40, stream, limits=limits)
    assert outcome.status == "output_limit"
    assert outcome.wall_s < 15
    assert len(outcome.stdout if stream == 1 else outcome.stderr) == 3 * MB
    just = attack(sandbox, FLOOD, 3 * MB, stream, limits=limits)
    assert (just.status, just.exit_code) == ("exited", 0)
    assert (just.stdout if stream == 1 else just.stderr) == b"x" * 3 * MB
    over = attack(sandbox, FLOOD, 3 * MB + 1, stream, limits=limits)
    assert over.status == "output_limit"


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
    image = ["plt-eval-sandbox-test:latest"] if name == "docker" else []
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
