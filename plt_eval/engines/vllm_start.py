"""Starting and ending vLLM in this process, quietly, and saying in one line why it does not start.

check_installed(notify)                    # UserError where it is missing
llm = start(model="models/tiny-r2/model", max_model_len=-1, ...)      # vllm.LLM's own options
end(llm)
del llm
give_memory_back()

vLLM reads its environment once, when it is imported; what a user has set there stays as it is.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from importlib import metadata
from typing import Any

import psutil
import torch

from plt_eval.errors import UserError, one_line

TESTED = "0.32"
"""The minor version of vLLM that the tests run."""

ENVIRONMENT = {
    # Errors come to us as exceptions, and nothing has to be sent between processes.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    # What is evaluated here is nobody else's business.
    "VLLM_NO_USAGE_STATS": "1",
}
"""What is set where the user has not."""

LOUD = "VLLM_LOGGING_LEVEL" in os.environ
"""Whether the user wants to hear what vLLM says."""

CPU_KV_BYTES = 4 << 30
"""On a CPU the KV cache takes half of the free memory, and at most this: vLLM's own share there is nearly all memory of
the machine, whoever uses it."""

_CAUSES = (
    (
        r"out of memory|OutOfMemory|can't allocate memory",
        "memory ran out",
        "a smaller --gpu-memory-utilization or --dtype",
    ),
    (
        r"Free memory on device|Available memory on node",
        "not enough memory is free",
        "a smaller --gpu-memory-utilization",
    ),
    (
        r"No available memory for the cache blocks|Cannot auto-fit|larger than the available KV cache memory",
        "no room for the KV cache",
        "a larger --gpu-memory-utilization (on a CPU also VLLM_CPU_KVCACHE_SPACE, in GiB) or a smaller --max-model-len",
    ),
    (r"User-specified max_model_len", "the model's context is shorter", "a smaller --max-model-len"),
    (
        r"attention heads.*divisible by tensor parallel|tensor.parallel.*divi|World size|number of GPUs|Ray.*GPU",
        "the model or this machine cannot be split so",
        "another --tensor-parallel",
    ),
    (r"dtype .* not supported|[Bb]float16 is only supported", "no such numbers here", "another --dtype"),
)
"""What vLLM says -> what it means, and what to change."""


def check_installed(notify: Callable[[str], None]) -> None:
    """Raises UserError where there is no vLLM; `notify` hears of one that the tests do not run."""
    if importlib.util.find_spec("vllm") is None:
        raise UserError(
            "--engine vllm needs vLLM: pip install 'plt-eval[vllm]' "
            "(without a GPU: bash scripts/make_vllm_env.sh FOLDER)"
        )
    version = installed_version()
    if version is not None and not re.match(re.escape(TESTED) + r"(\.|$)", version):
        notify(f"vLLM {version} is installed; --engine vllm is tested with {TESTED}")


def installed_version() -> str | None:
    """vLLM's version, without importing it; its builds have different names."""
    for name in ("vllm", "vllm-cpu"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            return metadata.version(name)
    return None


def computes_on() -> torch.device:
    """The device that vLLM's build uses."""
    with contextlib.suppress(metadata.PackageNotFoundError):
        if "cpu" not in metadata.version("vllm") and torch.cuda.is_available():
            return torch.device("cuda")
    return torch.device("cpu")


def start(*, is_plt: bool, **options: Any) -> Any:
    """vllm.LLM with these options. Raises UserError where it does not start."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    for name in ("vllm", "plt_model.vllm"):  # they speak while they are imported, too
        logging.getLogger(name).setLevel(os.environ["VLLM_LOGGING_LEVEL"])
    with _nothing_printed(loud=LOUD):
        try:
            from vllm import LLM

            if is_plt:
                from plt_model.vllm import register

                register()
            return LLM(skip_tokenizer_init=True, generation_config="vllm", use_tqdm_on_load=False, **options)
        except (Exception, SystemExit) as error:
            raise refusal(error) from error


def end(llm: Any) -> None:
    """Stop it and its workers. Its memory is given back when nobody holds it any more: see give_memory_back."""
    llm.llm_engine.engine_core.shutdown()


def give_memory_back() -> None:
    """What an ended vLLM, held by nobody, has left: its memory, and its part in torch.distributed."""
    from vllm.distributed import cleanup_dist_env_and_memory

    cleanup_dist_env_and_memory()


@contextlib.contextmanager
def threads_kept() -> Iterator[None]:
    """vLLM sets how many threads torch has in this process, and on a CPU takes the function away that sets it."""
    set_threads, count = torch.set_num_threads, torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads = set_threads
        torch.set_num_threads(count)


def cpu_kv_bytes(ranks: int = 1, most: int = CPU_KV_BYTES) -> int | None:
    """The KV cache's size on a CPU, for each of the ranks; None where the user's environment says it."""
    if os.environ.get("VLLM_CPU_KVCACHE_SPACE"):
        return None
    return min(most, psutil.virtual_memory().available // 2) // ranks


def refusal(error: BaseException) -> UserError:
    """What vLLM says, in one line, with the option to change where one helps."""
    said = re.sub(r"^\d+ validation errors? for \w+ ", "", one_line(error))
    said = re.sub(r"^Value error, | \[type=value_error.*", "", said).strip()
    whole = one_line(error, limit=None) + type(error).__name__
    for pattern, meaning, instead in _CAUSES:
        if re.search(pattern, whole):
            return UserError(f"--engine vllm: {meaning}; try {instead}. vLLM says: {said}")
    return UserError(f"--engine vllm: vLLM does not start (VLLM_LOGGING_LEVEL=INFO shows more): {said}")


@contextlib.contextmanager
def _nothing_printed(*, loud: bool) -> Iterator[None]:
    """Libraries below vLLM print, and its worker processes; stdout belongs to our table or JSON. What is printed there
    goes to stderr when `loud`, else nowhere, as what they print to stderr. sys.stderr stays ours meanwhile."""
    sys.stdout.flush()
    kept, ours = (os.dup(1), os.dup(2)), sys.stderr
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1)  # vLLM's log handlers keep it: it is never closed
    with open(os.devnull, "w") as nowhere:
        os.dup2(2 if loud else nowhere.fileno(), 1)
        os.dup2(2 if loud else nowhere.fileno(), 2)
    try:
        with warnings.catch_warnings():
            if not loud:
                warnings.simplefilter("ignore")
            yield
    finally:
        sys.stdout.flush()
        sys.stderr = ours
        for own, copy in zip((1, 2), kept, strict=True):
            os.dup2(copy, own)
            os.close(copy)
