"""Kernels of our own for GPUs; each computes what a plain function of the root says."""
