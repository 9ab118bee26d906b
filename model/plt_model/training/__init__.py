"""Training a Parallel Loop Transformer: token data on disk, and what learns from it."""
