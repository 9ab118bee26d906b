"""`plt-eval serve`: which server, with what; started, told of when ready, ended with us."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import FrameType

from plt_eval.errors import MissingExtra, UserError
from plt_eval.models import ResolvedModel, resolve_model
from plt_eval.serving.asgi import LOOPS_VARIABLE
from plt_eval.serving.child import Child
from plt_eval.serving.settings import KEY_VARIABLE, Settings

GRACE_S = {"vllm": 20.0, "transformers": 5.0}
"""Seconds that a server gets to end by itself: vLLM has processes and a GPU to leave in order."""

LAUNCHERS = {
    "vllm": {
        "--model": "--model",
        "--host": "--host",
        "--port": "--port",
        "--served-model-name": "--served-model-name",
        "--dtype": "--dtype",
        "--tokenizer": "--tokenizer",
        "--chat-template": "--chat-template",
        "--tensor-parallel-size": "--tensor-parallel",
        "-tp": "--tensor-parallel",
        "--max-model-len": "--max-model-len",
        "--api-key": "--api-key-env",
    },
    "transformers": {"--host": "--host", "--port": "--port", "--dtype": "--dtype", "--device": "--device"},
}
"""Options of the servers that have one of ours in their place."""

KEY_VARIABLES = {"vllm": "VLLM_API_KEY", "transformers": KEY_VARIABLE}
"""Where the servers look for the key that they ask of clients."""

_TLS = "the server is asked over HTTP here; a proxy before it can speak TLS"
_SSL = ("--ssl-keyfile", "--ssl-certfile", "--ssl-ca-certs", "--ssl-cert-reqs", "--ssl-ciphers", "--enable-ssl-refresh")
_OURS = (
    *("--continuous-batching", "--compile", "--quantization", "--attn-implementation", "--trust-remote-code"),
    *("--model-timeout", "--default-seed", "--reasoning", "--chat-template-kwargs", "--decision-config"),
    *("--enable-cors", "--cb-block-size", "--cb-num-blocks", "--cb-max-batch-tokens", "--cb-max-memory-percent"),
    "--cb-use-cuda-graph",
)
REFUSED = {
    "vllm": {
        **dict.fromkeys(_SSL, _TLS),
        "--uds": "the server listens at --host and --port here",
        "--headless": "without an address the server could not be asked",
        "--config": "give what is in the file as options, here or before --",
        "--hf-config-path": "the configuration is that in --model; what shall differ goes into --hf-overrides",
    },
    "transformers": dict.fromkeys(_OURS, "has no effect, as requests are read and decoded by our own engine"),
}
"""Options of the servers that have no place here, and why."""


@dataclass(frozen=True)
class ServeOptions:
    """The options of `plt-eval serve`, by name. None means: not given."""

    model: str
    loops: int | None = None
    engine: str = "auto"
    host: str = "127.0.0.1"
    port: int = 8000
    dtype: str = "auto"
    device: str | None = None
    tokenizer: str | None = None
    chat_template: Path | None = None
    served_model_name: str | None = None
    api_key_env: str | None = None
    tensor_parallel: int | None = None
    max_model_len: int | None = None
    rest: tuple[str, ...] = ()


PLT = "iquestpltcoder"
"""A PLT's model_type. (That of PLTConfig, whose import takes seconds.)"""


class Stopped(Exception):
    """SIGINT or SIGTERM came: which."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


@dataclass(frozen=True)
class Launch:
    """A server that can be started: its command line, what its environment has besides ours or without it (None),
    where it will be, and how many loops it tells (None: it does not)."""

    engine: str
    command: tuple[str, ...]
    environment: Mapping[str, str | None]
    host: str
    port: int
    loops: int | None = None

    @property
    def endpoint(self) -> str:
        """The address for a client on this machine."""
        here = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"http://{f'[{here}]' if ':' in here else here}:{self.port}"


def serve(options: ServeOptions) -> None:
    """Serve until a signal comes. Raises UserError, ServerDied, and Stopped once all has ended."""
    with stop_signals():
        resolved = resolve_model(options.model, options.loops)
        engine = choose_engine(options.engine)
        _check(options, engine)
        key = _key(options.api_key_env)
        with tempfile.TemporaryDirectory(prefix="plt-eval-serve-") as folder:
            launch = plan(options, resolved, engine, key, Path(folder))
            if key is None and options.host not in ("127.0.0.1", "localhost", "::1"):
                _say(f"--host {options.host}: whoever reaches this machine may ask; --api-key-env NAME asks for a key")
            with Child(launch.command, launch.environment, grace_s=GRACE_S[engine]) as child:
                # Another server may have taken the port meanwhile: its answer is not ours.
                child.wait_until(lambda: answers(launch.endpoint) and child.listens(launch.port))
                print(_ready(options, resolved, launch), flush=True)
                child.wait()


def choose_engine(wanted: str) -> str:
    """ "vllm" or "transformers". Raises UserError for one that is not installed."""
    if wanted == "vllm" or (wanted == "auto" and _installed("vllm")):
        if not _installed("vllm"):
            raise MissingExtra("vllm", "vllm", "--engine vllm")
        return "vllm"
    for package in ("fastapi", "uvicorn", "openai"):
        if not _installed(package):
            raise MissingExtra(package, "serve", "--engine transformers")
    return "transformers"


def _installed(package: str) -> bool:
    found = find_spec(package)
    return found is not None and found.origin is not None  # a folder of that name is none


def plan(options: ServeOptions, resolved: ResolvedModel, engine: str, key: str | None, folder: Path) -> Launch:
    """How to start the server. `folder` takes what it reads besides the model. Raises UserError."""
    port, loops = free_port(options.host, options.port), _loops(options, resolved)
    make = _vllm_module if engine == "vllm" else _transformers_module
    module = [*make(options, resolved, folder), "--host", options.host, "--port", str(port)]
    if engine == "vllm" and loops is not None:  # the other server is ours, and adds it by itself
        module += ["--middleware", "plt_eval.serving.asgi.LoopsTold"]
    module += options.rest
    environment = {  # a key of the user's own shell was not asked for
        KEY_VARIABLES[engine]: key,
        LOOPS_VARIABLE: None if loops is None else str(loops),
    }
    return Launch(engine, (sys.executable, "-P", "-m", *module), environment, options.host, port, loops)


def _transformers_module(options: ServeOptions, resolved: ResolvedModel, _: Path) -> list[str]:
    """What is wrong with the model its process finds out: two that import torch would take twice the time."""
    settings = Settings(
        model=str(resolved.folder),
        name=options.served_model_name or resolved.label,
        loops=resolved.loops,
        dtype=options.dtype,
        device=options.device or "auto",
        tokenizer=options.tokenizer,
        chat_template=options.chat_template.read_text(encoding="utf-8") if options.chat_template else None,
        max_model_len=options.max_model_len,
    )
    return ["plt_eval.serving.transformers_server", settings.json(), "--log-level", "error"]


def _vllm_module(options: ServeOptions, resolved: ResolvedModel, folder: Path) -> list[str]:
    """Its module, not `vllm serve`: that wants a distribution of this name, and the CPU build has another."""
    from plt_eval.engines.checkpoint import Checkpoint, pick_dtype
    from plt_eval.engines.vllm_start import check_installed, computes_on, cpu_kv_bytes
    from plt_model.loading import CheckpointError, check_fit, config_values, read_config

    check_installed(_say)
    model, device = resolved.folder, computes_on()
    is_plt = Checkpoint(str(model), label=None, loops=resolved.loops, loop_mode=None).is_plt
    try:
        if is_plt:
            check_fit(model, read_config(model))
        vocabulary = config_values(model).get("vocab_size")
    except CheckpointError as broken:
        raise UserError(f"--model {broken}") from broken
    given = {
        "--model": str(model),
        "--served-model-name": options.served_model_name or resolved.label,
        "--dtype": str(pick_dtype(options.dtype, model, device, _say)).removeprefix("torch."),
        "--hf-overrides": json.dumps({"plt_num_loops": resolved.loops}) if is_plt and resolved.loops else None,
        "--generation-config": "vllm",  # a request's own settings alone, as our engines have it
        "--tokenizer": _tokenizer_folder(options.tokenizer, vocabulary, folder),
        "--chat-template": options.chat_template,
        "--tensor-parallel-size": options.tensor_parallel,
        "--max-model-len": options.max_model_len or "auto",
        "--kv-cache-memory-bytes": cpu_kv_bytes(options.tensor_parallel or 1) if device.type == "cpu" else None,
    }
    flags = [str(part) for pair in given.items() if pair[1] is not None for part in pair]
    return ["vllm.entrypoints.launchers.api_server.entry", *flags]


def _loops(options: ServeOptions, resolved: ResolvedModel) -> int | None:
    """How many loops will run, where that is known: None for what is no PLT, where the user has vLLM change the
    configuration, and where neither --loops nor config.json says it."""
    if _is_given("--hf-overrides", options):
        return None
    try:
        told = json.loads((resolved.folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(told, dict) or told.get("model_type") != PLT:
        return None
    own = told.get("plt_num_loops")
    return resolved.loops or (own if isinstance(own, int) else None)


def free_port(host: str, port: int) -> int:
    """`port`, or for 0 one that is free. Raises UserError for a port or host that cannot be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as it:
            it.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            it.bind(address)
            return int(it.getsockname()[1])
    except OSError as error:
        raise UserError(f"--host {host} --port {port}: {error.strerror or error}; --port 0 picks a free one") from error


def answers(endpoint: str) -> bool:
    """Whether a server is up there."""
    import httpx

    try:
        return httpx.get(f"{endpoint}/health", timeout=2.0, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


# --- checks ---------------------------------------------------------------------------------------------


def _check(options: ServeOptions, engine: str) -> None:
    """Raises UserError for options that have no effect with this engine or contradict each other."""
    if engine == "vllm" and options.device is not None:
        raise UserError("--device has no effect with --engine vllm: vLLM computes on what it was built for")
    if engine == "transformers" and options.tensor_parallel is not None:
        raise UserError("--tensor-parallel has no effect with --engine transformers: it belongs to --engine vllm")
    if options.chat_template is not None:
        _check_template(options.chat_template)
    name = options.served_model_name
    if name is not None and (not name.strip() or name.startswith("-")):
        raise UserError(f"--served-model-name {name!r}: expected a name")
    for theirs, ours in LAUNCHERS[engine].items():
        if _is_given(theirs, options):
            raise UserError(f"{theirs} after --: give it before, as {ours}")
    if engine == "vllm" and _is_given("--hf-overrides", options) and options.loops is not None:
        raise UserError("--hf-overrides after -- would undo --loops: leave --loops out and put plt_num_loops into it")
    for theirs, why in REFUSED[engine].items():
        if _is_given(theirs, options):
            raise UserError(f"{theirs} after --: {why}")


def _is_given(name: str, options: ServeOptions) -> bool:
    """Whether a server's option is among those after --. vLLM takes --max_model_len, too, --hf-overrides.KEY VALUE, and
    beginnings of names."""
    for word in options.rest:
        given = re.split(r"[=.]", word)[0].replace("_", "-")
        if given == name or (len(given) > len("--hf-") and name.startswith(given)):
            return True
    return False


def _check_template(path: Path) -> None:
    if not path.is_file():
        raise UserError(f"--chat-template {path}: no such file; expected a Jinja template")
    try:
        path.read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        raise UserError(f"--chat-template {path}: {error}; expected a Jinja template in UTF-8") from error


def _key(variable: str | None) -> str | None:
    """Raises UserError where the variable holds none."""
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise UserError(f"--api-key-env {variable}: that environment variable is not set")
    return key


def _tokenizer_folder(wanted: str | None, vocabulary: int | None, folder: Path) -> str | None:
    """A tokenizer as vLLM can load it: "bytes" is written to `folder`."""
    if wanted != "bytes":
        return wanted
    from plt_model.tokenizer import byte_tokenizer

    byte_tokenizer(vocabulary).save_pretrained(folder)
    return str(folder)


# --- words ----------------------------------------------------------------------------------------------


def _ready(options: ServeOptions, resolved: ResolvedModel, launch: Launch) -> str:
    name = options.served_model_name or resolved.label
    endpoint = f"{launch.endpoint}/v1"
    words = ["plt-eval", "run", "--engine", "openai", "--endpoint", endpoint, "--api-model", name]
    if not _has_template(options, resolved.folder):
        words += ["--api", "completions"]
    if options.api_key_env is not None:
        words += ["--api-key-env", options.api_key_env]
    if launch.loops is not None:
        words += ["--model", options.model, "--loops", str(launch.loops)]
    return f"{name} is served at {endpoint} ({launch.engine}); ask it: {shlex.join(words)} --suite SUITE"


def _has_template(options: ServeOptions, folder: Path) -> bool:
    if options.chat_template is not None:
        return True
    if options.tokenizer == "bytes":
        return False
    where = folder if options.tokenizer is None else Path(options.tokenizer)
    if any((where / name).exists() for name in ("chat_template.jinja", "chat_template.json")):
        return True
    try:
        told = json.loads((where / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(told, dict) and told.get("chat_template") is not None


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


@contextmanager
def stop_signals() -> Iterator[None]:
    """SIGINT and SIGTERM raise Stopped here."""

    def stop(number: int, _frame: FrameType | None) -> None:
        raise Stopped(number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
