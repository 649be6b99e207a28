"""GET /console: a page that reads the gateway's own API; nothing of it comes from elsewhere."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.responses import RedirectResponse, Response
from starlette.exceptions import HTTPException

STATIC = Path(__file__).parent / "static"
_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_HEADERS = {
    # Text of models and names of tenants are shown: even if a bug put them into the page as markup,
    # they could load nothing, run nothing and send nothing anywhere.
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-cache",  # asked for again each time, and answered by 304
}


@dataclass(frozen=True, slots=True)
class _File:
    body: bytes
    media_type: str
    etag: str


def add_console(app: FastAPI) -> None:
    """Add the console's routes; its files are read once, here."""
    files = {path.name: _read(path) for path in STATIC.iterdir() if path.suffix in _TYPES}

    @app.get("/console")
    async def console() -> RedirectResponse:
        return RedirectResponse("console/")  # the page names its files relative to itself

    @app.get("/console/{name}")
    async def console_file(request: Request, name: str) -> Response:
        file = files.get(name)
        if file is None:
            raise HTTPException(404, "the console has no such file")
        headers = _HEADERS | {"etag": file.etag}
        if request.headers.get("if-none-match") == file.etag:
            return Response(status_code=304, headers=headers)
        return Response(file.body, media_type=file.media_type, headers=headers)

    @app.get("/console/")
    async def console_page(request: Request) -> Response:
        return await console_file(request, "index.html")


def _read(path: Path) -> _File:
    body = path.read_bytes()
    etag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
    return _File(body, _TYPES[path.suffix], etag)
