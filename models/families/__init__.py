"""One short reader per family of models, from config.json to the spec of its decoder."""
