"""Shared parts of all benchmarks: timing, training loop, learning-rate search and CSV results."""
