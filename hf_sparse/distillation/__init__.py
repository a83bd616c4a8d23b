"""Learning from a dense teacher: losses that pull a sparse model's hidden states and predictions towards it."""
