"""Architectures, weights and tokenizers of checkpoint folders."""
