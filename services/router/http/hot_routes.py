"""The routes whose answers are generated, past FastAPI: its layers cost as much as placing does.

FastAPI has the same routes, for its schema and documentation, and serves everything else. What a handler raises is
answered by the layer around this one.
"""

from __future__ import annotations

from fastapi import APIRouter
from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from services.router.http.body import body_handler


class HotRoutes:
    """ASGI app in front of the API's. router: of routes made by body_route, all of them POST."""

    def __init__(self, api: ASGIApp, router: APIRouter, max_body_bytes: int) -> None:
        self._api = api
        routes = [route for route in router.routes if isinstance(route, APIRoute)]
        self._routes = {route.path: (route, body_handler(route.endpoint, max_body_bytes)) for route in routes}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        found = self._routes.get(scope["path"]) if scope["type"] == "http" and scope["method"] == "POST" else None
        if found is None:
            await self._api(scope, receive, send)
            return
        scope["route"], handle = found
        response = await handle(Request(scope, receive))
        await response(scope, receive, send)
