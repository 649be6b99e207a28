"""The decode role: owns requests from first to last token; a plain class, without Ray."""
