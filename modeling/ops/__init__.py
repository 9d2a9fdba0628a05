"""Functions of tensors: neighbour search, flow attention and their helpers. No configuration, no module state."""
