"""Pallas kernels for NVIDIA GPUs, one file each; imports jax and itself, never jaxinfer."""
