"""One literal table of weight names for each format of original checkpoints."""
