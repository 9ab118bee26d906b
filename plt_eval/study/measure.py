"""What is measured on one trained model of a study. Each function can be asked again: what is on disk is only read."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from plt_benchmarks.registry import get_suite
from plt_eval.engines.hf import HFEngine
from plt_eval.heldout import DocumentScores, package_groups, score_documents, summarise
from plt_eval.journal import write_atomically
from plt_eval.models import ResolvedModel
from plt_eval.runner import Settings, run
from plt_eval.study.plan import DIAGNOSES, StudyPlan
from plt_eval.study.records import CacheRecord, DecodeRecord, HeldOutRecord, SuiteRecord
from plt_model import PLTCache, PLTConfig, PLTForCausalLM
from plt_model.training.shards import MANIFEST, TokenData

MOST_WINDOWS, MOST_LOGITS = 16, 1 << 27
"""Windows at a time: so many, or as many as have so many logits (half a gibibyte of float32), but at least one."""

DECODE_CONTEXT, DECODE_WARM_UP, DECODE_TOKENS = 256, 4, 48
"""Tokens read before decoding is timed, steps that are not timed, and steps that are."""


# --- held-out text ------------------------------------------------------------------------------------


def measure_heldout(
    engine: HFEngine, entry: Path, out: Path, *, sequence_length: int, limit_tokens: int | None
) -> tuple[HeldOutRecord, DocumentScores]:
    """Bits per byte of the engine's model on the held-out text of the data folder `entry`; `out` is the scores' file
    without its ending. Scores are made again when the model, the data, the amount, the device or the type differs from
    the stored one's."""
    data = TokenData.open(entry, "heldout")
    settings = {
        "weights_sha256": engine.weights_sha256,
        "loops": engine.model.config.plt_num_loops,
        "data_sha256": hashlib.sha256((entry / MANIFEST).read_bytes()).hexdigest(),
        "sequence_length": sequence_length,
        "limit_tokens": limit_tokens,
        "device": _device_name(engine.device),
        "dtype": _type_name(engine.dtype),
    }
    scores = _stored(out, settings)
    if scores is None:
        scores = score_documents(
            engine.model,
            data,
            sequence_length=sequence_length,
            batch_size=_windows_at_a_time(sequence_length, engine.model.config.vocab_size),
            limit_tokens=limit_tokens,
            groups=package_groups(data),
        )
        out.parent.mkdir(parents=True, exist_ok=True)
        out.with_name(out.name + ".json").unlink(missing_ok=True)  # or a kill would leave it beside other scores
        scores.save(out.with_name(out.name + ".npz"))
        write_atomically(out.with_name(out.name + ".json"), json.dumps(settings, indent=2) + "\n")
    return HeldOutRecord(**dataclasses.asdict(summarise(scores))), scores


def _windows_at_a_time(sequence_length: int, vocab_size: int) -> int:
    return max(1, min(MOST_WINDOWS, MOST_LOGITS // (sequence_length * vocab_size)))


def _stored(out: Path, settings: Mapping[str, Any]) -> DocumentScores | None:
    """The scores at `out`, if they were made with these settings, which are written last."""
    scores = out.with_name(out.name + ".npz")
    try:
        found = json.loads(out.with_name(out.name + ".json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return DocumentScores.load(scores) if found == settings and scores.exists() else None


# --- suites -------------------------------------------------------------------------------------------


def measure_suites(engine: HFEngine, plan: StudyPlan, console: Console) -> dict[str, SuiteRecord]:
    """Evaluate the engine on the plan's suites, or go on with, or read, the runs that did."""
    from plt_eval.sandbox import open_sandbox

    settings = Settings(results=plan.runs, limit=plan.limit, command=plan.command, sandbox=plan.sandbox)
    records = {}
    for name in plan.suites:
        for suite in get_suite(name):
            result = run(
                suite,
                suite.load(None),
                engine,
                lambda: open_sandbox(plan.sandbox, image=plan.sandbox_image),
                settings,
                console=console,
            )
            records[suite.name] = SuiteRecord(
                run_id=result.run.manifest.run_id,
                total=result.metrics.total,
                missing=result.metrics.missing,
                metrics=result.metrics.metrics,
            )
    return records


# --- cost ---------------------------------------------------------------------------------------------


def measure_cache(config: PLTConfig, context: int, dtype: torch.dtype) -> CacheRecord:
    """What the cache of one sequence holds after `context` tokens, in bytes: the shapes of a prompt being read, without
    the arithmetic (torch's meta device), so it costs nothing at any size."""
    with torch.device("meta"):
        model = PLTForCausalLM(config).to(dtype).eval()
        cache = PLTCache(config)
        with torch.no_grad():
            model(input_ids=torch.zeros(1, context, dtype=torch.long), past_key_values=cache, logits_to_keep=1)
    return CacheRecord(context=context, dtype=_type_name(dtype), **cache.nbytes())


def measure_decode(engine: HFEngine, out: Path) -> DecodeRecord:
    """Time a new token on one sequence, as `generate` decodes it; `out` is the file that keeps it, so that a study that
    is gone on with keeps what it measured. Measured again when the model, the device or the type differs."""
    key = {
        "weights_sha256": engine.weights_sha256,
        "loops": engine.model.config.plt_num_loops,
        "device": _device_name(engine.device),
        "dtype": _type_name(engine.dtype),
    }
    try:
        stored = json.loads(out.read_text(encoding="utf-8"))
        if stored["key"] == key:
            return DecodeRecord.model_validate(stored["decode"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        pass  # never measured, or by a version that wrote something else
    record = DecodeRecord(
        seconds=statistics.median(_decode_seconds(engine.model, engine.device)),
        context=DECODE_CONTEXT,
        tokens=DECODE_TOKENS,
        device=key["device"],
        dtype=key["dtype"],
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, json.dumps({"key": key, "decode": record.model_dump()}, indent=2) + "\n")
    return record


@torch.inference_mode()
def _decode_seconds(model: Any, device: torch.device) -> list[float]:
    """Each of DECODE_TOKENS steps, after a few that warm up. What the tokens are changes nothing."""
    cache = PLTCache(model.config)
    model(input_ids=torch.ones(1, DECODE_CONTEXT, dtype=torch.long, device=device), past_key_values=cache)
    token = torch.ones(1, 1, dtype=torch.long, device=device)
    seconds = []
    for _ in range(DECODE_WARM_UP + DECODE_TOKENS):
        began = _now(device)
        model(input_ids=token, past_key_values=cache)
        seconds.append(_now(device) - began)
    return seconds[DECODE_WARM_UP:]


def _now(device: torch.device) -> float:
    """Seconds on a steady clock, when the device has done what it was asked to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _type_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def count_parameters(model: torch.nn.Module) -> tuple[int, int]:
    """All parameters, and those of them in the embedding and the head; a tied head counts once."""
    config: Any = model.config
    tables = 1 if config.tie_word_embeddings else 2
    return sum(p.numel() for p in model.parameters()), tables * config.vocab_size * config.hidden_size


# --- diagnosis ----------------------------------------------------------------------------------------


def measure_diagnosis(
    model: Path, label: str, entries: Sequence[Path], plan: StudyPlan, *, sequence_length: int, console: Console
) -> Path:
    """Open every loop of the checkpoint `model` on the held-out text of the data folders `entries`, which take turns,
    or go on with, or just read, the run that did; returns its directory."""
    from plt_eval.diagnosis.run import Settings as DiagnosisSettings
    from plt_eval.diagnosis.run import diagnose
    from plt_eval.diagnosis.samples import draw, open_corpus
    from plt_eval.diagnosis.subject import Subject

    def say(message: str) -> None:
        console.print(message, markup=False, highlight=False, soft_wrap=True)

    subject = Subject.of(ResolvedModel(model, label, loops=None), label=label, notify=say)
    drawn = draw(
        [open_corpus(str(entry)) for entry in entries],
        tokenizer=None,
        samples=plan.diagnosis_samples,
        sequence_length=sequence_length,
    )
    settings = DiagnosisSettings(results=plan.out / DIAGNOSES, command=plan.command)
    return diagnose(subject, drawn, settings, console=console).diagnosis.path
