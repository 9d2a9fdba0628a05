"""Liquid."""
