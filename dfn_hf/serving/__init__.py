"""`dfn-hf serve`: `transformers serve` for one model, behind a guard that bounds its requests."""
