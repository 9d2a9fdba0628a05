"""Models that compute the functions of the original implementations, for `dfn-hf convert --native`."""
