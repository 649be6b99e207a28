"""Reads of GPU memory between processes of one host: CUDA IPC, and copies on a stream apart."""
