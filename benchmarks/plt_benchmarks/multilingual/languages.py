"""The languages: what compiles and runs a program of each, when MultiPL-E's own evaluation calls it right, and what its
tests look like.

Commands, file names, time limits and the words that tell a failure are those of the official evaluation container
(nuprl/MultiPL-E, folder evaluation/src).
"""

from __future__ import annotations

import glob
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field

from plt_benchmarks.protocols import Need, SuiteError

PATH = "/usr/local/bin:/usr/bin:/bin"
"""Where sandboxes look for programs: what lies in a home folder is not to be seen there."""
_TUPLES = ("/usr/share/java/javatuples.jar", "/usr/multiple/javatuples-1.2.jar")  # Debian, the official container
_JAVA = ("-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1")  # starts sooner, means the same
_UNDER_JAVA = tuple(f"-J{option}" for option in _JAVA)
_SHARED = ("/usr/share", "/usr/local/share")


@dataclass(frozen=True)
class Language:
    """One language. `key` is MultiPL-E's name for it and `file` that of a program's file.

    `compile` (which may be empty) and `run` are commands, in which `{source}`, `{program}` and `{folder}` stand for the
    program's text, what it is compiled to, and the folder of both; `a|b` is the first of these programs that is there.
    `check` shows that the toolchain works, and says its version. `libraries`, if any, are patterns of which one must
    name a file. `mend` is what a user types to have all that.

    A program is right if it ends with exit code 0, says none of the words of `failure` and, if `silent`, nothing on its
    standard error. Words of `syntax` tell a text that is no program from a program that fails.

    `test` finds a test in a row's tests, and `impossible` is one that nothing passes. `body` finds where, in a prompt,
    what stands above the documented function ends. `counts` is how many problems HumanEval and MBPP have in it, and
    `seconds` what judging a right program takes, in processor time.
    """

    key: str
    title: str
    file: str
    run: tuple[str, ...]
    check: tuple[str, ...]
    mend: str
    test: str
    impossible: str
    body: str
    counts: tuple[int, int]
    seconds: float = 2.0
    compile: tuple[str, ...] = ()
    libraries: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    failure: tuple[str, ...] = ()
    silent: bool = False
    syntax: tuple[str, ...] = ()
    fence: str = ""
    compile_s: int = 30
    run_s: int = 15

    @property
    def programs(self) -> list[str]:
        """What has to be there, alternatives as in commands."""
        commands = (self.compile, self.run, self.check)
        return list(dict.fromkeys(command[0] for command in commands if command and "{" not in command[0]))

    @property
    def present(self) -> bool:
        """Whether its toolchain is where the sandbox sees it. Asks the file system alone."""
        found = all(any(shutil.which(name, path=PATH) for name in names.split("|")) for names in self.programs)
        return found and (not self.libraries or any(glob.glob(pattern) for pattern in self.libraries))

    def need(self) -> Need:
        """The toolchain, for listings."""
        return Need(f"{self.title} ({self.key})", self.present, self.mend)


def language(key: str) -> Language:
    """The language of that name. Raises SuiteError."""
    try:
        return _BY_KEY[key]
    except KeyError:
        raise SuiteError(f"unknown language {key!r}; known: {', '.join(_BY_KEY)}") from None


LANGUAGES = (
    Language(
        key="py",
        title="Python",
        file="problem.py",
        run=("python3", "{source}"),
        check=("python3", "--version"),
        mend="apt install python3",
        test=r"^ *assert candidate\(.*",
        impossible="    assert 1 == 2",
        body=r"^def ",
        counts=(161, 0),
        seconds=0.2,
        syntax=("SyntaxError",),
        fence="python",
    ),
    Language(
        key="js",
        title="JavaScript",
        file="problem.js",
        run=("node", "{source}"),
        check=("node", "--version"),
        mend="apt install nodejs",
        test=r"^ *assert\.deepEqual\(.*",
        impossible="  assert.deepEqual(1,2);",
        body=r"\A",
        counts=(161, 397),
        seconds=0.2,
        syntax=("SyntaxError",),
        fence="javascript",
    ),
    Language(
        key="ts",
        title="TypeScript",
        file="problem.ts",
        compile=("tsc", "--target", "esnext", "--skipLibCheck", "{source}"),
        run=("node", "problem.js"),
        check=("tsc", "--version"),
        mend="apt install node-typescript",
        test=r"^ *assert\.deepEqual\(.*",
        impossible="  assert.deepEqual(1,2);",
        body=r"\A",
        counts=(159, 390),
        seconds=3.3,
        syntax=("SyntaxError",),
        fence="typescript",
    ),
    Language(
        key="java",
        title="Java",
        file="problem.java",
        compile=(
            "javac",
            *_UNDER_JAVA,
            "-encoding", "UTF8", "-cp", ":".join(_TUPLES), "-d", "{folder}", "{source}",
        ),
        run=("java", *_JAVA, "-ea", "-cp", ":".join(("{folder}", *_TUPLES)), "Problem"),
        check=("javac", "-version"),
        mend="apt install default-jdk-headless libjavatuples-java",
        test=r"^ *assert\(.*",
        impossible="    assert((1l) == (2l));",
        body=r"^class Problem",
        counts=(158, 386),
        seconds=2.0,
        libraries=_TUPLES,
        fence="java",
    ),
    Language(
        key="cpp",
        title="C++",
        file="problem.cpp",
        compile=("g++", "{source}", "-o", "{program}", "-std=c++17"),
        run=("{program}",),
        check=("g++", "-dumpfullversion"),
        mend="apt install g++",
        test=r"^ *assert\(.*",
        impossible="    assert((1) == (2));",
        body=r"^//",
        counts=(161, 397),
        seconds=4.3,
        fence="cpp",
    ),
    Language(
        key="go",
        title="Go",
        file="problem_test.go",
        run=("go", "test", "{source}"),
        check=("go", "version"),
        mend="apt install golang-go",
        test=r"^ *\{ actual: .*",
        impossible="     { actual: 1, expected: 2 },",
        body=r"^//",
        counts=(154, 374),
        seconds=4.0,
        environment={"GOFLAGS": "-p=2", "GOTOOLCHAIN": "local", "GOPROXY": "off", "CGO_ENABLED": "0"},
        failure=("FAIL",),
        syntax=("[setup failed]", "[build failed]"),
        fence="go",
        run_s=30,
    ),
    Language(
        key="rs",
        title="Rust",
        file="problem.rs",
        compile=("rustc", "{source}", "-o", "{program}"),
        run=("{program}",),
        check=("rustc", "--version"),
        mend="apt install rustc",
        test=r"^ *assert_eq!\(.*",
        impossible="    assert_eq!(1, 2);",
        body=r"^///",
        counts=(156, 354),
        seconds=1.0,
        fence="rust",
    ),
    Language(
        key="php",
        title="PHP",
        file="problem.php",
        run=("php", "{source}"),
        check=("php", "--version"),
        mend="apt install php-cli",
        test=r"^ *if \(candidate\(.*",
        impossible='    if (1 !== 2) { throw new Exception("Test failed!"); }',
        body=r"^//",
        counts=(161, 397),
        seconds=0.1,
        syntax=("PHP Parse error", "Parse error:"),
        fence="php",
    ),
    Language(
        key="pl",
        title="Perl",
        file="problem.pl",
        run=("perl", "{source}"),
        check=("perl", "-MTest::Deep", "-e", "print $^V"),
        mend="apt install perl libtest-deep-perl",
        test=r"^ *exit 1;\n *\}",
        impossible='        if(eq_deeply(1,2)) {\n        print "ok!" }else{\n        exit 1;\n        }',
        body=r"\A",
        counts=(161, 396),
        seconds=0.2,
        libraries=("/usr/share/perl5/Test/Deep.pm", "/usr/local/share/perl/*/Test/Deep.pm"),
        failure=("ERROR",),
        syntax=("syntax error",),
        fence="perl",
    ),
    Language(
        key="rb",
        title="Ruby",
        file="problem.rb",
        run=("ruby", "{source}"),
        check=("ruby", "-e", 'require "test/unit/testcase"; print RUBY_VERSION'),
        mend="apt install ruby ruby-test-unit",
        test=r"^ *assert_equal\(.*",
        impossible="    assert_equal(1, 2)",
        body=r"\A",
        counts=(161, 397),
        seconds=0.4,
        libraries=tuple(
            f"{folder}/{inner}"
            for folder in ("/usr/lib/ruby", "/usr/local/lib/ruby")
            for inner in ("vendor_ruby/test/unit.rb", "gems/*/gems/test-unit-*/lib/test/unit.rb")
        ),
        syntax=("syntax error", "SyntaxError"),
        fence="ruby",
    ),
    Language(
        key="lua",
        title="Lua",
        file="problem.lua",
        run=("lua5.3|lua5.4|lua", "{source}"),
        check=("lua5.3|lua5.4|lua", "-e", "require('luaunit') print(_VERSION)"),
        mend="apt install lua5.3 lua-unit",
        test=r"^ *lu\.assertEquals\(.*",
        impossible="    lu.assertEquals(1, 2)",
        body=r"\A",
        counts=(161, 397),
        seconds=0.1,
        libraries=tuple(f"{folder}/lua/5.*/luaunit.lua" for folder in _SHARED),
        fence="lua",
    ),
    Language(
        key="sh",
        title="Bash",
        file="problem.sh",
        run=("bash", "{source}"),
        check=("bash", "-c", "echo $BASH_VERSION"),
        mend="apt install bash",
        test=r"^ *\[\[ .*\]\] *$",
        impossible='    [[ "1" = "2" ]]',
        body=r"\A",
        counts=(158, 382),
        seconds=0.1,
        syntax=("syntax error",),
        fence="bash",
    ),
    Language(
        key="r",
        title="R",
        file="problem.r",
        run=("Rscript", "{source}"),
        check=("Rscript", "-e", "cat(R.version.string)"),
        mend="apt install r-base-core",
        test=r"^ *stopifnot\(.*",
        impossible="    stopifnot(isTRUE(all.equal(1, 2)))",
        body=r"\A",
        counts=(161, 397),
        seconds=0.6,
        syntax=("unexpected",),
        fence="r",
    ),
    Language(
        key="cs",
        title="C#",
        file="problem.cs",
        compile=("csc|mcs", "/d:DEBUG", "-r:System.Numerics.dll", "{source}", "/out:{program}"),
        run=("mono", "{program}"),
        check=("mono", "--version"),
        mend="apt install mono-mcs mono-runtime libmono-system-numerics4.0-cil libmono-system-core4.0-cil",
        test=r"^ *Debug\.Assert\(.*",
        impossible="    Debug.Assert((1L) == (2L));",
        body=r"^class Problem",
        counts=(158, 386),
        seconds=0.7,
        environment={"MONO_TRACE_LISTENER": "Console.Error"},
        failure=("System.Diagnostics.DefaultTraceListener.Fail", "Unhandled Exception"),
        fence="csharp",
    ),
    Language(
        key="d",
        title="D",
        file="problem.d",
        compile=("dmd|ldmd2", "-unittest", "-of={program}", "{source}"),
        run=("{program}",),
        check=("dmd|ldmd2", "--version"),
        mend="apt install ldc",
        test=r"^ *assert\(.*",
        impossible="    assert(1L == 2L);",
        body=r"^/\*",
        counts=(156, 358),
        seconds=0.4,
        fence="d",
    ),
    Language(
        key="rkt",
        title="Racket",
        file="problem.rkt",
        run=("racket", "{source}"),
        check=("racket", "-e", '(require rackunit) (display (version))'),
        mend="apt install racket",
        test=r"^ *\(check-within .*",
        impossible="    (check-within 1 2 0.001)",
        body=r"^;;",
        counts=(161, 397),
        seconds=1.4,
        silent=True,
        syntax=("read-syntax",),
        fence="racket",
    ),
    Language(
        key="scala",
        title="Scala",
        file="problem.scala",
        compile=("scalac", *_UNDER_JAVA, "-d", "{folder}", "{source}"),
        run=("scala", *_UNDER_JAVA, "-cp", "{folder}", "Problem"),
        check=("scalac", "-version"),
        mend="apt install scala default-jdk-headless",
        test=r"^ *assert\(.*",
        impossible="    assert((1l) == (2l));",
        body=r"^object Problem",
        counts=(160, 396),
        seconds=8.7,
        silent=True,
        fence="scala",
        compile_s=90,
    ),
    Language(
        key="jl",
        title="Julia",
        file="problem.jl",
        run=("julia", "{source}"),
        check=("julia", "--version"),
        mend="Julia 1.8 or later in /usr/local, from julialang.org",
        test=r"^\s*@test\(.*",
        impossible="\t@test(1 == 2)",
        body=r"\A",
        counts=(159, 390),
        syntax=("syntax:",),
        fence="julia",
    ),
    Language(
        key="swift",
        title="Swift",
        file="problem.swift",
        compile=("swiftc", "{source}", "-o", "{program}"),
        run=("{program}",),
        check=("swiftc", "--version"),
        mend="Swift 5.7 or later in /usr, from swift.org",
        test=r"^ *assert\(.*",
        impossible="assert(1 == 2)",
        body=r"\A",
        counts=(158, 396),
        fence="swift",
        compile_s=90,
    ),
)  # fmt: skip
"""In the order of listings. HumanEval's Python is not among the official data, but in older copies of it."""

_BY_KEY = {each.key: each for each in LANGUAGES}
