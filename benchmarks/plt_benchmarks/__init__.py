"""The suites: where each one's data comes from, how it prompts and how it scores."""
