"""Loads models and tokenizers, after checking that every file is whole."""
