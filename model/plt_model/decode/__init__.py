"""Decoding as fast as the weights can be read: a static cache, one trip for all loops of a token, slots that refill."""
