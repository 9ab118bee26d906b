"""`plt-eval diagnose`: every loop of a model, opened on held-out text, in one run directory for each loop count.

records.py says what its files hold, store.py reads them, samples.py makes text into samples, run.py measures them, and
table.py prints the loops.
"""
