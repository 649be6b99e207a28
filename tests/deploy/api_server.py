"""The part of Kubernetes' API that the chart's sizes.py speaks to: BatonPools, each a file.

`python -m tests.deploy.api_server PORT FOLDER NAMESPACE` serves it on 127.0.0.1.
"""

import http.server
import json
import sys
from pathlib import Path
from typing import Any


class ApiServer(http.server.ThreadingHTTPServer):
    """Serves FOLDER/NAME.json as the pool NAME; `port` 0 takes a free one."""

    def __init__(self, port: int, folder: Path, namespace: str) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.folder = folder
        self.base = f"/apis/baton-serve.io/v1alpha1/namespaces/{namespace}/batonpools/"
        self.tokens: list[str | None] = []

    def read(self, name: str) -> dict[str, Any]:
        """Return a pool; raises FileNotFoundError."""
        pool: dict[str, Any] = json.loads((self.folder / f"{name}.json").read_text())
        return pool

    def write(self, name: str, pool: dict[str, Any]) -> None:
        """Exchange a pool for another."""
        put(self.folder, name, pool)


def put(folder: Path, name: str, pool: dict[str, Any]) -> None:
    """Write a pool's file, whole for whoever reads it meanwhile."""
    draft = folder / f"{name}.new"
    draft.write_text(json.dumps(pool))
    draft.replace(folder / f"{name}.json")


class _Handler(http.server.BaseHTTPRequestHandler):
    server: ApiServer

    def do_GET(self) -> None:
        self._answer("")

    def do_PATCH(self) -> None:
        assert self.headers["Content-Type"] == "application/merge-patch+json"
        status = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["status"]
        self._answer("/status", status=status)

    def _answer(self, suffix: str, **changes: Any) -> None:
        self.server.tokens.append(self.headers["Authorization"])
        name = self.path.removeprefix(self.server.base).removesuffix(suffix)
        try:
            pool = {**self.server.read(name), **changes}
        except FileNotFoundError:
            self.send_error(404)
            return
        if changes:
            self.server.write(name, pool)
        text = json.dumps(pool).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: Any) -> None: ...


if __name__ == "__main__":
    ApiServer(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]).serve_forever()
