"""Model code: what travels to the Hub with a model. Flat files that import torch, transformers and each other."""
