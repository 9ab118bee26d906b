"""Conversations with a model that calls functions, as BFCL holds them."""
