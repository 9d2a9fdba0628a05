"""Plots of models, texts, fields and training runs."""
