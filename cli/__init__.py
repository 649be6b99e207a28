"""The `baton` command: the only place that puts all parts together."""
