"""What the live page is made of: its figures, behind the API key, and its files, which have no data in them."""

from __future__ import annotations

import hashlib
from pathlib import Path

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from relevo.core.errors import NotFound
from services.router.http.live import LiveResponse, LiveView

UI_FOLDER = Path(__file__).parents[1] / "ui"

_CONTENT_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
# Nothing but our own files runs or is asked, and no other page may frame this one: it may hold a key.
_SAFETY = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self';"
        " base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
}


def live_routes(live: LiveView) -> APIRouter:
    router = APIRouter(tags=["Models and operation"])

    @router.get("/debug/fleet")
    async def fleet() -> Response:
        """The router, its workers and agents, the last requests, and the latest sample of what passes."""
        return Response(await live.snapshot(), media_type="application/json")

    @router.get("/debug/fleet/history")
    async def history() -> Response:
        """A sample a second, the oldest first, of the last five minutes."""
        return Response(live.history_json(), media_type="application/json")

    @router.get("/debug/fleet/stream", include_in_schema=False)  # it does not end
    async def stream() -> Response:
        return LiveResponse(live)

    return router


def ui_routes() -> APIRouter:
    """The files are read now: what is served is what was there at the start."""
    router = APIRouter(include_in_schema=False)
    files = {path.name: _StaticFile(path) for path in UI_FOLDER.iterdir() if path.suffix in _CONTENT_TYPES}

    @router.get("/ui")
    async def page(request: Request) -> Response:
        return files["index.html"].response(request)

    @router.get("/ui/")
    async def elsewhere() -> Response:
        return RedirectResponse("../ui", 308)  # relative: also where a proxy puts it under a path of its own

    @router.get("/ui/{name}")
    async def file(request: Request, name: str) -> Response:
        if name not in files:
            raise NotFound(f"there is no file {name[:100]!r} of the live page")
        return files[name].response(request)

    return router


class _StaticFile:
    def __init__(self, path: Path) -> None:
        self._body = path.read_bytes()
        self._etag = f'"{hashlib.sha256(self._body).hexdigest()[:32]}"'
        self._headers = {
            "content-type": _CONTENT_TYPES[path.suffix],
            "etag": self._etag,
            "cache-control": "no-cache",  # kept, but asked for each time whether it is still that
            **_SAFETY,
        }

    def response(self, request: Request) -> Response:
        asked = request.headers.get("if-none-match", "")
        if self._etag in [tag.strip().removeprefix("W/") for tag in asked.split(",")]:
            return Response(status_code=304, headers=self._headers)
        return Response(self._body, headers=self._headers)
