"""Decode steps on CUDA: Triton kernels for rows of all tenants, captured as CUDA graphs."""
