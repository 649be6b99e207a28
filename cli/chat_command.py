"""The command for talking to a running server."""

from pathlib import Path
from typing import Annotated

import typer

from baton.cli.console import errors_shown


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command()(chat)


def chat(
    *,
    address: Annotated[
        str, typer.Option(help="host:port of the gRPC API, or the URL of the HTTP API.")
    ] = "127.0.0.1:8001",
    model: Annotated[
        str, typer.Option(help="Name of the model; by default the only one that is served.")
    ] = "",
    system: Annotated[str, typer.Option(help="Tell the model who it is.")] = "",
    max_tokens: Annotated[int | None, typer.Option(help="Tokens of an answer at most.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 (greedy) to 2.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same text.")] = None,
    ca: Annotated[
        Path | None, typer.Option(help="Authority of the server's certificate; with it by TLS.")
    ] = None,
    cert: Annotated[Path | None, typer.Option(help="Certificate to show, if it asks.")] = None,
    key: Annotated[Path | None, typer.Option(help="Its private key.")] = None,
) -> None:
    """Chat with a running server, by gRPC or HTTP; Ctrl-C stops an answer, Ctrl-D leaves.

    An API key is taken from the environment: BATON_API_KEY.
    """
    from baton.cli.chat import Conversation
    from baton.cli.chat import chat as run
    from baton.cli.client_tls import client_tls
    from baton.client.options import Options

    with errors_shown():
        options = Options(model=model, max_tokens=max_tokens, temperature=temperature, seed=seed)
        run(address, client_tls(ca, cert, key), Conversation(options, system))
