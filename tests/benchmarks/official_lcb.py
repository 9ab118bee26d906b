"""Asks LiveCodeBench's own package, by the Python of its environment: a request as JSON in, its answer as JSON out.

What the package imports for other things than scoring (clients of services, loaders of data) stands empty.
"""

from __future__ import annotations

import json
import os
import sys
import types
from typing import Any

for _name, _words in (("anthropic", "HUMAN_PROMPT AI_PROMPT"), ("datasets", "load_dataset Dataset"), ("pandas", "")):
    _module = types.ModuleType(_name)
    _module.__dict__.update(dict.fromkeys(_words.split()))
    sys.modules[_name] = _module


def generation(request: dict[str, Any]) -> list[bool]:
    """Verdicts on programs: [[tests as its metrics take them, program], ...]."""
    from livecodebench.evaluation.compute_code_generation_metrics import codegen_metrics

    samples = [{"input_output": tests} for tests, _ in request["answers"]]
    codes = [[code] for _, code in request["answers"]]
    metrics, *_ = codegen_metrics(samples, codes, k_list=[1], num_process_evaluate=2, timeout=request["timeout"])
    right = metrics["detail"]["pass@1"]
    return [right[number] == 1.0 for number in range(len(codes))]


def execution(request: dict[str, Any]) -> list[bool]:
    """Verdicts on outputs of one row's call, one by one."""
    from livecodebench.evaluation.compute_code_execution_metrics import code_execution_metrics
    from livecodebench.lm_styles import LMStyle
    from livecodebench.utils.extraction_utils import extract_execution_code

    read = [extract_execution_code(text, LMStyle.OpenAIChat, cot=request["thinks"]) for text in request["answers"]]
    _, results = code_execution_metrics([request["row"]] * len(read), [[text] for text in read])
    return [results[number] == [[True]] for number in range(len(read))]


def test_output(request: dict[str, Any]) -> list[bool]:
    """Verdicts on assertions for one output."""
    from livecodebench.evaluation.compute_test_output_prediction_metrics import test_output_metrics
    from livecodebench.lm_styles import LMStyle
    from livecodebench.utils.extraction_utils import extract_test_output_code

    read = [extract_test_output_code(text, LMStyle.OpenAIChat) for text in request["answers"]]
    _, results = test_output_metrics([{"output": request["output"]}] * len(read), [[text] for text in read])
    return [results[number] == [[True]] for number in range(len(read))]


def prompts(request: dict[str, Any]) -> dict[str, Any]:
    """The prompts for rows in the official format, and the code that it finds in answers."""
    from livecodebench.benchmarks import CodeExecutionProblem, CodeGenerationProblem, TestOutputPredictionProblem
    from livecodebench.lm_styles import LMStyle
    from livecodebench.prompts import (
        format_prompt_execution,
        format_prompt_execution_cot,
        format_prompt_generation,
        format_prompt_test_output,
    )
    from livecodebench.utils.extraction_utils import extract_code

    chat = LMStyle.OpenAIChat
    problems = [CodeGenerationProblem(**{"private_test_cases": "[]", **row}) for row in request["generation"]]
    return {
        "chat": [format_prompt_generation(problem, chat) for problem in problems],
        "base": [format_prompt_generation(problem, LMStyle.GenericBase) for problem in problems],
        "execution": format_prompt_execution(CodeExecutionProblem(**request["execution"]), chat),
        "execution_cot": format_prompt_execution_cot(CodeExecutionProblem(**request["execution"]), chat),
        "test_output": format_prompt_test_output(TestOutputPredictionProblem(**request["test_output"]), chat),
        "code": [extract_code(text, chat) for text in request["answers"]],
        "base_code": [extract_code(text, LMStyle.GenericBase) for text in request["answers"]],
    }


if __name__ == "__main__":
    asked, answer = json.load(sys.stdin), os.dup(1)
    os.dup2(2, 1)  # programs under judgement print too
    what = {"generation": generation, "execution": execution, "test_output": test_output, "prompts": prompts}
    os.write(answer, json.dumps(what[asked["what"]](asked)).encode())
