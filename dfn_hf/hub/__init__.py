"""Models on disk and on the Hub: loading, saving, cards and serving."""
