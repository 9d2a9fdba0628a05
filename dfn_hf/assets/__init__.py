"""Bundled checkpoints, tokenizers, corpus and verses."""
