"""Benchmarks of time and memory over the length."""
