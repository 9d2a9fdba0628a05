"""Functions on tensors: neighbour search, flow attention and their helpers, without configuration or module state."""
