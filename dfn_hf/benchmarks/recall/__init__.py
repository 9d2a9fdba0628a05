"""Benchmarks of recall: associative recall, retrieval at length, memory."""
