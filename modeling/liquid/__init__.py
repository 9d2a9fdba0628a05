"""The Liquid family: configuration, encoder-decoder models and their blocks."""
