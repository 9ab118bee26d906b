"""BigCodeBench: see suites.py."""
