"""The functions of original checkpoints, for `convert --native`."""
