"""Modules, caches and input handling shared by the model families."""
