"""Modules, caches and input handling that the families share."""
