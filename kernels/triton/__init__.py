"""Triton kernels for GPUs: one short file per operation, launched without reading the device."""
