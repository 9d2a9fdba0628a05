"""Benchmarks of time and memory over the sequence length."""
