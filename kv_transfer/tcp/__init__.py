"""Reads over plain TCP sockets: the fallback that always runs."""
