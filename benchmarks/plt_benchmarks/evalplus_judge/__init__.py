"""Judging for HumanEval+ and MBPP+ that a hostile answer cannot talk to.

The official scorer runs an answer and compares its outputs in one process, so an answer can override `==`, read the
expected values from a stack frame, or write the verdict itself. Here the two are apart:

    scorer.py -- candidate.py --> sandbox: driver.py runs the answer, sends its outputs (encoding.py, frames.py)
        |
        +------- pool.py -------> judge.py: decodes them as plain data (decoding.py), compares officially (check.py)

oracle.py has the reference solution run in the same way for expected outputs and times, and keeps them. official.py
knows the installed scorer and its faults by name; problem.py is one task.

What is deliberately not as in the official command, and never lowers a right answer's score:
- Limits are the official ones in processor time; in real time they are far wider.
- An answer has the official 4 GiB of address space to itself; officially it shares them with some 2 to 3 GiB of the
  scorer's own.
- String hashes are pinned, so that an answer that depends on the order of a set gets one verdict, not a random one.
- An object that is no data equals nothing (officially its own `==` decides); a few standard types are kept as they are.
- [[]] does not equal [1.5] (officially numpy.allclose compares nothing with it and is content).
"""
