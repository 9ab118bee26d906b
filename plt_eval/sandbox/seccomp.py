"""A filter of system calls for jobs: what no judged program needs, and what would reach past the sandbox.

The filter refuses what makes new namespaces or mounts, what looks into other processes, kernel features that have
no business here, memory that belongs to no process (and so escapes the meter), and sockets of families that a
network namespace does not hold back, such as a virtual machine's line to its host.
"""

from __future__ import annotations

import errno
import socket
import struct
from dataclasses import dataclass

_LOAD, _JUMP_EQUAL, _JUMP_SET, _JUMP_GREATER_EQUAL, _RETURN = 0x20, 0x15, 0x45, 0x35, 0x06
_ALLOW, _ERRNO, _KILL = 0x7FFF_0000, 0x0005_0000, 0x8000_0000
_NUMBER, _ARCHITECTURE, _ARGUMENT_0, _ARGUMENT_3 = 0, 4, 16, 40  # in struct seccomp_data; low words of arguments
_MAP_SHARED, _MAP_ANONYMOUS = 0x01, 0x20
_NEW_NAMESPACES = 0x7E02_0000  # every CLONE_NEW* flag that clone takes
_FAMILIES = (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6, 16)  # 16: netlink


@dataclass(frozen=True)
class _Machine:
    audit: int
    clone: int
    mmap: int
    clone3: int
    socket: int
    x32: bool
    denied: dict[str, int]


# Numbers that every architecture shares since Linux 5.1.
_SHARED = {
    "pidfd_getfd": 438, "open_tree": 428, "move_mount": 429, "fsopen": 430, "fsconfig": 431, "fsmount": 432,
    "fspick": 433, "mount_setattr": 442, "io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427,
    "memfd_secret": 447, "process_madvise": 440,
}  # fmt: skip
_X86_64 = {
    "unshare": 272, "setns": 308, "mount": 165, "umount2": 166, "pivot_root": 155, "chroot": 161, "ptrace": 101,
    "process_vm_readv": 310, "process_vm_writev": 311, "kcmp": 312, "add_key": 248, "request_key": 249,
    "keyctl": 250, "bpf": 321, "perf_event_open": 298, "userfaultfd": 323, "open_by_handle_at": 304,
    "kexec_load": 246, "init_module": 175, "finit_module": 313, "delete_module": 176, "swapon": 167,
    "memfd_create": 319, "shmget": 29,
}  # fmt: skip
_AARCH64 = {
    "unshare": 97, "setns": 268, "mount": 40, "umount2": 39, "pivot_root": 41, "chroot": 51, "ptrace": 117,
    "process_vm_readv": 270, "process_vm_writev": 271, "kcmp": 272, "add_key": 217, "request_key": 218,
    "keyctl": 219, "bpf": 280, "perf_event_open": 241, "userfaultfd": 282, "open_by_handle_at": 265,
    "kexec_load": 104, "init_module": 105, "finit_module": 273, "delete_module": 106, "swapon": 224,
    "memfd_create": 279, "shmget": 194,
}  # fmt: skip
_MACHINES = {
    "x86_64": _Machine(0xC000_003E, 56, 9, 435, 41, True, {**_SHARED, **_X86_64}),
    "aarch64": _Machine(0xC000_00B7, 220, 222, 435, 198, False, {**_SHARED, **_AARCH64}),
}


def deny_list(machine: str) -> bytes | None:
    """The filter program for `machine` (as in `uname -m`), or None where we know no numbers."""
    known = _MACHINES.get(machine)
    if known is None:
        return None
    program = [
        _instruction(_LOAD, _ARCHITECTURE),
        _instruction(_JUMP_EQUAL, known.audit, 1, 0),
        _instruction(_RETURN, _KILL),  # another instruction set would have other numbers
        _instruction(_LOAD, _NUMBER),
    ]
    if known.x32:
        program += [_instruction(_JUMP_GREATER_EQUAL, 0x4000_0000, 0, 1), _refuse(errno.ENOSYS)]
    for number in sorted(known.denied.values()):
        program += _for_call(number, [_refuse(errno.EPERM)])
    # Its flags lie in memory that a filter cannot read; the C library falls back to clone.
    program += _for_call(known.clone3, [_refuse(errno.ENOSYS)])
    program += _for_call(
        known.clone,
        [
            _instruction(_LOAD, _ARGUMENT_0),
            _instruction(_JUMP_SET, _NEW_NAMESPACES, 0, 1),
            _refuse(errno.EPERM),
            _instruction(_RETURN, _ALLOW),
        ],
    )
    # Pages of shared anonymous memory outlive their mapping while any other page of it is mapped.
    program += _for_call(
        known.mmap,
        [
            _instruction(_LOAD, _ARGUMENT_3),
            _instruction(_JUMP_SET, _MAP_ANONYMOUS, 0, 2),
            _instruction(_JUMP_SET, _MAP_SHARED, 0, 1),
            _refuse(errno.EPERM),
            _instruction(_RETURN, _ALLOW),
        ],
    )
    families = [
        _instruction(_JUMP_EQUAL, family, len(_FAMILIES) - position, 0) for position, family in enumerate(_FAMILIES)
    ]
    allow = _instruction(_RETURN, _ALLOW)
    program += _for_call(
        known.socket, [_instruction(_LOAD, _ARGUMENT_0), *families, _refuse(errno.EAFNOSUPPORT), allow]
    )
    return b"".join([*program, allow])


def _for_call(number: int, body: list[bytes]) -> list[bytes]:
    """`body`, which must end in a verdict, for the call `number`; other calls go on behind it."""
    return [_instruction(_JUMP_EQUAL, number, 0, len(body)), *body]


def _refuse(error: int) -> bytes:
    return _instruction(_RETURN, _ERRNO | error)


def _instruction(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)
