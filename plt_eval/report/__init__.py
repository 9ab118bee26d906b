"""Reports: run directories in, pages, tables and the paper's figures out.

Nothing here measures or runs a model: everything is drawn from the files of results/, so it can be drawn again on
another machine. `collect` finds the runs that belong together, `figures` and `tables` draw them, `reference` holds the
published numbers that stand beside them, `style` the look of every figure.
"""
