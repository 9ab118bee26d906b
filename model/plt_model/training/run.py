"""Train a model from a recipe, or go on where a killed run stopped.

    result = train(load_recipe("quick"), loops=2, data=Path("data"), out=Path("models/quick-r2"))
    result.model                                  # a checkpoint folder with its tokenizer

`out` holds `run.json` (what was asked for), `metrics.jsonl` (a line a logged step), the last checkpoints, and finally
`model/` and `result.json`. The same call continues it, bitwise as if it had never stopped (on a CPU, with the same
number of threads and processes), and returns at once when it is complete. Under `torchrun` or `accelerate launch` all
processes make the same call; with `fsdp` the model is sharded over them (FSDP2).
"""

from __future__ import annotations

import gc
import importlib.metadata
import importlib.util
import json
import os
import resource
import shutil
import signal
import statistics
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, TypeVar

import filelock
import torch
import torch.distributed as dist
import transformers
from pydantic import BaseModel, ConfigDict, ValidationError
from rich.console import Console
from torch import Tensor
from torch.utils.data import Dataset
from transformers import AutoTokenizer, PrinterCallback, TrainerCallback, TrainingArguments
from transformers.utils import logging as transformers_logging

from plt_model.configuration_plt import PLTConfig
from plt_model.modeling_plt import PLTForCausalLM
from plt_model.tokenizer import byte_tokenizer
from plt_model.training import checkpoints
from plt_model.training.flops import training_flops
from plt_model.training.packing import Ingredient, WindowDataset
from plt_model.training.progress import RichProgress
from plt_model.training.recipe import BYTES, Common, Optimizer, Recipe, TuningRecipe
from plt_model.training.shards import TokenData
from plt_model.training.trainer import METRICS, PLTTrainer, TrainingError, read_metrics, resume_metrics

REQUEST, RESULT, MODEL = "run.json", "result.json", "model"
PARTIAL_REQUEST = REQUEST + ".partial"
"""There for an instant while the first process claims the folder and the others look."""
LOCK = ".lock"
SHARED_WAIT_S = 90.0
"""How long another machine's file may take to appear: longer than NFS remembers that it was not there."""
REPORTERS = ("trackio", "wandb", "tensorboard")
Batch = dict[str, Tensor]


class TrainResult(BaseModel):
    """What a finished training left. Losses in nats per token, memory in bytes."""

    model_config = ConfigDict(frozen=True)

    model: Path
    """The final checkpoint folder, tokenizer inside."""
    loops: int
    seed: int
    parameters: int
    steps: int
    tokens: int
    loss: float
    """Mean over the last 50 logged steps."""
    seconds: float
    """Of all sessions, without loading and saving."""
    step_seconds: float
    """Median over the logged steps."""
    tokens_per_second: float
    peak_memory_bytes: int
    """Of the first process, in the last session: on a GPU what torch allocated, on a CPU its resident memory."""
    device: str
    torch_version: str
    transformers_version: str
    version: str | None = None
    """Of this package."""
    started: datetime | None = None
    ended: datetime | None = None
    """Of the last session."""


@dataclass
class Job:
    """One training, of either kind: what the two share below."""

    recipe: Common
    model: PLTForCausalLM
    tokenizer: Any
    data: Dataset[Batch]
    describe: Callable[[int], str]
    collate: Callable[[Sequence[Batch]], Batch]
    steps: int
    batch: int
    length: int
    """Tokens a sequence, at most."""
    request: dict[str, Any]


@dataclass(frozen=True)
class Engine:
    """How to train, as far as it does not decide what comes out."""

    report_to: tuple[str, ...] = ()
    fsdp: bool = False
    device: Literal["auto", "cpu", "cuda"] = "auto"
    console: Console | None = None


def train(
    recipe: Recipe,
    *,
    loops: int,
    data: Path,
    out: Path,
    seed: int | None = None,
    console: Console | None = None,
    report_to: Sequence[str] = (),
    fsdp: bool = False,
    device: Literal["auto", "cpu", "cuda"] = "auto",
) -> TrainResult:
    """Pre-train at `loops` loops on the token data in `data`/<entry name>/.

    `seed` replaces the recipe's: it decides initial weights and data order, which do not depend on `loops`. Raises
    TrainingError, RecipeError or ShardError, one line each, and KeyboardInterrupt after a stop that left a checkpoint.
    """
    engine = Engine(tuple(report_to), fsdp, device, console)
    recipe = with_seed(recipe, seed)
    check_engine(recipe, engine)
    sources = [TokenData.open(data / entry.name, "train") for entry in recipe.data]
    tokenizer = load_tokenizer(recipe.tokenizer)
    config = recipe.config(loops)
    check_tokenizer(config, tokenizer)
    _check_data({entry.name: source for entry, source in zip(recipe.data, sources, strict=True)}, tokenizer, data)
    request = {
        "kind": "pre-training",
        "loops": loops,
        "recipe": json.loads(recipe.model_dump_json(exclude={"description"})),
        "data": {
            entry.name: [shard.sha256 for shard in source.manifest.splits["train"].shards]
            for entry, source in zip(recipe.data, sources, strict=True)
        },
    }
    done = finished(out, request)
    if done is not None:
        return done
    try:
        windows = WindowDataset(
            [Ingredient(e.name, s, e.weight) for e, s in zip(recipe.data, sources, strict=True)],
            length=recipe.sequence_length,
            size=recipe.steps * recipe.batch,
            seed=recipe.seed,
        )
    except ValueError as short:
        raise TrainingError(f"{data}: {short}") from short
    job = Job(
        recipe=recipe,
        model=initial_model(config, recipe.seed, tokenizer),
        tokenizer=tokenizer,
        data=windows,
        describe=windows.describe,
        collate=_stack,
        steps=recipe.steps,
        batch=recipe.batch,
        length=recipe.sequence_length,
        request=request,
    )
    return run_job(job, out, engine)


_Recipe = TypeVar("_Recipe", bound=Common)


def with_seed(recipe: _Recipe, seed: int | None) -> _Recipe:
    """The recipe with another seed (None: its own). Raises TrainingError for a seed that it cannot have."""
    if seed is None:
        return recipe
    if not 0 <= seed < 2**32:
        raise TrainingError(f"--seed {seed}: expected a number from 0 to {2**32 - 1}")
    return recipe.model_copy(update={"seed": seed})


def initial_model(config: PLTConfig, seed: int, tokenizer: Any = None) -> PLTForCausalLM:
    """Fresh float32 weights: bitwise the same for the same seed, whatever the loop count."""
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if tokenizer is not None and getattr(tokenizer, name) is not None:
            setattr(config, name, getattr(tokenizer, name))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = PLTForCausalLM(config)
    model.float()
    return model


def load_tokenizer(name: str) -> Any:
    """ "bytes", or a folder with a Hugging Face tokenizer. Raises TrainingError."""
    if name == BYTES:
        return byte_tokenizer()
    if not Path(name).is_dir():
        raise TrainingError(f'tokenizer {name}: no such folder; expected a folder with a tokenizer, or "bytes"')
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise TrainingError(f"tokenizer {name}: cannot be loaded ({' '.join(str(error).split())[:200]})") from error


def run_job(job: Job, out: Path, engine: Engine) -> TrainResult:
    """Train to the end from the newest whole checkpoint, and leave the model and the result in `out`."""
    with _held(out, main=os.environ.get("RANK", "0") == "0"):
        return _run_job(job, out, engine)


def _run_job(job: Job, out: Path, engine: Engine) -> TrainResult:
    started = datetime.now(UTC)
    console = engine.console or Console(stderr=True, highlight=False)
    warn = warner(console)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    model = job.model
    _freeze_unused(model)
    arguments = _arguments(job, out, engine)
    if arguments.process_index == 0:
        _claim(out, job.request)
    resume = _newest_checkpoint(out, arguments, warn)
    before = _resume(out, resume, main=arguments.process_index == 0)
    _reset_peak_memory()
    flops = training_flops(model.config, job.length) if arguments.device.type == "cuda" else None
    trainer = PLTTrainer(
        model=model,
        args=arguments,
        data=job.data,
        collate=job.collate,
        describe=job.describe,
        optimizer=job.recipe.optimizer,
        schedule=job.recipe.schedule,
        flops_per_token=flops,
        started_at=before.get("seconds", 0.0),
        tokens_done=int(before.get("tokens", 0)),
        unlogged=(before.get("unlogged_loss", 0.0), int(before.get("unlogged_steps", 0))),
    )
    trainer.remove_callback(PrinterCallback)
    title = f"{job.recipe.name}, {model.config.plt_num_loops} loop{'s' * (model.config.plt_num_loops > 1)}"
    progress = RichProgress(console, title)
    if trainer.is_world_process_zero():
        trainer.add_callback(progress)
    with _graceful_stop(trainer) as stopped, closing(progress), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*optimizer.step.*")
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume[1]))
    if trainer.state.global_step < job.steps:
        where = f"{out / f'checkpoint-{trainer.state.global_step}'}; the same command goes on from there"
        raise KeyboardInterrupt(f"stopped at step {trainer.state.global_step} of {job.steps}, saved {where}")
    result = _finish(job, trainer, out, arguments, started)
    if stopped:  # asked during the last step or checkpoint: what comes after this training must not begin
        raise KeyboardInterrupt(f"{out} is complete")
    return result


@contextmanager
def _held(out: Path, *, main: bool) -> Iterator[None]:
    """Only one training writes a folder at a time; of several processes of one, the first holds it for all."""
    if not main:
        yield
        return
    out.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(out / LOCK, thread_local=False)
    try:
        lock.acquire(timeout=1.0)
    except filelock.Timeout:
        raise TrainingError(f"--out {out}: another process is training there") from None
    try:
        yield
    finally:
        lock.release()


# --- before ---------------------------------------------------------------------------------------------


def check_engine(recipe: Recipe | TuningRecipe, engine: Engine) -> None:
    """What can be said before any data are built. Raises TrainingError."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if engine.fsdp and world == 1:
        raise TrainingError("--fsdp shards over processes: start it with torchrun --nproc-per-node N (found 1 process)")
    if engine.fsdp:
        check_sharding(recipe.optimizer)
    if engine.device == "cuda" and not torch.cuda.is_available():
        raise TrainingError("--device cuda: torch finds no CUDA device here")
    split_batch(recipe.batch, recipe.micro_batch, world)
    for name in engine.report_to:
        if name not in REPORTERS:
            raise TrainingError(f"--report-to {name}: expected one of {', '.join(REPORTERS)}")
        if importlib.util.find_spec(name) is None:
            raise TrainingError(f"--report-to {name}: the package is not installed: pip install {name}")


def check_sharding(optimizer: Optimizer) -> None:
    """Raises TrainingError."""
    if optimizer.kind == "muon":
        raise TrainingError("--fsdp: Muon needs whole matrices; set optimizer.kind to adamw in the recipe")


def _arguments(job: Job, out: Path, engine: Engine) -> TrainingArguments:
    recipe = job.recipe
    world = int(os.environ.get("WORLD_SIZE", "1"))
    micro, accumulate = split_batch(job.batch, recipe.micro_batch, world)
    use_cpu = engine.device == "cpu" or not torch.cuda.is_available()
    arguments = TrainingArguments(
        output_dir=str(out),
        run_name=f"{recipe.name}-r{job.model.config.plt_num_loops}-s{recipe.seed}",
        max_steps=job.steps,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=accumulate,
        learning_rate=recipe.optimizer.lr,
        max_grad_norm=recipe.optimizer.clip,
        bf16=recipe.precision == "bf16",
        logging_steps=recipe.log_every,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=recipe.checkpoint.every,
        save_total_limit=recipe.checkpoint.keep,
        seed=recipe.seed,
        report_to=list(engine.report_to) or "none",
        disable_tqdm=True,
        remove_unused_columns=False,
        use_cpu=use_cpu,
        ddp_backend="gloo" if use_cpu and world > 1 else None,
        ddp_find_unused_parameters=False,
        dataloader_pin_memory=not use_cpu,
        **_checkpointing(recipe, engine),
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # several GPUs in one process would be DataParallel: use torchrun
    return arguments


def _checkpointing(recipe: Common, engine: Engine) -> dict[str, Any]:
    """Sharding, and where activations are computed again."""
    settings: dict[str, Any] = {}
    if recipe.gradient_checkpointing:
        name = "activation_checkpointing" if _takes("activation_checkpointing") else "gradient_checkpointing"
        settings = {name: True, f"{name}_kwargs": {"use_reentrant": False}}
    if engine.fsdp:
        settings["fsdp"] = True if _takes("activation_checkpointing") else "full_shard auto_wrap"
        settings["fsdp_config"] = {
            "version": 2,
            "transformer_layer_cls_to_wrap": ["PLTDecoderLayer"],
            "state_dict_type": "FULL_STATE_DICT",
        }
    return settings


def _takes(argument: str) -> bool:
    return argument in TrainingArguments.__dataclass_fields__


def split_batch(batch: int, micro: int | None, world: int) -> tuple[int, int]:
    """Sequences a device and turn, and turns a step. Raises TrainingError."""
    if batch % world:
        raise TrainingError(f"a batch of {batch} sequences cannot be shared by {world} processes evenly")
    share = batch // world
    micro = share if micro is None else min(micro, share)
    if share % micro:
        raise TrainingError(
            f"micro_batch is {micro}: expected a divisor of the {share} sequences that a process takes a step"
        )
    return micro, share // micro


def check_tokenizer(config: PLTConfig, tokenizer: Any) -> None:
    """Raises TrainingError when the model has no embedding for some of the tokenizer's tokens."""
    if _ids(tokenizer) > config.vocab_size:
        raise TrainingError(
            f"model.vocab_size is {config.vocab_size}: expected at least the tokenizer's {_ids(tokenizer)} tokens"
        )


def _check_data(sources: dict[str, TokenData], tokenizer: Any, data: Path) -> None:
    """Data of another tokenizer would train on noise, and nothing else would tell."""
    expected = _identity(_ids(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id)
    for name, source in sources.items():
        record = source.manifest.tokenizer
        found = _identity(record.vocab_size, record.bos, record.eos)
        if found != expected:
            raise TrainingError(f"{data / name}: made with another tokenizer, of {found}; the recipe's has {expected}")


def _identity(size: int, bos: int | None, eos: int | None) -> str:
    return f"{size} ids (beginning {bos}, end {eos})"


def _ids(tokenizer: Any) -> int:
    return 1 + int(max(tokenizer.get_vocab().values()))


def _freeze_unused(model: PLTForCausalLM) -> None:
    """Parameters that the loop count leaves without a part in the loss: the gates, without later passes to blend."""
    config = model.config
    if config.plt_num_loops > 1 and config.plt_loop_mode == "plt" and config.plt_gswa:
        return
    for name, parameter in model.named_parameters():
        if ".plt_gate." in name:
            parameter.requires_grad_(False)


def finished(out: Path, request: dict[str, Any]) -> TrainResult | None:
    """The stored result of the same request. Raises TrainingError for a folder that holds another training."""
    _check_request(out, request)
    path = out / RESULT
    if not path.exists():
        return None
    if not (out / MODEL / "config.json").is_file():
        return None  # the last checkpoint has it: it is written again
    try:
        result = TrainResult.model_validate_json(path.read_text())
    except ValidationError as error:
        raise TrainingError(
            f"{path}: damaged; delete it to finish again ({' '.join(str(error).split())[:200]})"
        ) from error
    return result.model_copy(update={"model": out / MODEL})


def _check_request(out: Path, request: dict[str, Any]) -> None:
    path = out / REQUEST
    if not path.exists():
        if out.is_dir() and any(path.name not in (REQUEST, PARTIAL_REQUEST, LOCK) for path in out.iterdir()):
            raise TrainingError(f"--out {out}: not empty, and no training is in it: choose a new folder")
        return
    try:
        found = json.loads(path.read_text())
    except ValueError as broken:
        raise TrainingError(f"{path}: damaged: {broken}") from broken
    if found == request:
        return
    differs = _first_difference(found, request)
    raise TrainingError(f"--out {out} holds another training ({differs}): choose a new folder")


def _first_difference(found: Any, wanted: Any, where: str = "") -> str:
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in {**found, **wanted}:
            if found.get(key) != wanted.get(key):
                return _first_difference(found.get(key), wanted.get(key), f"{where}.{key}" if where else key)
    return f"{where} is {_brief(found)} there, {_brief(wanted)} here"


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _claim(out: Path, request: dict[str, Any]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    partial = out / PARTIAL_REQUEST
    partial.write_text(json.dumps(request, indent=1) + "\n")
    partial.replace(out / REQUEST)


def _newest_checkpoint(out: Path, arguments: TrainingArguments, warn: Callable[[str], None]) -> tuple[int, Path] | None:
    """What to go on from. Of several processes the first reads the checkpoints' seals, and tells the others, who have
    to see the same folder. Raises TrainingError in all of them where one does not."""
    found = [checkpoints.last_good(out, warn) if arguments.process_index == 0 else None]
    if not dist.is_initialized():
        return found[0]
    dist.broadcast_object_list(found, device=arguments.device)
    wanted = out / REQUEST if found[0] is None else found[0][1] / checkpoints.SEAL
    seen = [False] * dist.get_world_size()
    dist.all_gather_object(seen, _appears(wanted))
    if not all(seen):
        raise TrainingError(
            f"--out {out}: process {seen.index(False)} does not see {wanted}: expected a folder on a file system that "
            "all machines share"
        )
    return found[0]


def _appears(path: Path) -> bool:
    """Whether a file is there; a network's file system may take a while to show what another machine wrote."""
    until = time.monotonic() + SHARED_WAIT_S
    while not path.exists():
        if time.monotonic() > until:
            return False
        time.sleep(0.2)
    return True


def _resume(out: Path, found: tuple[int, Path] | None, *, main: bool) -> dict[str, float]:
    """What was done before, by the checkpoint that is gone on from."""
    if main:
        resume_metrics(out, 0 if found is None else found[0])
        for step, path in checkpoints.checkpoints(out):
            if found is None or step > found[0]:
                shutil.rmtree(out / f"damaged-{path.name}", ignore_errors=True)
                path.rename(out / f"damaged-{path.name}")
    if found is None:
        return {}
    before: dict[str, float] = json.loads((found[1] / "progress.json").read_text())
    return before


# --- during ---------------------------------------------------------------------------------------------


class _StopAtStepEnd(TrainerCallback):
    """Asked to stop, ends after the step with a checkpoint."""

    def __init__(self) -> None:
        self.asked = False

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:  # noqa: ARG002
        if self.asked:
            control.should_save = control.should_training_stop = True
        return control


@contextmanager
def _graceful_stop(trainer: PLTTrainer) -> Iterator[list[int]]:
    """The first Ctrl-C or SIGTERM stops after the step, with a checkpoint; the second at once."""
    stop, seen = _StopAtStepEnd(), list[int]()
    if threading.current_thread() is not threading.main_thread() or trainer.args.world_size > 1:
        yield seen  # torchrun has its own way to stop its processes
        return
    trainer.add_callback(stop)

    def ask(number: int, _: Any) -> None:
        if seen:
            raise KeyboardInterrupt("stopped at once; the same command goes on from the last checkpoint")
        seen.append(number)
        stop.asked = True

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stack(examples: Sequence[Batch]) -> Batch:
    return {key: torch.stack([example[key] for example in examples]) for key in examples[0]}


def warner(console: Console) -> Callable[[str], None]:
    def warn(message: str) -> None:
        console.print(f"warning: {message}", style="yellow", markup=False, highlight=False, soft_wrap=True)

    return warn


# --- after ----------------------------------------------------------------------------------------------


def _finish(job: Job, trainer: PLTTrainer, out: Path, arguments: TrainingArguments, started: datetime) -> TrainResult:
    rows = read_metrics(out)
    if not rows:
        raise TrainingError(f"{out / METRICS} is missing or empty: it goes with the checkpoints; train in a new folder")
    tail = [row["loss"] for row in rows[-50:]]
    device = torch.cuda.get_device_name() if arguments.device.type == "cuda" else "cpu"
    result = TrainResult(
        model=Path(MODEL),
        loops=job.model.config.plt_num_loops,
        seed=job.recipe.seed,
        parameters=sum(p.numel() for p in job.model.parameters()) if not arguments.fsdp else _count(out, job.steps),
        steps=job.steps,
        tokens=trainer.tokens_seen,
        loss=sum(tail) / len(tail),
        seconds=rows[-1]["seconds"],
        step_seconds=statistics.median(row["step_seconds"] for row in rows),
        tokens_per_second=trainer.tokens_seen / rows[-1]["seconds"],
        peak_memory_bytes=_peak_memory(arguments.device),
        device=device,
        torch_version=torch.__version__,
        transformers_version=transformers.__version__,
        version=_own_version(),
        started=started,
        ended=datetime.now(UTC),
    )
    if arguments.process_index == 0:
        _write_model(job, out)
        partial = out / (RESULT + ".partial")
        partial.write_text(result.model_dump_json(indent=1) + "\n")
        partial.replace(out / RESULT)
    del trainer
    gc.collect()
    return result.model_copy(update={"model": out / MODEL})


def _write_model(job: Job, out: Path) -> None:
    """The final checkpoint's weights in the type to ship, with the tokenizer."""
    partial = out / (MODEL + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    dtype = getattr(torch, job.recipe.save_dtype)
    loaded = PLTForCausalLM.from_pretrained(out / f"checkpoint-{job.steps}", dtype=dtype)
    loaded.save_pretrained(partial)
    job.tokenizer.save_pretrained(partial)
    for path in [*partial.iterdir(), partial]:
        checkpoints.sync(path)
    shutil.rmtree(out / MODEL, ignore_errors=True)
    partial.rename(out / MODEL)


def _count(out: Path, step: int) -> int:
    from plt_model.loading import check_weights

    shapes = check_weights(out / f"checkpoint-{step}").values()
    return sum(int(torch.Size(shape).numel()) for shape in shapes)


def _own_version() -> str | None:
    try:
        return importlib.metadata.version("plt-eval")
    except importlib.metadata.PackageNotFoundError:
        return None


def _reset_peak_memory() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    if sys.platform == "linux":
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            return  # the peak is then of the whole process's life


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


__all__ = [
    "Engine",
    "Job",
    "TrainResult",
    "TrainingError",
    "check_engine",
    "check_sharding",
    "check_tokenizer",
    "finished",
    "initial_model",
    "load_tokenizer",
    "run_job",
    "split_batch",
    "train",
    "warner",
    "with_seed",
]
