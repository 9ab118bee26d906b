# ruff: noqa: E501
"""Programs for LiveCodeBench's tests: solutions of real problems, and odd programs for two made ones.

The data has no solutions, so those of SOLUTIONS were written for these tests.
"""

from __future__ import annotations

import json

SOLUTIONS = {
    "1873_A": """
for _ in range(int(input())):
    print("YES" if sum(a != b for a, b in zip(input(), "abc")) <= 2 else "NO")
""",
    "1873_B": """
from math import prod
for _ in range(int(input())):
    input()
    digits = sorted(map(int, input().split()))
    digits[0] += 1
    print(prod(digits))
""",
    "1873_D": """
import sys
def main():
    read = sys.stdin.readline
    for _ in range(int(read())):
        n, k = map(int, read().split())
        s, at, count = read().strip(), 0, 0
        while at < n:
            count, at = (count + 1, at + k) if s[at] == "B" else (count, at + 1)
        print(count)
main()
""",
    "1883_B": """
from collections import Counter
for _ in range(int(input())):
    n, k = map(int, input().split())
    odd = sum(count % 2 for count in Counter(input().strip()).values())
    print("YES" if odd - 1 <= k else "NO")
""",
    "1883_C": """
from sys import stdin
for _ in range(int(stdin.readline())):
    n, k = map(int, stdin.readline().split())
    a = list(map(int, stdin.readline().split()))
    best = min(-x % k for x in a)
    if k == 4:
        best = min(best, max(0, 2 - sum(x % 2 == 0 for x in a)))
    print(best)
""",
    "1899_C": """
def solve(a):
    best = run = a[0]
    for x, y in zip(a, a[1:]):
        run = y + max(0, run) if (x - y) % 2 else y
        best = max(best, run)
    return best

if __name__ == "__main__":
    for _ in range(int(input())):
        input()
        print(solve(list(map(int, input().split()))))
""",
    "abc304_a": """
people = [input().split() for _ in range(int(input()))]
first = min(range(len(people)), key=lambda i: int(people[i][1]))
for name, _ in people[first:] + people[:first]:
    print(name)
""",
    "abc308_b": """
import sys
lines = sys.stdin.read().split("\\n")
prices = list(map(int, lines[3].split()))
of = dict(zip(lines[2].split(), prices[1:]))
print(sum(of.get(plate, prices[0]) for plate in lines[1].split()))
""",
    "abc323_b": """
n = int(input())
wins = [input().count("o") for _ in range(n)]
print(*sorted(range(1, n + 1), key=lambda i: (-wins[i - 1], i)))
""",
    "abc337_a": """
import sys
scores = [tuple(map(int, line.split())) for line in sys.stdin.readlines()[1:] if line.strip()]
ours, theirs = map(sum, zip(*scores))
print("Takahashi" if ours > theirs else "Aoki" if theirs > ours else "Draw")
""",
    "2756": """
class Solution:
    def buyChoco(self, prices: List[int], money: int) -> int:
        left = money - sum(sorted(prices)[:2])
        return left if left >= 0 else money
""",
    "2777": """
class Solution:
    def distinctDifferenceArray(self, nums: List[int]) -> List[int]:
        return [len(set(nums[: i + 1])) - len(set(nums[i + 1 :])) for i in range(len(nums))]
""",
    "2785": """
class Solution:
    def semiOrderedPermutation(self, nums: List[int]) -> int:
        low, high = nums.index(1), nums.index(len(nums))
        return low + len(nums) - 1 - high - (low > high)
""",
    "2819": """
class Solution:
    def removeTrailingZeros(self, num: str) -> str:
        return num.rstrip("0")
""",
    "2881": """
class Solution:
    def splitWordsBySeparator(self, words: List[str], separator: str) -> List[str]:
        return [part for word in words for part in word.split(separator) if part]
""",
    "3183": """
class Solution:
    def findKOr(self, nums: List[int], k: int) -> int:
        return sum(1 << bit for bit in range(32) if sum(num >> bit & 1 for num in nums) >= k)
""",
    "3227": """
class Solution:
    def findMissingAndRepeatedValues(self, grid: List[List[int]]) -> Tuple[int, int]:
        seen = Counter(value for row in grid for value in row)
        twice = next(value for value, count in seen.items() if count == 2)
        return twice, next(value for value in count_from(1) if value not in seen)

def count_from(start):
    while True:
        yield start
        start += 1
""",
}


def fenced(code: str) -> str:
    """As a chat model would answer."""
    return f"Here is a program:\n\n```python\n{code.strip()}\n```\nIt is fast."


def case(asked: str, output: str, kind: str = "stdin") -> dict[str, str]:
    return {"input": asked, "output": output, "testtype": kind}


SUMS = {
    "question_title": "Sums",
    "question_content": "The first line holds n. Print the sum of each of the n lines that follow.",
    "platform": "atcoder",
    "question_id": "made_a",
    "contest_id": "made",
    "contest_date": "2024-01-06T00:00:00",
    "starter_code": "",
    "difficulty": "easy",
    "public_test_cases": json.dumps([case("2\n1 2\n3 4\n", "3\n7\n"), case("1\n5 5", "10")]),
    "metadata": "{}",
}
SHIFTED = {
    **SUMS,
    "question_id": "9001",
    "platform": "leetcode",
    "starter_code": "class Solution:\n    def shifted(self, a: List[int], k: int) -> List[int]:\n        ",
    "public_test_cases": json.dumps(
        [
            case("[1, 2]\n1", "[2, 3]", "functional"),
            case("[]\n7", "[]", "functional"),
            case("[5]\n-5", "[0]", "functional"),
        ]
    ),
    "metadata": '{"func_name": "shifted"}',
}
ANSWER = "for _ in range(int(input())): print(sum(map(int, input().split())))"

READING = {
    "input": ANSWER,
    "nothing": "",
    "a comment": "# to do",
    "imports alone": "import sys",
    "no Python": "print(",
    "stdin.read": "import sys\nfor line in sys.stdin.read().split('\\n')[1:]:\n    if line: print(sum(map(int, line.split())))",
    "readline": "import sys\ninput = sys.stdin.readline\n" + ANSWER,
    "readline from": "from sys import stdin\ninput = stdin.readline\n" + ANSWER,
    "read from": "from sys import stdin\nrows = stdin.read().split('\\n')\nfor row in rows[1:]:\n    if row: print(sum(map(int, row.split())))",
    "readlines from": "from sys import *\nfor row in stdin.readlines()[1:]:\n    if row: print(sum(map(int, row.split())))",
    "iterated": "import sys\nnext(sys.stdin)\nfor line in sys.stdin: print(sum(map(int, line.split())))",
    "iterated from": "from sys import stdin\nnext(stdin)\nfor line in stdin: print(sum(map(int, line.split())))",
    "open(0)": "rows = open(0).read().splitlines()[1:]\nfor row in rows: print(sum(map(int, row.split())))",
    "to the end": "try:\n    input()\n    while True: print(sum(map(int, input().split())))\nexcept EOFError: pass",
    "past the end": "input()\nwhile True: print(sum(map(int, input().split())))",
    "past the end from": "from sys import stdin\nstdin.readline()\nwhile s := stdin.readline(): print(sum(map(int, s.split())))",
    "main": f"def main():\n    {ANSWER}\nmain()",
    "guarded": f"def main():\n    {ANSWER}\nif __name__ == '__main__':\n    main()",
    "guarded otherwise": f"def main():\n    {ANSWER}\nif '__main__' == __name__:\n    main()",
    "guarded, not last": f"def main():\n    {ANSWER}\nif __name__ == '__main__':\n    main()\nx = 1",
    "not called": f"def main():\n    {ANSWER}",
    "in a thread": f"import threading\ndef main():\n    {ANSWER}\nt = threading.Thread(target=main)\nt.start()\nt.join()",
    "global": "total = 0\ndef add(n):\n    global total\n    total += n\nadd(1)\n" + ANSWER,
    "nonlocal": "def main():\n    t = 0\n    def add():\n        nonlocal t\n        t += 1\n    add()\nmain()\n" + ANSWER,
    "a class Solution": f"class Solution:\n    pass\n{ANSWER}",
    "return": ANSWER + "\nreturn",
    "yield": ANSWER + "\nyield 1",
    "future": "from __future__ import annotations\n" + ANSWER,
    "an f-string": "for _ in range(int(input())): print(f\"{sum(map(int, input().split()))}\")",
    "recursion": "def down(n): return n if n == 0 else down(n - 1)\ndown(20000)\n" + ANSWER,
    "no import": "gcd(4, 6); Counter('aa'); deque(); inf; heappush([], 1); comb(3, 1)\n" + ANSWER,
    "resource": "import resource\n" + ANSWER,
    "getcwd": "import os\nos.getcwd()\n" + ANSWER,
    "eval": "for _ in range(int(input())): print(eval('+'.join(input().split())))",
}  # fmt: skip
PRINTING = {
    "sys.stdout": "import sys\nfor _ in range(int(input())): sys.stdout.write(f'{sum(map(int, input().split()))}\\n')",
    "stdout from": "from sys import stdout\nfor _ in range(int(input())): stdout.write(f'{sum(map(int, input().split()))}\\n')",
    "stdout.buffer": "import sys\nfor _ in range(int(input())): sys.stdout.buffer.write(b'3')",
    "os.write": "import os\nfor _ in range(int(input())): os.write(1, b'3\\n')",
    "stderr too": "import sys\nprint('x', file=sys.stderr)\n" + ANSWER,
    "spaces around": ANSWER.replace("input().split()))", "input().split())), '  '"),
    "a tab before": ANSWER.replace("print(", "print('\\t', "),
    "blank lines after": ANSWER + "\nprint()\nprint()",
    "blank lines before": "print()\n" + ANSWER,
    "a blank line between": ANSWER.replace("split())))", "split())), end='\\n\\n')"),
    "carriage returns": ANSWER.replace("split())))", "split())), end='\\r\\n')"),
    "all on one line": ANSWER.replace("split())))", "split())), end=' ')"),
    "3.0": ANSWER.replace("sum(", "1.0 * sum("),
    "0003": ANSWER.replace("print(sum(map(int, input().split())))", "print('%04d' % sum(map(int, input().split())))"),
    "3e0": ANSWER.replace("print(sum(map(int, input().split())))", "print('%se0' % sum(map(int, input().split())))"),
    "1_0": ANSWER.replace("print(sum(map(int, input().split())))", "s = sum(map(int, input().split())); print('_'.join(str(s)))"),
    "full width": "for _ in range(int(input())): print(''.join(chr(ord(c) + 65248) for c in str(sum(map(int, input().split())))))",
    "nan": ANSWER.replace("print(", "print('sNaN'); ("),
    "a surrogate": ANSWER + "\nprint('\\ud800')",
    "too much": ANSWER + "\nprint(1)",
    "too little": "print(3)",
    "words": "print('three')",
    "the first test alone": "if int(input()) == 2: print(3); print(7)\nelse: print(0)",
    "the second test alone": "print(10)",
    "nothing": "input()",
    "exit": ANSWER + "\nexit()",
    "exit first": "exit()\n" + ANSWER,
    "sys.exit(1)": ANSWER + "\nimport sys\nsys.exit(1)",
    "quit": ANSWER + "\nquit()",
    "raises": ANSWER + "\nraise ValueError('x')",
    "interrupted": ANSWER + "\nraise KeyboardInterrupt",
    "os._exit": ANSWER + "\nimport os\nos._exit(0)",
    "divides by zero": "print(1 / 0)",
    "never ends": "while True: pass",
    "never ends the second time": "if int(input()) == 2: print(3); print(7)\nelse:\n    while True: pass",
    "a state": "import json\nif hasattr(json, 'seen'): print(10)\nelse: print('3\\n7')\njson.seen = 1",
}  # fmt: skip
METHOD = "class Solution:\n    def shifted(self, a, k):\n        "
RETURNING = {
    "a list": METHOD + "return [x + k for x in a]",
    "typed": "class Solution:\n    def shifted(self, a: List[int], k: int) -> List[int]:\n        return [x + k for x in a]",
    "a function": "def shifted(a, k): return [x + k for x in a]",
    "another name": "class Solution:\n    def shift(self, a, k): return [x + k for x in a]",
    "two arguments too few": "class Solution:\n    def shifted(self): return []",
    "needs arguments": "class Solution:\n    def __init__(self, n): pass\n    def shifted(self, a, k): return [x + k for x in a]",
    "a tuple": METHOD + "return tuple(x + k for x in a)",
    "tuples inside": METHOD + "return [(x + k,) for x in a]",
    "floats": METHOD + "return [float(x + k) for x in a]",
    "nearly": METHOD + "return [x + k + 1e-12 for x in a]",
    "truth": METHOD + "return [x + k if x + k else False for x in a]",
    "strings": METHOD + "return [str(x + k) for x in a]",
    "a string": METHOD + "return str([x + k for x in a])",
    "a generator": METHOD + "return (x + k for x in a)",
    "a set": METHOD + "return {x + k for x in a}",
    "a deque": METHOD + "return deque(x + k for x in a)",
    "a range": METHOD + "return range(2, 4)",
    "none": METHOD + "pass",
    "a subclass": METHOD + "return type('L', (list,), {})(x + k for x in a)",
    "numbers of a subclass": METHOD + "return [type('I', (int,), {})(x + k) for x in a]",
    "fractions": METHOD + "from fractions import Fraction\n        return [Fraction(x + k) for x in a]",
    "decimals": METHOD + "from decimal import Decimal\n        return [Decimal(x + k) for x in a]",
    "numpy numbers": "import numpy as np\n" + METHOD + "return [np.int64(x + k) for x in a]",
    "numpy arrays": "import numpy as np\n" + METHOD + "return np.array(a) + k",
    "in place": METHOD + "for i in range(len(a)): a[i] += k\n        return a",
    "prints too": METHOD + "print('x')\n        return [x + k for x in a]",
    "keeps count": "class Solution:\n    n = 0\n    def shifted(self, a, k):\n        self.n += 1\n        return [x + k for x in a] if self.n < 3 else 1",
    "counts on": "class Solution:\n    def __init__(self): self.n = 0\n    def shifted(self, a, k):\n        self.n += 1\n        return [[2, 3], [], [0]][self.n - 1]",
    "raises": METHOD + "raise ValueError",
    "exits": METHOD + "exit()",
    "never ends": METHOD + "while True: pass",
    "never ends while it is loaded": "while True: pass\n" + METHOD + "return []",
    "raises while it is loaded": "1 / 0\n" + METHOD + "return []",
    "no Python": METHOD + "return [",
    "deeply nested": METHOD + "b = []\n        for _ in range(10**5): b = [b]\n        return b",
    "in itself": METHOD + "b = []\n        b.append(b)\n        return b",
    "a dictionary": METHOD + "return dict(enumerate(a))",
    "future": "from __future__ import annotations\n" + METHOD + "return [x + k for x in a]",
    "recursion": METHOD + "f = lambda n: n and f(n - 1)\n        f(20000)\n        return [x + k for x in a]",
    "cached": "class Solution:\n    @cache\n    def g(self, n): return n\n    def shifted(self, a, k): return [self.g(x + k) for x in a]",
}  # fmt: skip
PEEKING = """
import sys
frame = sys._getframe()
while "all_outputs" not in frame.f_locals:
    frame = frame.f_back
print(frame.f_locals["gt_out"])
"""
EQUAL = "class E(BASE):\n    __eq__ = lambda *_: True\n    __ne__ = lambda *_: False\n" + METHOD + "return E()"
DIFFERENT = {
    "equals everything": (SHIFTED, EQUAL.replace("BASE", "object"), True, False),
    "a list that equals everything": (SHIFTED, EQUAL.replace("BASE", "list"), True, False),
    "a number that equals everything": (SHIFTED, EQUAL.replace("BASE", "int"), True, False),
    "reads the checker's variables": (SUMS, PEEKING, True, False),
    "an array of one number": (
        {**SHIFTED, "public_test_cases": json.dumps([case("[1]\n1", "[2]", "functional")])},
        "import numpy as np\n" + METHOD + "return np.array(a) + k",
        True,
        False,
    ),
    "reads bytes": (
        SUMS,
        "import sys\nfor line in sys.stdin.buffer.read().split(b'\\n')[1:]:\n    if line: print(sum(map(int, line.split())))",
        False,
        True,
    ),
}
"""What the official package takes, or refuses, and we do not: row, program, its verdict, ours."""
