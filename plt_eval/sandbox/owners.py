"""Which process of which machine a container belongs to, so that whoever comes later can clear up after the dead."""

from __future__ import annotations

import os
import socket
from pathlib import Path


def process_identity(pid: int) -> str:
    """A process, told apart from every other, also after its number was given to another one."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    started = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    return f"{socket.gethostname()}/{boot}/{os.readlink('/proc/self/ns/pid')}/{pid}/{started}"


def is_orphan(owner: str, ours: str) -> bool:
    """Whether `owner` is a dead process of our machine; of another machine or namespace we cannot know."""
    theirs, own = owner.split("/"), ours.split("/")
    if len(theirs) != len(own) or theirs[0] != own[0]:
        return False
    if theirs[1] != own[1]:  # the machine was started anew
        return True
    if theirs[2] != own[2]:
        return False
    try:
        return process_identity(int(theirs[3])) != owner
    except (OSError, ValueError, IndexError):
        return True
