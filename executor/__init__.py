"""Runs step plans on this rank: input tensors, the KV pool, the forward pass, sampling."""
