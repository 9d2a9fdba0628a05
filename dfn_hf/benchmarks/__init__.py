"""Benchmarks of the three families and their baselines; `dfn-hf bench` runs them."""
