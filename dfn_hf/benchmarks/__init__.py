"""Measurements of DFN beside its peers; `dfn-hf bench` runs them."""
