"""`baton generate`: stream text from a running server."""

import sys

from baton.api.client import Client, Options


def generate(address: str, prompt: str, options: Options) -> None:
    """Write to stdout the text that follows `prompt`, as it comes; raises what the server says."""
    with Client(address) as client:
        for text in client.generate(prompt, options):
            sys.stdout.write(text)
            sys.stdout.flush()
    sys.stdout.write("\n")
