"""plt-eval: how many loops should a Parallel Loop Transformer run?"""

__version__ = "0.1.0"
