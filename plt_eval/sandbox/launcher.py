"""The first process inside a sandbox: it lowers its limits and rights, starts the job, and reports how it ended.

Its source is handed to an isolated Python (`python -I -S -c SOURCE CHANNEL IDENTITY LIMITS COMMAND...`), so it imports
only what is cheap to import and nothing of this package:

- CHANNEL is `fd:N`, a socket to the supervisor, or `stderr:MARK:SECONDS` where only the standard streams lead
  outside. MARK precedes the report then, and after SECONDS all ends: nobody may be there any more to end it.
- IDENTITY is the user and group id that the job takes, or `keep`.
- The job runs in the folder HOME, which is made if it is not there.
- LIMITS is `NAME=value,...` for `setrlimit`; the hard limit of CPU is one second above the soft one.

As process 1 it cannot be killed from inside, and when it ends the kernel ends every other process of the sandbox.
"""

import _signal as signal  # type: ignore[import-not-found]  # `signal`, its wrapper, takes longer than the rest of this
import os
import resource
import sys

READY, GO = b"R", b"G"


def limit_resources(text: str) -> None:
    """Set the resource limits in `text`, never above the hard limits that are there already."""
    for item in filter(None, text.split(",")):
        name, value = item.split("=")
        kind = getattr(resource, "RLIMIT_" + name)
        hard = resource.getrlimit(kind)[1]
        soft = int(value) if hard == resource.RLIM_INFINITY else min(int(value), hard)
        top = soft + 1 if name == "CPU" else soft
        resource.setrlimit(kind, (soft, top if hard == resource.RLIM_INFINITY else min(top, hard)))


def start_job(identity: str, limits: str, command: list[str], channel: int) -> int:
    """Fork and become the job in the child. Returns its process id.

    From here on SIGINT, which the job may send too, is ignored: as an exception it could come between the end of the
    job and our hearing of it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    pid = os.fork()
    if pid:
        return pid
    try:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if channel >= 0:
            os.set_inheritable(channel, False)
        limit_resources(limits)
        if identity != "keep":
            os.setgroups([])
            os.setresgid(int(identity), int(identity), int(identity))
            os.setresuid(int(identity), int(identity), int(identity))
        os.makedirs(os.environ["HOME"], exist_ok=True)
        os.chdir(os.environ["HOME"])
        os.execvp(command[0], command)
    except BaseException as error:
        os.write(2, f"cannot start {command[0]} as user {os.getuid()}: {error}\n".encode())
    os._exit(127)


def wait_for(job: int) -> int:
    """Reap whatever ends until the job itself has; returns its wait status."""
    while True:
        pid, status = os.wait()
        if pid == job:
            return status


def end_the_rest() -> None:
    """Kill and reap every other process, so that nothing can be written after what we write."""
    while True:
        try:
            os.kill(-1, 9)
        except ProcessLookupError:
            return
        try:
            os.wait()
        except ChildProcessError:
            return


def end_after(seconds: int) -> None:
    """End this process, and with it the sandbox, after so long."""
    signal.signal(signal.SIGALRM, lambda *_: os._exit(1))
    signal.alarm(seconds)


def main() -> None:
    kind, where, *seconds = sys.argv[1].split(":")
    channel = int(where) if kind == "fd" else -1
    if channel >= 0:
        os.write(channel, READY)
        if os.read(channel, 1) != GO:  # nobody is left to watch the job
            os._exit(1)
    if seconds:
        end_after(int(seconds[0]))
    job = start_job(sys.argv[2], sys.argv[3], sys.argv[4:], channel)
    if channel >= 0:
        for stream in (0, 1, 2):
            os.close(stream)
    status = wait_for(job)
    if channel < 0:
        end_the_rest()
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_ms = int((used.ru_utime + used.ru_stime) * 1000)
    report = f"{os.waitstatus_to_exitcode(status)} {cpu_ms} {used.ru_maxrss * 1024}"
    if channel >= 0:
        os.write(channel, report.encode())
    else:
        os.write(2, f"\0{where} {report}\n".encode())
    os._exit(0)


if __name__ == "__main__":
    main()
