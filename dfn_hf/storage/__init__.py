"""Writes output folders completely or not at all, and deletes only what it wrote. Standard library only."""
