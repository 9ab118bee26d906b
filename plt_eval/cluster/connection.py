"""Reaching a Ray cluster, or starting one in this machine: `local`, `auto`, `HOST:PORT` or `ray://HOST:PORT`."""

from __future__ import annotations

import importlib
import logging
import os
import re
import signal
import socket
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from plt_eval.cluster.orders import DOCKER
from plt_eval.errors import MissingExtra, UserError, one_line

LOCAL, AUTO = "local", "auto"
_ANSWER_S = 5.0
_STORE_BYTES = 2 << 30
_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"
"""How a client of gRPC begins: HTTP/2's preface, and settings without any."""
_SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # without it, a warning at every start
    "RAY_ENABLE_AUTO_CONNECT": "0",  # a thread that comes too late must not start a Ray of its own
}


class Connection:
    """Ray, connected until closed; `address` is as the user gave it. Ray allows one of them in a process."""

    def __init__(self, address: str, ray: Any, on_sigterm: Any) -> None:
        self.address = address
        self.ray = ray
        self._on_sigterm = on_sigterm

    @property
    def name(self) -> str:
        """As in messages."""
        return "the local Ray" if self.address == LOCAL else f"the Ray cluster at {self.address}"

    def close(self) -> None:
        """Disconnect; a local Ray ends. SIGTERM does again what it did before: Ray leaves its own handler behind, which
        would end the process as if Ray still ran."""
        with suppress(Exception):
            self.ray.shutdown()
        _restore(self._on_sigterm)


def check_address(address: str) -> None:
    """Raises UserError for what is no address, where Ray is not installed, and where nothing answers."""
    if address not in (LOCAL, AUTO) and _host_and_port(address) is None:
        raise UserError(f"--ray {address}: expected local, auto, HOST:PORT or ray://HOST:PORT")
    import_ray()
    told = _running_address() if address == AUTO else address
    if told is not None and told != LOCAL:
        _check_answers(address, told)


def connect(address: str, *, at_once: int) -> Connection:
    """A local Ray gets `at_once` CPUs, and as many judgements with Docker at a time. Raises UserError, also where Ray
    would wait for minutes."""
    check_address(address)
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    ray = import_ray()
    _keep_standard_output(ray)
    on_sigterm = signal.getsignal(signal.SIGTERM)
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.CRITICAL}
    if address == LOCAL:
        store = min(_STORE_BYTES, psutil.virtual_memory().total // 8)
        options |= {"num_cpus": at_once, "resources": {DOCKER: at_once}, "object_store_memory": store}
        options |= {"include_dashboard": False}
    for tries_left in (2, 1, 0) if address == LOCAL else (0,):  # its daemons may come too late on a busy machine
        try:
            ray.init(address=address, **options)
            break
        except (Exception, SystemExit) as error:
            ray.shutdown()
            _restore(on_sigterm)
            if not tries_left:
                raise UserError(
                    f"--ray {address}: Ray does not connect ({one_line(error)}){_about_token(address)}"
                ) from None
    return Connection(address, ray, on_sigterm)


def _restore(on_sigterm: Any) -> None:
    """Only the main thread may, and only there Ray sets its own. None is a handler that is not Python's."""
    if on_sigterm is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_sigterm)


def _about_token(address: str) -> str:
    """A cluster that asks for a token only does not answer those that have not been told to show theirs."""
    if address == LOCAL or os.environ.get("RAY_AUTH_MODE") == "token":
        return ""
    return "; where the cluster has a token, set RAY_AUTH_MODE=token and keep it in ~/.ray/auth_token"


def import_ray() -> Any:
    """Raises MissingExtra."""
    try:
        return importlib.import_module("ray")
    except ImportError:
        raise MissingExtra("ray", "ray", "--ray") from None


def _keep_standard_output(ray: Any) -> None:
    """Ray prints what its daemons complain of to our standard output, where results go: what is wrong with the
    cluster, judgements find out, and notes say."""
    worker: Any = importlib.import_module(f"{ray.__name__}._private.worker")
    if hasattr(worker, "print_to_stdstream"):
        worker.print_to_stdstream = lambda *_, **__: None


def _host_and_port(address: str) -> tuple[str, int] | None:
    found = re.fullmatch(r"(?:ray://)?\[?([A-Za-z0-9_.:-]+?)\]?:(\d{1,5})", address)
    return (found[1], int(found[2])) if found and int(found[2]) < 1 << 16 else None


def _running_address() -> str | None:
    """Where `auto` leads: the variable that Ray reads, or what `ray start` left on this machine."""
    given = os.environ.get("RAY_ADDRESS")
    if given:
        return given
    folder = Path(os.environ.get("RAY_TMPDIR") or "/tmp")
    with suppress(OSError):
        return (folder / "ray" / "ray_current_cluster").read_text().strip() or None
    return None


def _check_answers(address: str, told: str) -> None:
    """Ray waits for minutes for an address where nothing is, or something else."""
    place = _host_and_port(told)
    if place is None:
        return
    try:
        with socket.create_connection(place, timeout=_ANSWER_S) as line:
            if os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):
                return  # it says nothing to whoever shows no certificate
            line.sendall(_HELLO)
            line.settimeout(_ANSWER_S)
            answer = line.recv(9)
    except TimeoutError:
        answer = b""
    except OSError as error:
        raise UserError(
            f"--ray {address}: nothing answers at {told} ({error.strerror or error}): is Ray started?"
        ) from None
    if answer[3:4] != b"\4":  # settings are what a server of gRPC says first
        raise UserError(f"--ray {address}: what answers at {told} is no Ray")
