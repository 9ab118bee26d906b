"""A harness for one job, in a process of its own: reads a pickled job, writes the pickled outcome or error.

python run_as_user.py NAME < job > outcome
"""

import pickle
import sys

from plt_eval.errors import UserError
from plt_eval.sandbox import open_sandbox


def main() -> None:
    job = pickle.load(sys.stdin.buffer)
    try:
        answer: object = open_sandbox(sys.argv[1]).run(job)
    except (OSError, UserError) as error:
        answer = str(error)
    sys.stdout.buffer.write(pickle.dumps(answer))


if __name__ == "__main__":
    main()
