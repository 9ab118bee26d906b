"""Per-loop measurements on the states, attention and outputs of a looped transformer."""
