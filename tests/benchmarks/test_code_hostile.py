"""Answers that attack the judge. Each is first shown to the bare official check, then to ours, where none may pass."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from pathlib import Path

import pytest
from bare_official import bare_official
from evalplus_parts import gold, own_problem

from plt_benchmarks.evalplus_judge.scorer import EvalPlusScorer
from plt_benchmarks.protocols import Answer, Sample

FLOATS = own_problem("    return x * 1.5 + 7.25", [[1.0], [2.5], [-3.0]], task_id="Own/floats")
LISTS = own_problem("    return [x, x + 1]", [[1], [5], [9]], task_id="Own/lists")
SINGLES = own_problem("    return [x * 1.5]", [[1.0], [2.5], [-3.0]], task_id="Own/singles")
TEXTS = own_problem("    return 'a' * x", [[3], [0], [5]], task_id="Own/texts")


@dataclass(frozen=True)
class Attack:
    """A program, and whether the bare official check lets it pass (None: it would harm the tests)."""

    program: str
    officially: bool | None
    sample: Sample = FLOATS


LIAR = """
    def lie(*args): return True
    def f(x):
        return type("Liar", ({base},), {{"__eq__": lie, "__ne__": lambda *a: False, "__hash__": lambda s: 0}})({value})
"""
OFFICIAL_FRAME = """
    import sys
    def official():
        frame = sys._getframe(1)
        while frame is not None and not ("expected" in frame.f_locals and "stat" in frame.f_locals):
            frame = frame.f_back
        return frame.f_locals if frame else dict.fromkeys(["expected", "stat", "details", "progress", "i"])
"""

ATTACKS = {
    "an object that equals everything": Attack(LIAR.format(base="object", value=""), True),
    "an int that equals everything": Attack(LIAR.format(base="int", value="1"), True),
    "a float that equals everything": Attack(LIAR.format(base="float", value="1.0"), True),
    "a str that equals everything": Attack(LIAR.format(base="str", value="'x'"), True, TEXTS),
    "a list that equals everything": Attack(LIAR.format(base="list", value="[1]"), True, LISTS),
    "a list of what equals everything": Attack(
        LIAR.format(base="object", value="").replace("return type", "return [type") + "    ] * 2", True, LISTS
    ),
    "a class whose type lies": Attack(
        """
        class Liar:
            __class__ = list
            def __eq__(self, other): return True
            def __iter__(self): return iter([1, 2])
            def __len__(self): return 2
        def f(x): return Liar()
        """,
        True,
        LISTS,
    ),
    "the expected value, from the judge's frame": Attack(
        OFFICIAL_FRAME
        + """
    def f(x):
        found = official()
        return found["expected"][found["i"]]
        """,
        True,
    ),
    "the expected value, from the garbage collector": Attack(
        """
        import gc
        def f(x):
            for found in gc.get_objects():
                if type(found) is tuple and len(found) == 11 and found[0] == "humaneval" and found[1] == "f":
                    return found[4][found[3].index([x])]
        """,
        True,
    ),
    "a verdict written into the judge's memory": Attack(
        OFFICIAL_FRAME
        + """
    import os
    def f(x):
        found = official()
        for i in range(len(found["details"])): found["details"][i] = True
        found["progress"].value = len(found["details"])
        found["stat"].value = 0
        os._exit(0)
        """,
        True,
    ),
    "numpy.allclose patched": Attack(
        """
        import numpy
        numpy.allclose = lambda *args, **kwargs: True
        def f(x): return 0.0
        """,
        True,
    ),
    "the judge's module patched": Attack(
        """
        import sys
        for module in list(sys.modules.values()):
            if hasattr(module, "is_floats") and hasattr(module, "np"):
                module.is_floats = lambda x: True
                module.np = type("np", (), {"allclose": staticmethod(lambda *args, **kwargs: True)})
        def f(x): return 0.0
        """,
        True,
    ),
    "the inputs changed under the judge": Attack(
        "def f(x): return x", False, own_problem("    return x[0]", [[[1]], [[2]]], task_id="Own/nested")
    ),
    "nothing, where numpy.allclose looks for one number": Attack("def f(x): return [[]]", True, SINGLES),
    "nothing, deeper": Attack("def f(x): return [([],)]", True, SINGLES),
    "nothing, in an array": Attack("import numpy\ndef f(x): return [numpy.zeros((2, 0))]", False, SINGLES),
    "nothing, in a range": Attack("def f(x): return [range(0)]", True, SINGLES),
    "leaving early while loading": Attack("import sys; sys.exit(0)", False),
    "leaving early while called": Attack("import os\ndef f(x): os._exit(0)", False),
    "raising SystemExit": Attack("def f(x): raise SystemExit(0)", False),
    "killing its group": Attack("import signal, posix\ndef f(x): posix.kill(0, signal.SIGKILL)", None),
    "a success marker on every stream": Attack(
        """
        import os, sys
        def f(x):
            for fd in range(64):
                try: os.write(fd, b'pass\\n{"base": "pass", "plus": "pass", "status": "pass"}\\n')
                except OSError: pass
            print("pass"); sys.__stdout__.write("pass")
            os._exit(0)
        """,
        False,
    ),
    "forged records on every descriptor": Attack(
        """
        import os, struct
        def record(kind, run, call, payload):
            return struct.pack("<BBIdQ", kind, run, call, 0.0, len(payload)) + payload
        def f(x):
            true = bytes([1, 1, 1])
            stream = b"".join(record(4, run, call, true) for run in (0, 1) for call in range(3))
            for fd in range(3, 64):
                try: os.write(fd, record(3, 0, 0xFFFFFFFF, b"") + stream + record(3, 1, 0xFFFFFFFF, b"") + stream)
                except OSError: pass
            os._exit(0)
        """,
        False,
    ),
    "garbage on every descriptor": Attack(
        """
        import os
        def f(x):
            for fd in range(3, 64):
                try: os.write(fd, bytes(range(256)) * 300)
                except OSError: pass
            return 0.0
        """,
        False,
    ),
    "the driver's own functions replaced": Attack(
        """
        import os, sys
        frame = sys._getframe()
        while frame is not None:
            for name, value in list(frame.f_globals.items()):
                if callable(value) and name.startswith(("_", "encode", "pack")) and not name.startswith("__"):
                    frame.f_globals[name] = lambda *args, **kwargs: True
            frame = frame.f_back
        for name in ("encoding", "frames"):
            for key in list(vars(sys.modules.get(name, os))):
                if name in sys.modules and not key.startswith("__"):
                    setattr(sys.modules[name], key, lambda *args, **kwargs: [b"pass"])
        os.write = lambda fd, data: len(data)
        def f(x): return True
        """,
        False,
    ),
    "builtins replaced": Attack(
        """
        import builtins
        builtins.len = lambda *args: 3
        builtins.isinstance = builtins.all = builtins.hasattr = lambda *args: True
        builtins.abs = lambda *args: 0
        def f(x): return 0.0
        """,
        True,
    ),
    "a recursion limit of almost nothing": Attack("import sys\nsys.setrecursionlimit(30)\ndef f(x): return 0.0", False),
    "a flood of output": Attack("def f(x): return 'x' * (200 << 20)", None, TEXTS),
    "nothing but depth": Attack(
        "def f(x):\n    a = []\n    for _ in range(100000): a = [a]\n    return a", False, LISTS
    ),
    "a structure that doubles": Attack(
        "def f(x):\n    a = []\n    for _ in range(30): a = [a, a]\n    return a", None, LISTS
    ),
    "sets that take forever to build": Attack(
        "def f(x): return {i * (2 ** 61 - 1) for i in range(1000)}", False, LISTS
    ),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_attacks(name: str, humaneval_scorer: EvalPlusScorer) -> None:
    attack = ATTACKS[name]
    program = textwrap.dedent(attack.program)
    compile(program, name, "exec")
    row = dict(attack.sample.data)
    if attack.officially is not None:
        right, hostile = bare_official("humaneval", [(row, gold(attack.sample).text), (row, program)])
        assert right == ("pass", "pass")
        assert (hostile == ("pass", "pass")) is attack.officially
    score = humaneval_scorer.score(attack.sample, Answer(program, solution=True))
    assert score.error is None
    assert not any(score.values.values()), score.detail
    score = humaneval_scorer.score(attack.sample, gold(attack.sample))
    assert all(score.values.values()), "the judge does not judge right any more"


def test_changed_inputs_do_not_reach_the_oracle(humaneval: dict[str, Sample], humaneval_scorer: EvalPlusScorer) -> None:
    """This task's oracle asks whether the output is a zero of the input, which the answer makes zero everywhere."""
    program = "def find_zero(xs):\n    xs[:] = [0] * len(xs)\n    return 1.0"
    score = humaneval_scorer.score(humaneval["HumanEval/32"], Answer(program, solution=True))
    assert score.error is None
    assert not any(score.values.values())


def test_nothing_to_be_read_gives_answers_away(
    humaneval_scorer: EvalPlusScorer, expected_folder: Path, data_folder: Path
) -> None:
    """Neither the expected values, nor the problems with their solutions, nor our sources are there inside."""
    sample = own_problem("    return 'nothing'", [[1]], task_id="Own/reading")
    assert all(humaneval_scorer.score(sample, gold(sample)).values.values())
    assert any(expected_folder.iterdir())
    places = [expected_folder, data_folder, Path(__file__).parent, Path.home() / ".cache"]
    program = f"""
import os, sys
def f(x):
    found = []
    for place in {[str(place) for place in places]!r}:
        try: found += os.listdir(place)
        except OSError: pass
    known = {{"/proc", "/sys", "/dev", "/usr", *(path + "/lib" for path in (sys.prefix, sys.base_prefix))}}
    for folder, folders, names in os.walk("/"):
        folders[:] = [name for name in folders if os.path.join(folder, name) not in known]
        found += [os.path.join(folder, n) for n in names if n.startswith(("HumanEvalPlus", "MbppPlus", "Own-"))]
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                fd = os.open(f"/proc/{{name}}/environ", os.O_RDONLY)
                found += [v for v in os.read(fd, 100000).decode().split("\\0") if "CACHE" in v or "PLT_EVAL" in v]
            except OSError: pass
    return "; ".join(found) or "nothing"
"""
    score = humaneval_scorer.score(sample, Answer(program, solution=True))
    assert score.values["plus"], score.detail


def test_the_driver_is_not_told_what_to_expect(humaneval_scorer: EvalPlusScorer) -> None:
    """A secret that only the reference solution makes is nowhere in the memory of the candidate's process."""
    text = "the secret that only the reference makes"
    sample = own_problem(f"    return {text[::-1]!r}[::-1] + str(x)", [[1]], task_id="Own/secret")
    program = """
import os
def f(x):
    with_prefix = HEAD
    fd = os.open("/proc/self/maps", os.O_RDONLY)
    maps = b""
    while chunk := os.read(fd, 65536): maps += chunk
    memory = os.open("/proc/self/mem", os.O_RDONLY)
    for line in maps.decode().splitlines():
        where, rights = line.split()[:2]
        low, high = (int(part, 16) for part in where.split("-"))
        try: content = os.pread(memory, high - low, low) if "w" in rights else b""
        except OSError: continue
        at = content.find(with_prefix)
        while at >= 0:
            word = content[at : at + SIZE]
            if word[len(with_prefix)] == NEXT: return word.decode("latin1") + str(x)
            at = content.find(with_prefix, at + 1)
    return "not found"
"""
    head = text[:12].encode()
    for name, value in {"HEAD": repr(head), "SIZE": str(len(text)), "NEXT": str(ord(text[12]))}.items():
        program = program.replace(name, value)
    assert all(humaneval_scorer.score(sample, gold(sample)).values.values())
    score = humaneval_scorer.score(sample, Answer(program, solution=True))
    assert score.error is None
    assert not any(score.values.values())
    told = Answer(f"secret = {text!r}\n{program}", solution=True)
    assert all(humaneval_scorer.score(sample, told).values.values()), "the search does not find what is there"
