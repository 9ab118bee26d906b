"""`plt-eval bench vllm --overhead`: what `plt-eval run --engine vllm` adds to vLLM's own offline benchmark.

    vllm bench throughput       vLLM's function behind that command: LLM.generate on token ids, at temperature 1
    --engine vllm               our engine from requests in text to completions in text, a random stream per request

Both drive the very same vLLM engine, in the thread that owns it, in turns, with an empty prefix cache; every text is as
long as was asked for. The gates compare greedy texts of LLM.generate and of the engine, and count the tokens of both.
"""

from __future__ import annotations

import contextlib
import io
from contextlib import closing
from typing import Any

import torch

from plt_benchmarks.protocols import Prompt
from plt_eval.bench.gates import Gate
from plt_eval.bench.outcome import Outcome, Row, Setup, against, in_words, run_configuration, steps_of
from plt_eval.bench.rounds import Job
from plt_eval.bench.subjects import prompt
from plt_eval.bench.vllm import VLLMSettings, saved
from plt_eval.engines.base import Completion, Decoding, GenerationRequest
from plt_eval.engines.vllm import VLLMEngine

OWN, OURS = "vllm bench throughput", "--engine vllm"
GATE_REQUESTS = 8
LETTERS = "abcdefghijklmnopqrstuvwxyz ()=+-:,\n"


def bench_overhead(setup: Setup, settings: VLLMSettings, requests: int) -> Outcome:
    """Time `requests` texts a round at each loop count; the engine has `batch` seats."""
    outcome = Outcome("vllm", {**settings.facts(), "requests": requests, "overhead": True})
    setup.watcher.expect(len(settings.configurations) * len(setup.loops) * steps_of(2, setup.rounds))
    with saved(setup.family) as folder:
        for batch, context in settings.configurations:
            for loops in setup.loops:
                engine = VLLMEngine(
                    str(folder),
                    loops=loops,
                    dtype=str(setup.family.dtype).removeprefix("torch."),
                    tokenizer="bytes",
                    batch_size=batch,
                    compile="off" if settings.eager else "auto",
                    gpu_memory_utilization=_free_share(setup),
                    notify=lambda _: None,
                )
                engine.prompts.eos = ()  # every text is as long as asked for
                where = {"batch": batch, "context": context, "R": loops}
                with closing(engine):
                    _configuration(outcome, setup, engine, where, requests, settings.tokens)
    return outcome


def _free_share(setup: Setup) -> float | None:
    """Of a GPU's memory, what the weights that the gates compare with leave."""
    if setup.family.device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(setup.family.device)
    return 0.9 * free / total


def _configuration(
    outcome: Outcome, setup: Setup, engine: VLLMEngine, where: dict[str, int], count: int, tokens: int
) -> None:
    requests = make_requests(count, where["context"], tokens, setup.seed)
    ids = [engine.prompts.encode(request.prompt) for request in requests]

    def empty() -> None:
        assert engine.steps.call(lambda llm: llm.llm_engine.reset_prefix_cache())

    jobs = [
        Job(OWN, lambda: engine.steps.call(lambda llm: by_vllm(llm, ids, tokens)), empty),
        Job(OURS, lambda: list(engine.generate(requests)), empty),
    ]
    timed = run_configuration(outcome, setup, where, jobs, lambda: gates(engine, requests, ids, tokens))
    if timed is None:
        return
    for name in (OWN, OURS):
        outcome.rows.append(Row(where, name, where["R"], count * tokens, timed[name], OWN, against(timed, name, OWN)))
    spread = against(timed, OURS, OWN)
    more = [f"{100 * (ratio - 1):+.1f}%" for ratio in (spread.median, spread.low, spread.high)]
    outcome.notes.append(f"{in_words(where)}: {OURS} takes {more[0]} [{more[1]}, {more[2]}] of the time of {OWN}")


def make_requests(count: int, context: int, tokens: int, seed: int) -> list[GenerationRequest]:
    """Texts of letters whose prompts have `context` tokens, the first one's included."""
    found = []
    for i in range(count):
        letters = prompt(context - 1, len(LETTERS) + 3, seed=seed + i)[0].tolist()
        text = "".join(LETTERS[letter - 3] for letter in letters)
        asked = Prompt(text, (), (), "", (), tokens)
        found.append(GenerationRequest(f"{i}#0", asked, Decoding(temperature=1.0, seed=seed)))
    return found


def by_vllm(llm: Any, ids: list[list[int]], tokens: int) -> list[Any]:
    """What `vllm bench throughput` times, without its own clock and progress bar's lines."""
    from vllm.benchmarks.datasets import SampleRequest
    from vllm.benchmarks.throughput import _run_vllm_requests

    asked = [SampleRequest({"prompt_token_ids": one}, len(one), tokens) for one in ids]
    with contextlib.redirect_stderr(io.StringIO()):
        _, outputs = _run_vllm_requests(
            llm, asked, 1, disable_detokenize=True, do_profile=False, prequeue_requests=False, enable_lora=False
        )
    assert outputs is not None
    return list(outputs)


def gates(engine: VLLMEngine, requests: list[GenerationRequest], ids: list[list[int]], tokens: int) -> list[Gate]:
    """Both write as many tokens as were asked for; of one greedy prompt both write one text."""
    theirs = engine.steps.call(lambda llm: by_vllm(llm, ids[:GATE_REQUESTS], tokens))
    ours = list(engine.generate(requests[:GATE_REQUESTS]))
    short = sum(len(output.outputs[0].token_ids) != tokens for output in theirs)
    short += sum(one.completion_tokens != tokens for one in ours)
    greedy = [GenerationRequest(one.id, one.prompt) for one in requests[:GATE_REQUESTS]]
    found: dict[str, Completion] = {one.request_id: one for one in engine.generate(greedy)}
    expected = engine.steps.call(lambda llm: _greedy(llm, ids[:GATE_REQUESTS], tokens))
    texts = [
        engine.prompts.completion(engine.prompts.job(request), new, ended=False, seconds=0.0).text
        for request, new in zip(greedy, expected, strict=True)
    ]
    apart = sum(found[request.id].text != text for request, text in zip(greedy, texts, strict=True))
    return [Gate("texts of another length", float(short), 0.0), Gate("greedy texts", float(apart), 0.0)]


def _greedy(llm: Any, ids: list[list[int]], tokens: int) -> list[list[int]]:
    from vllm import SamplingParams, TokensPrompt

    params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    outputs = llm.generate([TokensPrompt(prompt_token_ids=one) for one in ids], params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]
