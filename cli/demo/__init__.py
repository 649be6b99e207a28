"""`baton demo`: requests go from a prefill process to a decode process, and you see how."""
