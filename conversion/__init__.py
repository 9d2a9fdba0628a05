"""Native checkpoints to transformers folders: one module per source, each with one literal table of names."""
