"""What runs with the official package: in its environment, or in the sandbox on a copy of its code.

Nothing else of ours is imported here: there is nothing else of ours in either place.
"""
