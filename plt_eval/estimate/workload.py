"""What is asked: how many answers, how long, and what judging one takes. Each a range, each replaced by an option.

A suite says how many problems it has, how long its prompts and gold answers are (measured over its rows) and how long
an answer may be. What a model really writes is not known: about as much as the gold answers, up to the limit (high).
"""

from __future__ import annotations

from dataclasses import dataclass

from plt_benchmarks.protocols import SuiteError
from plt_benchmarks.registry import get_suite
from plt_eval.errors import UserError
from plt_eval.estimate.constants import AgentSuite, Constants, Range, TextRecord
from plt_eval.estimate.tokens import Tokens

FAMILIES = {"cruxeval-": "cruxeval", "bigcodebench": "bigcodebench", "multilingual": "multilingual", "tools": "tools"}
"""Suites judged alike, by how their names begin."""
BORROWED = {"bigcodebench-hard-instruct": "bigcodebench-instruct"}
"""Suites whose texts are taken to be another's; without an entry: of the one that their name begins with."""


@dataclass(frozen=True)
class Asked:
    """The options; None means: not given."""

    suite: str | None = None
    instances: int | None = None
    samples: int = 1
    prompt_tokens: int | None = None
    new_tokens: int | None = None
    steps: int | None = None
    observation_tokens: int | None = None
    tool_seconds: float | None = None
    judge_seconds: float | None = None
    characters_per_token: float | None = None
    tokens: Tokens | None = None
    """The model's own, where there is one; without it, a chat model's."""

    def per_token(self, constants: Constants) -> tuple[float, str]:
        """Characters a token, and where that is from."""
        if self.characters_per_token is not None:
            return self.characters_per_token, "given"
        if self.tokens is not None:
            return self.tokens.characters_per_token, self.tokens.source
        return constants.texts.characters_per_token.value, constants.texts.characters_per_token.source


@dataclass(frozen=True)
class Workload:
    """One suite's. `answers` are problems times samples. Tokens of a prompt and of what a model writes in a step (of an
    agent: a turn; else there is one), of what an agent's command answers, and its seconds; processor seconds of judging
    an answer. `images` and `environments` are of Docker; `sources` say where each number is from."""

    name: str
    answers: int
    agent: bool
    prompt: Range
    new: Range
    steps: Range
    observation: Range
    tool: Range
    judging: Range
    images: int
    environments: int
    environments_known: bool
    sources: dict[str, str]

    def longest(self, scenario: int) -> int:
        """Tokens that a sequence holds at its end."""
        steps = self.steps.scenario(scenario)
        told = max(0.0, steps - 1) * self.observation.scenario(scenario)
        return round(self.prompt.scenario(scenario) + steps * self.new.scenario(scenario) + told)


def workloads(asked: Asked, constants: Constants) -> list[Workload]:
    """Of --suite, or of --instances problems of nobody's. Raises UserError and SuiteError."""
    if asked.suite is None:
        return [_unnamed(asked)]
    return [_of_suite(name, problems, asked, constants) for name, problems in _members(asked.suite)]


def _members(name: str) -> list[tuple[str, int]]:
    """Suites behind a name, with their problems; what they are chosen from need not be here."""
    key = name.partition(":")[0].lower()
    try:
        return [(suite.name, suite.problems) for suite in get_suite(name)]
    except SuiteError:
        if key.startswith("multilingual") and ":" in name:  # languages whose toolchains are elsewhere
            return [(key, 0)]
        raise


def _unnamed(asked: Asked) -> Workload:
    for flag, value in (("--instances", asked.instances), ("--prompt-tokens", asked.prompt_tokens)):
        if value is None:
            raise UserError(f"{flag} is missing: give a --suite, or --instances, --prompt-tokens and --new-tokens")
    if asked.new_tokens is None:
        raise UserError("--new-tokens is missing: give a --suite, or --instances, --prompt-tokens and --new-tokens")
    assert asked.instances is not None
    assert asked.prompt_tokens is not None
    if asked.characters_per_token is not None:
        raise UserError("--characters-per-token has no effect without --suite: tokens are given")
    steps = asked.steps or 1
    _refuse_agents_options(asked, agent=asked.steps is not None)
    given = "given"
    return Workload(
        name=f"{asked.instances} instances",
        answers=asked.instances * asked.samples,
        agent=asked.steps is not None,
        prompt=Range.exactly(asked.prompt_tokens),
        new=Range.exactly(asked.new_tokens),
        steps=Range.exactly(steps),
        observation=Range.exactly(asked.observation_tokens or 0),
        tool=Range.exactly(asked.tool_seconds or 0.0),
        judging=Range.exactly(asked.judge_seconds or 0.0),
        images=0,
        environments=0,
        environments_known=True,
        sources=dict.fromkeys(("problems", "prompt", "new tokens", "judging"), given),
    )


def _of_suite(name: str, problems: int, asked: Asked, constants: Constants) -> Workload:
    agents = constants.agents.suites.get(name)
    if agents is not None:
        return _of_agents(name, agents, asked, constants)
    texts, of = _texts(name, asked, constants)
    borrowed = "" if of in (name, None) else f"; {of}'s texts"
    _refuse_agents_options(asked, agent=False)
    per_token, told = asked.per_token(constants)
    prompt, prompt_source = _given(asked.prompt_tokens), "given"
    new, new_source = _given(asked.new_tokens), "given"
    if texts is not None:
        characters, gold = texts.characters(chat=asked.tokens is None or asked.tokens.chat)
        _refuse_characters(asked, counted=prompt is None or (new is None and gold is not None))
        if prompt is None:
            prompt = Range.exactly(characters / per_token)
            prompt_source = (
                f"{characters} characters (mean of the suite's rows), {per_token:.3g} a token ({told}){borrowed}"
            )
        if new is None:
            new, new_source = _writing(gold, texts.limit, per_token)
            new_source += borrowed
    else:
        _refuse_characters(asked, counted=False)
    assert prompt is not None
    assert new is not None
    judging, judging_source = _judging(name, asked, constants)
    problems = problems or (texts.problems if texts is not None and of == name else 0)
    count = asked.instances or problems
    if not count:
        raise UserError(f"--instances is missing: how many problems {name} has is not known here")
    if problems and count > problems:
        raise UserError(f"--instances {count}: {name} has {problems}")
    return Workload(
        name=name,
        answers=count * asked.samples,
        agent=False,
        prompt=prompt,
        new=new,
        steps=Range.exactly(1),
        observation=Range.exactly(0),
        tool=Range.exactly(0),
        judging=judging,
        images=0,
        environments=0,
        environments_known=True,
        sources={
            "problems": "given" if asked.instances else "the suite's",
            "prompt": prompt_source,
            "new tokens": new_source,
            "judging": judging_source,
        },
    )


def _texts(name: str, asked: Asked, constants: Constants) -> tuple[TextRecord | None, str | None]:
    """The suite's, or those of the one whose texts its own are like: with that one's name."""
    known = constants.texts.suites
    of = BORROWED.get(name) or max((key for key in known if f"{name}-".startswith(f"{key}-")), key=len, default=None)
    if of is None:
        for flag, value in (("--prompt-tokens", asked.prompt_tokens), ("--new-tokens", asked.new_tokens)):
            if value is None:
                raise UserError(f"{flag} is missing: nobody measured {name}'s texts here")
        return None, None
    return known[of], of


def _writing(gold: int | None, limit: int, per_token: float) -> tuple[Range, str]:
    """Tokens of an answer, the one that ends it included, of which gold ones have `gold` characters."""
    if gold is None:
        low = max(1.0, limit / 10)
        middle, why = (low * limit) ** 0.5, "a tenth of the limit (assumed)"
    else:
        middle = min(gold / per_token + 1, limit)
        low, why = max(1.0, middle / 2), "half of the gold answers' mean length, their length in the middle,"
    return Range(low=low, middle=middle, high=limit), f"from {why} to the suite's limit of {limit}"


def _judging(name: str, asked: Asked, constants: Constants) -> tuple[Range, str]:
    if asked.judge_seconds is not None:
        return Range.exactly(asked.judge_seconds), "given"
    family = next((family for start, family in FAMILIES.items() if name.startswith(start)), name)
    found = constants.judging.get(family)
    if found is None:
        return Range.exactly(0), "not known here, taken as nothing: --judge-seconds"
    cpu, first = found.cpu_seconds, found.first
    ends = [cpu.scenario(i) + first.scenario(i) / asked.samples for i in range(3)]
    return Range(low=ends[0], middle=ends[1], high=ends[2]), found.source


def _of_agents(name: str, suite: AgentSuite, asked: Asked, constants: Constants) -> Workload:
    agents = constants.agents
    per_token, told = asked.per_token(constants)
    characters = agents.system_characters + suite.issue
    count = asked.instances or suite.problems
    if count > suite.problems:
        raise UserError(f"--instances {count}: {name} has {suite.problems}")
    if asked.samples != 1:
        raise UserError(f"--samples has no effect on suite {name}: an instance is solved once")
    _refuse_characters(asked, counted=asked.prompt_tokens is None)
    _refuse_agents_options(asked, agent=True)
    prompt = _given(asked.prompt_tokens) or Range.exactly(characters / per_token)
    judging = constants.judging["swe"]
    assumed = f"assumed ({agents.assumed})"
    sources = {
        "problems": "given" if asked.instances else "the suite's",
        "prompt": "given"
        if asked.prompt_tokens
        else f"{characters} characters, {per_token:.3g} a token ({told}); {agents.source}",
        "steps": "given" if asked.steps else assumed,
        "new tokens": "given" if asked.new_tokens else assumed,
        "observation": "given" if asked.observation_tokens is not None else assumed,
        "tool seconds": "given" if asked.tool_seconds is not None else assumed,
        "judging": "given" if asked.judge_seconds is not None else judging.source,
    }
    images = min(count, suite.images)
    return Workload(
        name=name,
        answers=count,
        agent=True,
        prompt=prompt,
        new=_given(asked.new_tokens) or agents.new_tokens,
        steps=_given(asked.steps) or agents.steps,
        observation=_given(asked.observation_tokens) or agents.observation_tokens,
        tool=_given(asked.tool_seconds) or agents.tool_seconds,
        judging=_given(asked.judge_seconds) or judging.cpu_seconds,
        images=images,
        environments=min(images, suite.environments or images),
        environments_known=suite.environments is not None,
        sources=sources,
    )


def _given(value: float | None) -> Range | None:
    return None if value is None else Range.exactly(value)


def _refuse_characters(asked: Asked, *, counted: bool) -> None:
    if asked.characters_per_token is not None and not counted:
        raise UserError("--characters-per-token has no effect: all that it would count is given in tokens")


def _refuse_agents_options(asked: Asked, *, agent: bool) -> None:
    if agent:
        if asked.steps == 1 and asked.observation_tokens is not None:
            raise UserError("--observation-tokens has no effect with --steps 1: nothing is written after a command")
        return
    for flag, value in (("--observation-tokens", asked.observation_tokens), ("--tool-seconds", asked.tool_seconds)):
        if value is not None:
            raise UserError(f"{flag} has no effect without an agent: give --steps too, or --suite swe")
    if asked.steps is not None and asked.suite is not None:
        raise UserError(f"--steps has no effect on suite {asked.suite}: it belongs to agents, as swe")


__all__ = ["Asked", "Workload", "workloads"]
