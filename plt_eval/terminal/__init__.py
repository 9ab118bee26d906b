"""Tasks in a terminal, done and judged by the official Terminal-Bench runners, an endpoint as the agent's model."""
