"""Issues of real repositories: SWE-bench Verified, Lite and Multilingual, and Multi-SWE-bench.

An answer is a patch. The official harness of each benchmark judges it, in a process of its own, in the row's container.
"""
