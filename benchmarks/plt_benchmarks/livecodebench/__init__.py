"""LiveCodeBench: write programs for contest problems, say what a program gives, and what a test should give.

    suites.py       what `--suite lcb`, `reasoning` and the rest stand for, with --release, --since, --until
    releases.py     the official files, pinned, and fetching them
    rows.py         rows of any of the files, within a window of dates
    cases.py        the tests of one problem; nothing that a data file holds is executed
    generation.py   code generation: prompts, the code in an answer
    judge.py        has driver.py run the code in the sandbox, and compares what comes out, outside of it
    prediction.py   code execution and test-output prediction: answers that are plain data

Paper: Jain et al. 2024, "LiveCodeBench: Holistic and Contamination Free Evaluation of Large Language Models for Code".
Prompts, extraction of answers, limits and comparison are those of its `lcb_runner`.
"""
