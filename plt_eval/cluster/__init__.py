"""Judging over many machines: every judgement is a Ray task, and what comes back goes into the one store.

    orders.py       what a machine is told: which suite, how to judge, and what it must be like to judge alike
    worker.py       what runs there: a process keeps a scorer and judges one answer at a time
    patches.py      ... and for patches: the official harness, with that machine's Docker
    connection.py   reaching a cluster, or starting one in this machine
    machines.py     which machines judge, which are left out, and why
    scorer.py       the runner's Scorer, which sends answers away and waits

The runner, the engine and the store stay where the command was given. docs/cluster.md has commands and sizing.
"""
