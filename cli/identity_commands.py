"""The commands for API keys and certificates."""

from pathlib import Path
from typing import Annotated

import typer

from baton.cli.console import errors_shown, make_console

_keys = typer.Typer(help="API keys of tenants.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    """Add the commands to `app`."""
    app.command()(certs)
    app.add_typer(_keys, name="keys")


def certs(
    folder: Path,
    *,
    host: Annotated[
        list[str] | None,
        typer.Option(help="Name or address of the gateway, besides those of this machine."),
    ] = None,
    days: Annotated[int, typer.Option(min=1, max=3650, help="For how long they hold.")] = 365,
) -> None:
    """Make a test authority and certificates in FOLDER, for TLS where nobody else issues them."""
    with errors_shown():
        from baton.cli.certs import HOSTS, write_certs

        write_certs(folder, (*HOSTS, *(host or ())), days)
    console = make_console()
    console.print(f"Wrote certificates to {folder}. Keep the .key files secret.\n", markup=False)
    console.print("HTTPS and TLS for gRPC, and mutual TLS between Baton's processes:\n")
    flags = f"--tls-cert {folder}/server.pem --tls-key {folder}/server.key"
    console.print(f"  baton serve {flags} --cluster-certs {folder}\n", markup=False, soft_wrap=True)
    console.print("Clients know the server by ca.pem. To ask them for certificates as well:\n")
    console.print(f"  --tls-client-ca {folder}/ca.pem", markup=False, soft_wrap=True)


@_keys.command()
def new(
    tenant: str,
    *,
    admin: Annotated[
        bool, typer.Option(help="It also opens /metrics and every tenant's traces.")
    ] = False,
) -> None:
    """Print a new key for TENANT, once, and the line to store for it."""
    with errors_shown():
        from baton.api.key_file import new_key

        key, entry = new_key(tenant, admin=admin)
    typer.echo(f"{key}\n")
    typer.echo("The key is shown this once. Under `keys:` in the file of --api-keys goes:\n")
    more = ", admin: true" if admin else ""
    typer.echo(f'  - {{id: {entry.id}, tenant: {tenant}, hash: "{entry.hash}"{more}}}\n')
    typer.echo(f"and under `tenants:`, unless it is there:\n\n  {tenant}: {{}}")


@_keys.callback()
def _only_groups() -> None:
    """API keys of tenants."""
