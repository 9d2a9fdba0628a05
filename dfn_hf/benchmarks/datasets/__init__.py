"""Data and tasks of the benchmarks."""
