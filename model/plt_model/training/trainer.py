"""transformers' Trainer, with what an experiment over loop counts needs of it.

- Batches in the data set's own order, which no setting shuffles.
- Checkpoints that are whole or absent (plt_model.training.checkpoints), in one format for any number of processes:
  weights as float32 safetensors that load as a model, the optimizer's state by parameter name.
- A loss or a gradient that is not finite ends the run before it touches the weights.
- Every logged step in `metrics.jsonl`, which a resumed run continues without a gap or a repetition.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint.state_dict_loader as loader
import torch.distributed.checkpoint.state_dict_saver as saver
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.utils.data import Dataset, Sampler, SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments

from plt_model.loading import weight_files
from plt_model.training import checkpoints
from plt_model.training.optimizers import make_optimizer
from plt_model.training.recipe import Optimizer, Schedule

METRICS = "metrics.jsonl"
OPTIMIZER = "optimizer"


class TrainingError(ValueError):
    """Training cannot go on; the message is one line for the user."""


class PLTTrainer(Trainer):
    """`describe(i)` names example i of the data; the other arguments after `schedule` are what an earlier run left."""

    def __init__(
        self,
        *,
        model: nn.Module,
        args: TrainingArguments,
        data: Dataset[dict[str, Tensor]],
        collate: Callable[[Sequence[dict[str, Tensor]]], dict[str, Tensor]],
        describe: Callable[[int], str],
        optimizer: Optimizer,
        schedule: Schedule,
        flops_per_token: float | None = None,
        started_at: float = 0.0,
        tokens_done: int = 0,
        unlogged: tuple[float, int] = (0.0, 0),
    ) -> None:
        super().__init__(model=model, args=args, train_dataset=data, data_collator=collate)
        self.describe, self.flops_per_token = describe, flops_per_token
        self.settings, self.schedule = optimizer, schedule
        self.out = Path(args.output_dir)
        self._indices: list[int] = []
        self._indices_step = -1
        self._tokens, self._new_tokens = tokens_done, 0
        self._seconds_before = started_at
        self._began: float | None = None
        self._step_began = 0.0
        self._paced_at = 0
        self.optimizer: Any
        self.lr_scheduler: Any
        self._unlogged = unlogged
        self.add_callback(_WholeLog(self))

    # --- order, schedule ------------------------------------------------------------------------------

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return SequentialSampler(train_dataset if train_dataset is not None else self.train_dataset)

    def create_optimizer(self, model: nn.Module | None = None) -> Any:
        if self.optimizer is None:
            target = self.model if model is None else model
            self.optimizer = make_optimizer(target, self.settings, self.get_decay_parameter_names(target))
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        if self.lr_scheduler is None:
            factor = self.schedule.factor
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                self.optimizer if optimizer is None else optimizer, lambda step: factor(step, num_training_steps)
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    # --- one step -------------------------------------------------------------------------------------

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        if self._began is None:
            self._began = self._step_began = time.monotonic()
            self._paced_at = self.state.global_step
        if self._indices_step != self.state.global_step:
            self._indices, self._indices_step = [], self.state.global_step
        self._indices += inputs.pop("index").tolist()
        mask = inputs.get("attention_mask")
        self._new_tokens += int(inputs["input_ids"].numel() if mask is None else mask.sum())
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        if not torch.isfinite(loss):
            raise TrainingError(self._not_finite("the loss", float(loss)))
        return loss

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        norm = super()._clip_grad_norm(model)
        if not torch.isfinite(torch.as_tensor(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)):
            # Every process sees the same norm, and none knows whose share of the batch it came from.
            batch = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
            first = self._indices_step * batch
            raise TrainingError(self._not_finite("the gradient's norm", float(norm), range(first, first + batch)))
        return norm

    def _not_finite(self, what: str, found: float, examples: Sequence[int] | None = None) -> str:
        indices = self._indices if examples is None else examples
        good = checkpoints.last_good(self.out, lambda _: None)
        back = "there is no checkpoint yet" if good is None else f"the last good checkpoint is {good[1]}"
        batch = ", ".join(self.describe(i) for i in indices[:16])
        more = f" and {len(indices) - 16} more" if len(indices) > 16 else ""
        return f"{what} is {found} at step {self._indices_step + 1}, on {batch}{more}; {back}"

    def _refuse_not_finite(self) -> None:
        """What a step left that is not finite must not get into a checkpoint."""
        moments = ((key, value) for state in self._raw_optimizer().state.values() for key, value in state.items())
        for name, value in (*self.model.named_parameters(), *moments):
            local = value.to_local() if hasattr(value, "to_local") else value
            if isinstance(local, Tensor) and not torch.isfinite(local).all():
                wrong = local.detach()[~torch.isfinite(local)][0]
                raise TrainingError(self._not_finite(f"after the step, {name}", float(wrong)))

    # --- logging --------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """One line of metrics.jsonl for every logged step, then transformers' own reporters."""
        if "loss" in logs:
            logs = {**logs, **self._pace()}
        super().log(logs, start_time)
        self.state.log_history.clear()  # it is in the file; kept here, every checkpoint would hold all of it
        if "loss" in logs and self.is_world_process_zero():
            row = {"step": self.state.global_step, **logs}
            with (self.out / METRICS).open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(row) + "\n")

    def _pace(self) -> dict[str, float]:
        now = time.monotonic()
        assert self._began is not None
        steps = max(1, self.state.global_step - self._paced_at)
        self._paced_at = self.state.global_step
        took = (now - self._step_began) / steps
        self._step_began = now
        self._count_tokens()
        seconds = self._seconds_before + now - self._began
        rate = self._tokens_a_step() / took
        pace: dict[str, float] = {
            "tokens": self._tokens,
            "seconds": round(seconds, 3),
            "step_seconds": round(took, 6),
            "tokens_per_second": round(rate),
        }
        if self.flops_per_token is not None:
            pace["flops_per_second"] = rate * self.flops_per_token
        return pace

    def _count_tokens(self) -> None:
        """Add what every process has trained on since the last count: with padding, not the same for each."""
        new = torch.tensor(self._new_tokens, device=self.args.device)
        if dist.is_initialized():
            dist.all_reduce(new)
        self._tokens += int(new)
        self._new_tokens = 0

    def _tokens_a_step(self) -> float:
        return float(self._tokens / max(1, self.state.global_step))

    @property
    def tokens_seen(self) -> int:
        """Tokens trained on, over all processes and sessions."""
        return self._tokens

    # --- checkpoints ----------------------------------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:  # noqa: ARG002 (transformers' signature)
        began = time.monotonic()
        self._refuse_not_finite()
        self._count_tokens()
        step = self.state.global_step
        folder = checkpoints.staging(self.out, step)
        if self.is_world_process_zero():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        _barrier()
        self.save_model(str(folder), _internal_call=True)
        self._save_optimizer_and_scheduler(str(folder))
        self._save_scaler(str(folder))
        self._save_rng_state(str(folder))
        if self.is_world_process_zero():
            self.state.save_to_json(str(folder / "trainer_state.json"))
            (folder / "progress.json").write_text(json.dumps(self._progress(began)))
            (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle that nothing here reads
        _barrier()
        if self.is_world_process_zero():
            if (self.out / METRICS).exists():
                checkpoints.sync(self.out / METRICS)
            checkpoints.publish(self.out, step)
            checkpoints.prune(self.out, self.args.save_total_limit or 2)
        _barrier()
        if self._began is not None:  # neither a step's time nor the whole is its checkpoint's
            saving = time.monotonic() - began
            self._began += saving
            self._step_began += saving

    def _progress(self, now: float) -> dict[str, float]:
        """What a resumed run goes on counting from; `unlogged_*` is what the next line of the log has so far."""
        return {
            "tokens": self._tokens,
            "seconds": self._seconds_before + (now - self._began if self._began is not None else 0.0),
            "unlogged_loss": float(self._tr_loss),
            "unlogged_steps": self.state.global_step - self._globalstep_last_logged,
        }

    def restore_unlogged(self) -> None:
        """Take up the line of the log that the run before this one had begun."""
        loss, steps = self._unlogged
        self._tr_loss += loss
        self._globalstep_last_logged -= steps

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """By parameter name, each process its own share: any number of processes reads it back."""
        with _quiet_single_process():
            saver.save(self._optimizer_state(), checkpoint_id=Path(output_dir) / OPTIMIZER)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / "scheduler.pt")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        state = self._optimizer_state()
        with _quiet_single_process():
            loader.load(state, checkpoint_id=Path(checkpoint) / OPTIMIZER)
        set_optimizer_state_dict(self.model, self._raw_optimizer(), state["optimizer"])
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / "scheduler.pt", weights_only=True))

    def _optimizer_state(self) -> dict[str, Any]:
        return {"optimizer": get_optimizer_state_dict(self.model, self._raw_optimizer())}

    def _raw_optimizer(self) -> torch.optim.Optimizer:
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        assert isinstance(optimizer, torch.optim.Optimizer)
        return optimizer

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """The weights, into a model that is sharded or not."""
        target = self.model if model is None else model
        weights: dict[str, Any] = {}
        if self.is_world_process_zero() or not self.is_fsdp_enabled:
            for file in weight_files(Path(resume_from_checkpoint)):
                weights.update(load_file(file))
        if self.is_fsdp_enabled:
            options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
            set_model_state_dict(target, weights, options=options)
        else:
            target.load_state_dict(weights)


class _WholeLog(TrainerCallback):
    """Every step is in some line of the log: those before a stop, and those after the last full line."""

    def __init__(self, trainer: PLTTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        self._trainer.restore_unlogged()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:  # noqa: ARG002
        control.should_log = control.should_log or state.global_step >= state.max_steps
        return control


def resume_metrics(out: Path, step: int) -> None:
    """Drop what metrics.jsonl says of steps after `step`: they are about to be trained again."""
    path = out / METRICS
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            break  # the line that a kill cut
        if row["step"] <= step:
            kept.append(line + "\n")
    partial = path.with_suffix(".partial")
    partial.write_text("".join(kept), encoding="utf-8")
    checkpoints.sync(partial)
    partial.replace(path)


def read_metrics(out: Path) -> list[dict[str, float]]:
    """The logged steps of a training folder, in order."""
    path = out / METRICS
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


class _quiet_single_process(warnings.catch_warnings):
    """Without the remark that one process saves as one process."""

    def __enter__(self) -> Any:
        value = super().__enter__()
        warnings.filterwarnings("ignore", message=".*torch.distributed is.*uninitialized.*")
        logging.getLogger("torch.distributed.checkpoint").setLevel(logging.ERROR)
        return value
