"""`plt-eval estimate`: what an evaluation or a training would take, from what was measured.

constants.json   the measurements, each with its machine, date and command; what is only assumed is called so
constants.py     their types, and those of this machine (`--calibrate`)
shapes.py        a model's shape: by name, from a checkpoint, or by a number of parameters
memory.py        bytes: weights, keys and values by engine, a training process
speed.py         seconds: the few numbers that are fitted to the measurements, and what they predict
tokens.py        what a checkpoint's tokenizer makes of text
workload.py      what is asked: problems, tokens, steps of an agent
evaluation.py, training.py      both put together, by loop count
calibrate.py     the measurements of this machine
report.py        tables, the reckoning in steps, JSON

Every number is a low, a middle and a high one. The measurements' own spread and what nobody measured make the range.
"""
