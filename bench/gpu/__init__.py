"""What one GPU does, as fractions of what it could do: `python -m bench.gpu`."""
