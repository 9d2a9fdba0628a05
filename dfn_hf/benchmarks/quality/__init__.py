"""Benchmarks of quality: language modelling, translation, fields, pairs, quantization."""
