"""Dynamic Flow Networks."""
