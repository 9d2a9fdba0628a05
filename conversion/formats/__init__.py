"""Formats of the original checkpoints; each module holds literal tables of weight names."""
