"""`python -m plt_eval`: the same as `plt-eval`, with the Python that is named."""

from plt_eval.cli.main import main

if __name__ == "__main__":
    main()
