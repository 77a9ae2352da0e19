"""The routes whose answers are generated, past FastAPI: its layers cost as much as placing does.

FastAPI has the same routes, for its schema and documentation, and serves everything else. What a handler raises is
answered by the layer around this one.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from services.router.http.body import parse_body, read_body
from services.router.http.protocol import RequestBody


@dataclass(frozen=True, slots=True)
class HotRoute:
    """path: also for whoever counts by route. model: what `handle` takes as its body."""

    path: str
    model: type[RequestBody]
    handle: Callable[[Request, Any], Awaitable[Response]]


class HotRoutes:
    """ASGI app in front of the API's."""

    def __init__(self, api: ASGIApp, routes: Mapping[str, HotRoute], max_body_bytes: int) -> None:
        self._api = api
        self._routes = routes
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        route = self._routes.get(scope["path"]) if scope["type"] == "http" and scope["method"] == "POST" else None
        if route is None:
            await self._api(scope, receive, send)
            return
        scope["route"] = route
        request = Request(scope, receive)
        body = parse_body(await read_body(request, self._max_body_bytes), route.model)
        response = await route.handle(request, body)
        await response(scope, receive, send)


def hot_routes(*routes: HotRoute) -> dict[str, HotRoute]:
    return {route.path: route for route in routes}
