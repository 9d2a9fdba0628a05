"""Benchmarks of recall: associative recall, retrieval from long contexts, and FlowNetwork's memory."""
