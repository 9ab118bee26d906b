"""lm-evaluation-harness (the package lm-eval) on our engines, in both directions.

    plt-eval run --suite lm-eval:TASK,...     its tasks as runs of our store: command.py, with tasks.py and results.py
    plt-eval lm-eval run --model plt ...      its own command, which knows our models then: official.py, with models.py

lm-eval itself builds every request, and computes every metric from the answers; between the two stands a model that it
is handed (models.py), and a journal of what that model has answered (answers.py).
"""
