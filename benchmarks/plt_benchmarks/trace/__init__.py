"""Generated programs whose outcome must be traced, to measure what depth buys: see programs.py and suite.py."""
