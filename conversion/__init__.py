"""Conversion of original checkpoints and Llama checkpoints to transformers folders."""
