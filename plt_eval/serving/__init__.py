"""OpenAI servers for our models: `plt-eval serve`.

command.py starts a server as a process of its own (child.py) and says when it is ready. Which server that is:

- vLLM's own, with plt_model.vllm as its plugin;
- or transformers' own (`transformers serve`), started by transformers_server.py. That one takes the model, decoded by
  our sessions, from writer.py; in front of it stands front.py, which reads requests by asked.py's rules and answers
  those for log-probabilities, which transformers' server does not know, and those with tools (answers.py).
"""
