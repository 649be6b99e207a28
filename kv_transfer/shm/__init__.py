"""Reads within one host and without UCX: from a mapping of the peer's memory, or by the kernel."""
