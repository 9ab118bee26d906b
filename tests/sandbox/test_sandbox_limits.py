"""What hostile code cannot use up, outlive or flood; each limit is shown to be what stops it."""

from __future__ import annotations

import threading

import pytest
from sandbox_tools import MB, attack, gone, said

from plt_benchmarks.protocols import Sandbox, SandboxLimits

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
        os.execvp("sleep" if ARGS[1] == "sleep" else sys.executable,
                  [sys.executable, "-c", "while True: pass", ARGS[0]])
    os._exit(0)
os.close(told)
os.wait()
os.read(ready, 1)  # it ends where the daemon becomes another program
print("daemon is up", flush=True)
"""


@pytest.mark.parametrize("ending", ["exit", "kill"])
def test_no_daemon_survives(sandbox: Sandbox, no_sandbox: Sandbox, marker: str, ending: str) -> None:
    """Double fork, a session of its own, every polite signal ignored: after the job's end nothing is there."""
    program = DAEMON + ("" if ending == "exit" else "while True: time.sleep(1)")
    limits = SandboxLimits(wall_s=6, cpu_s=20)
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
segments = []
for _ in range(6):
    segment = libc.shmget(0, 100 << 20, 0o1600)
    if segment < 0:
        raise OSError(ctypes.get_errno(), "shmget")
    segments.append(segment)
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
    for segment in globals().get("segments", ()):  # or they would outlive the run without a sandbox
        libc.shmctl(segment, 0, None)
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
