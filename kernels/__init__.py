"""Device code: one short file per operation."""
