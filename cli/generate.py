"""`baton generate`: stream text from a running server."""

import os
import sys

from baton.client import Client, ClientTls, Options


def generate(address: str, prompt: str, options: Options, tls: ClientTls | None) -> None:
    """Write to stdout the text that follows `prompt`, as it comes; raises what the server says."""
    # Not as an option: everybody on the machine can read a process's arguments.
    api_key = os.environ.get("BATON_API_KEY", "")
    with Client(address, api_key=api_key, tls=tls) as client:
        for text in client.generate(prompt, options):
            sys.stdout.write(text)
            sys.stdout.flush()
    sys.stdout.write("\n")
