"""`plt-eval run`: evaluate a model at one or several loop counts, an endpoint, or stored completions."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class EngineName(StrEnum):
    """What turns prompts into text."""

    hf = "hf"
    vllm = "vllm"
    openai = "openai"
    replay = "replay"


class Api(StrEnum):
    """Which of an endpoint's services to ask."""

    chat = "chat"
    completions = "completions"


class Dtype(StrEnum):
    """The numbers that the model computes in."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Device(StrEnum):
    """Where the model computes."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class LoopMode(StrEnum):
    """How loops are wired: see plt_model."""

    plt = "plt"
    sequential = "sequential"


class ChatTemplate(StrEnum):
    """Whether prompts go through the tokenizer's chat template."""

    auto = "auto"
    on = "on"
    off = "off"


class Decoder(StrEnum):
    """What writes the model's tokens."""

    auto = "auto"
    session = "session"
    generate = "generate"


class Attention(StrEnum):
    """How the model's attention is computed."""

    auto = "auto"
    eager = "eager"
    sdpa = "sdpa"
    flash_attention_2 = "flash_attention_2"
    flex_attention = "flex_attention"
    triton = "triton"


class Compile(StrEnum):
    """Whether the decoding step is compiled."""

    auto = "auto"
    on = "on"
    off = "off"


class AgentActions(StrEnum):
    """How an agent names its commands."""

    text = "text"
    tools = "tools"


class ToolCalls(StrEnum):
    """How a model is told of functions that it may call."""

    prompt = "prompt"
    native = "native"


class KeepImages(StrEnum):
    """Which pulled images stay."""

    none = "none"
    env = "env"
    all = "all"


class SandboxName(StrEnum):
    """Where model-written code runs."""

    bubblewrap = "bubblewrap"
    docker = "docker"
    unsafe_subprocess = "unsafe-subprocess"


def run(
    suite: Annotated[str, typer.Option(help="What to evaluate on; `plt-eval suites` lists them.")],
    engine: Annotated[EngineName, typer.Option(help="What turns prompts into text.")] = EngineName.hf,
    data: Annotated[Path | None, typer.Option(help="The suite's data, file or folder, instead of its own.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first N problems.")] = None,
    n_samples: Annotated[
        int | None, typer.Option(min=1, help="Completions a problem (default 1; replay: as many as there are).")
    ] = None,
    results: Annotated[Path, typer.Option(help="Where runs are stored.")] = Path("results/runs"),
    run_id: Annotated[
        str | None, typer.Option(help="Name of the run; of several, the beginning of their names.")
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON instead of the table.")] = False,
    sandbox: Annotated[SandboxName, typer.Option(help="Where model-written code runs.")] = SandboxName.bubblewrap,
    sandbox_image: Annotated[str | None, typer.Option(help="Image for --sandbox docker.")] = None,
    scoring_workers: Annotated[
        int | None, typer.Option(min=1, help="Answers judged at a time (default: the cores, or the cluster's).")
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(help="Judge on the machines of a Ray cluster: HOST:PORT, ray://HOST:PORT, auto or local."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="[hf, vllm] Checkpoint folder, or a bundled model: plt-tiny:r3 is one checkpoint, plt-tiny (default) "
            "the family, in which each loop count has a checkpoint that was trained with it. [openai] What the "
            "endpoint serves, for the record: reports then know the run by its weights and loop count."
        ),
    ] = None,
    loops: Annotated[
        str | None,
        typer.Option(
            help="[hf, vllm] Loop counts, as 2 or 1,2,4 or 1-4 (default: the checkpoint's own; of a family, all that "
            "it has). [openai] The one that --model is served with."
        ),
    ] = None,
    loop_mode: Annotated[LoopMode | None, typer.Option(help="[hf, vllm] How loops are wired (default plt).")] = None,
    batch_size: Annotated[
        str | None, typer.Option(help='[hf, vllm] Prompts at a time, or "auto" (default): as many as fit.')
    ] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="[hf, vllm] Numbers to compute in (default auto).")] = None,
    device: Annotated[Device | None, typer.Option(help="[hf] Where to compute (default auto).")] = None,
    chat_template: Annotated[
        ChatTemplate | None,
        typer.Option(help="[hf, vllm] Use the tokenizer's chat template (default auto: if it has one)."),
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help='[hf, vllm] Tokenizer folder, or "bytes" (default: the checkpoint\'s own).')
    ] = None,
    decoder: Annotated[
        Decoder | None,
        typer.Option(
            help="[hf] session: all loops of a token in one trip, slots that refill; generate: transformers' own "
            "(default auto: session where the model allows it)."
        ),
    ] = None,
    attention: Annotated[
        Attention | None, typer.Option(help="[hf] How attention is computed (default auto: the fastest that serves).")
    ] = None,
    compile_: Annotated[
        Compile | None,
        typer.Option(
            "--compile",
            help="[hf, vllm] Compile the step of --decoder session (default auto: where it pays); vllm: off is eager.",
        ),
    ] = None,
    tensor_parallel: Annotated[
        int | None, typer.Option(min=1, help="[vllm] Processes that share a model, a GPU each (default 1).")
    ] = None,
    max_model_len: Annotated[
        int | None,
        typer.Option(min=2, help="[vllm] Tokens of context (default: the model's own, or what the KV cache holds)."),
    ] = None,
    gpu_memory_utilization: Annotated[
        float | None, typer.Option(help="[vllm] Share of the device's memory to take, in (0, 1] (default: vLLM's).")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(min=0.0, help="[hf, vllm, openai] 0 (default) is greedy.")
    ] = None,
    top_p: Annotated[float | None, typer.Option(help="[hf, vllm, openai] Nucleus, in (0, 1] (default 1).")] = None,
    seed: Annotated[int | None, typer.Option(help="[hf, vllm, openai] Seed of the random streams (default 0).")] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="[hf, vllm, openai] Instead of the suite's own limit.")
    ] = None,
    endpoint: Annotated[
        list[str] | None,
        typer.Option(help="[openai] Address up to /v1, as http://127.0.0.1:8000/v1; again for each that serves it."),
    ] = None,
    served_as: Annotated[
        str | None,
        typer.Option(
            help="[openai] Name of what is served: the run goes on under it at other addresses. Or the addresses that "
            "it began with."
        ),
    ] = None,
    api_model: Annotated[str | None, typer.Option(help="[openai] The model's name at the endpoint.")] = None,
    api: Annotated[Api | None, typer.Option(help="[openai] Which service to ask (default chat).")] = None,
    api_key_env: Annotated[
        str | None, typer.Option(help="[openai] Variable that holds the key (default OPENAI_API_KEY).")
    ] = None,
    concurrency: Annotated[
        int | None, typer.Option(min=1, help="[openai] Requests at a time, at each endpoint (default 8).")
    ] = None,
    retries: Annotated[int | None, typer.Option(min=0, help="[openai] More tries for a request (default 6).")] = None,
    request_timeout: Annotated[
        float | None, typer.Option(help="[openai] Seconds to wait for an answer (default 600).")
    ] = None,
    completions: Annotated[
        list[str] | None,
        typer.Option(help='[replay] File of completions (may be given again), or "gold": the data\'s own solutions.'),
    ] = None,
    release: Annotated[str | None, typer.Option(help="[lcb] LiveCodeBench's release (default release_v6).")] = None,
    since: Annotated[
        datetime | None, typer.Option(formats=["%Y-%m-%d"], help="[lcb] Only problems of contests from this day on.")
    ] = None,
    until: Annotated[
        datetime | None, typer.Option(formats=["%Y-%m-%d"], help="[lcb] Only problems of contests up to this day.")
    ] = None,
    include_path: Annotated[Path | None, typer.Option(help="[lm-eval] Folder with task files of your own.")] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(min=0, help="[lm-eval] Examples before each question, instead of the task's own.")
    ] = None,
    tool_calls: Annotated[
        ToolCalls | None,
        typer.Option(help="[tools] Functions described in the prompt (default), or by the chat template or protocol."),
    ] = None,
    instances: Annotated[str | None, typer.Option(help="[swe] Only these instances, by id: ID,ID,...")] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="[swe] Agents, and judgements here, at a time (default: the cores).")
    ] = None,
    agent_steps: Annotated[
        int | None, typer.Option(min=1, help="[swe] Model calls an instance at most (default 250).")
    ] = None,
    agent_wall_time: Annotated[
        int | None, typer.Option(min=1, help="[swe] Seconds an instance at most (default 3600).")
    ] = None,
    agent_command_timeout: Annotated[
        int | None, typer.Option(min=1, help="[swe] Seconds that one command of the agent may take (default 60).")
    ] = None,
    agent_actions: Annotated[
        AgentActions | None,
        typer.Option(help="[swe] Commands in fenced blocks of text (default), or as calls of a tool."),
    ] = None,
    agent_context: Annotated[
        int | None, typer.Option(min=64, help="[swe] Tokens of context to keep to (default: the model's own).")
    ] = None,
    test_timeout: Annotated[
        int | None, typer.Option(min=1, help="[swe] Seconds that an instance's tests may take (default 1800).")
    ] = None,
    predictions: Annotated[
        Path | None, typer.Option(help="[swe] Judge the patches of this file (.json, .jsonl); no agent is run.")
    ] = None,
    gold: Annotated[
        bool, typer.Option("--gold", help="[swe] Judge the data's own patches: checks the installation.")
    ] = False,
    keep_images: Annotated[
        KeepImages | None,
        typer.Option(help="[swe] Of the images that this run pulls keep none, one an environment, or all (default)."),
    ] = None,
    container_memory: Annotated[
        float | None, typer.Option(min=0.1, help="[swe] GiB of memory a container (default 16).")
    ] = None,
    container_cpus: Annotated[
        float | None, typer.Option(min=0.1, help="[swe] Cores a container (default: all).")
    ] = None,
    pip_index: Annotated[
        str | None, typer.Option(help="[swe] Package index that tests install from, instead of PyPI.")
    ] = None,
    wheels: Annotated[
        Path | None, typer.Option(help="[swe] Folder of packages that tests install from, without a network.")
    ] = None,
    split_streams: Annotated[
        bool,
        typer.Option("--split-streams", help="[swe] Leave test scripts as they are: without `exec 2>&1` in front."),
    ] = False,
) -> None:
    """Evaluate loop counts, an endpoint or a file.

    All runs of one command are printed as one table. Stopped or killed, the same command goes on where it stood;
    complete, it prints the stored result. An option that has no effect with the chosen engine or suite is an error;
    [swe] marks those of swe, swe-lite, multi-swe and multi-swe-bench; [lcb], [lm-eval] and [tools] those of the suites
    of that name.
    """
    from plt_benchmarks.options import SuiteOptions
    from plt_eval.cli.evaluate import report_runs
    from plt_eval.cli.options import RunOptions
    from plt_eval.swe.command import SweOptions

    chosen = SuiteOptions(
        release=release,
        since=since and since.date(),
        until=until and until.date(),
        include_path=include_path,
        num_fewshot=num_fewshot,
        tool_calls=_value(tool_calls),
    )
    swe = SweOptions(
        instances=instances,
        workers=workers,
        agent_steps=agent_steps,
        agent_wall_time=agent_wall_time,
        agent_command_timeout=agent_command_timeout,
        agent_actions=_value(agent_actions),
        agent_context=agent_context,
        test_timeout=test_timeout,
        predictions=predictions,
        gold=gold or None,
        keep_images=_value(keep_images),
        container_memory=container_memory,
        container_cpus=container_cpus,
        pip_index=pip_index,
        wheels=wheels,
        split_streams=split_streams or None,
    )
    options = RunOptions(
        suite=suite,
        engine=engine.value,
        data=data,
        limit=limit,
        n_samples=n_samples,
        results=results,
        run_id=run_id,
        sandbox=sandbox.value,
        sandbox_image=sandbox_image,
        scoring_workers=scoring_workers,
        ray=ray,
        model=model,
        loops=loops,
        loop_mode=_value(loop_mode),
        batch_size=batch_size,
        dtype=_value(dtype),
        device=_value(device),
        chat_template=_value(chat_template),
        tokenizer=tokenizer,
        decoder=_value(decoder),
        attention=_value(attention),
        compile=_value(compile_),
        tensor_parallel=tensor_parallel,
        max_model_len=max_model_len,
        gpu_memory_utilization=gpu_memory_utilization,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        max_new_tokens=max_new_tokens,
        endpoint=tuple(endpoint or ()) or None,
        served_as=served_as,
        api_model=api_model,
        api=_value(api),
        api_key_env=api_key_env,
        concurrency=concurrency,
        retries=retries,
        request_timeout=request_timeout,
        completions=tuple(completions or ()) or None,
        chosen=chosen,
        swe=swe,
    )
    if report_runs(options, as_json=json_):
        raise typer.Exit(1)


def _value(choice: StrEnum | None) -> str | None:
    return None if choice is None else choice.value
