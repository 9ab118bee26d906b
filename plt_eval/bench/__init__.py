"""`plt-eval bench`: what loops cost, in one process, and only of what has been shown to compute the right thing.

rounds.py      interleaved rounds, medians, ratios round by round
gates.py       what must agree before a speed is printed
subjects.py    the models: shapes, checkpoints, weights shared by all loop counts
floor.py       the bytes that a step must read, and how fast this machine reads
decode.py, throughput.py, prefill.py, train.py, diagnostics.py      the benches
command.py     the options, the table, the JSON
"""
