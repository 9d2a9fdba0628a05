"""Baselines and ablated models of the benchmarks."""
