"""The embedded tokenizers: a byte-level BPE of 4,096 trained on the corpus, and plain bytes."""
