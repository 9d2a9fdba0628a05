"""Compiled forms of the ops: C for CPUs, Triton for GPUs."""
