"""Small generated programs whose outcome must be traced, for measuring what depth buys: see programs.py and suite.py."""
