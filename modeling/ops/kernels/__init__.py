"""Kernels for the ops: C for CPUs, Triton for GPUs."""
