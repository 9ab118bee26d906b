"""What runs with the official package: in its environment, or in the sandbox on a copy of its code. Imports nothing of ours."""
