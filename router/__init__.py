"""Which instances a request goes to, and whether it is let in at all. Pure: no network, no task."""
