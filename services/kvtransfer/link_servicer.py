"""Links from other agents, serving end: what we offer them, and what they measured and took."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Sequence
from typing import Any

import grpc.aio

from relevo.core.errors import InvalidRequest
from services.kvtransfer.links import describe
from services.kvtransfer.publish_session import FIRST_MESSAGE_SECONDS, read_within
from services.kvtransfer.transports import DataServer, Figures
from services.kvtransfer.transports.wire import LINK_ID_BYTES
from services.pb import kvlink_pb2, kvlink_pb2_grpc

logger = logging.getLogger(__name__)

_SECRET_BYTES = 32

LinkContext = grpc.aio.ServicerContext[kvlink_pb2.LinkRequest, kvlink_pb2.LinkReply]


class KvLinkServicer(kvlink_pb2_grpc.KvLinkServicer):
    """A link lives as long as its stream. incarnation: of this agent.

    chosen: by link id, who has what; of open links whose other end has chosen
    """

    def __init__(self, servers: Sequence[DataServer], incarnation: str) -> None:
        self.num_links = 0
        self.chosen: dict[bytes, tuple[str, kvlink_pb2.LinkChosen]] = {}
        self._servers = servers
        self._incarnation = incarnation

    async def Open(self, request_iterator: Any, context: LinkContext) -> None:  # type: ignore[override]
        # Read and written through the context, as in KvTransferServicer, so that `finally` runs when it is cancelled.
        request = await read_within(context, FIRST_MESSAGE_SECONDS, "the first message")
        if request is None:
            return
        if request.WhichOneof("request") != "hello":
            raise InvalidRequest("the first message must be LinkHello", "request")
        link_id, secret = secrets.token_bytes(LINK_ID_BYTES), secrets.token_bytes(_SECRET_BYTES)
        welcome = kvlink_pb2.LinkWelcome(incarnation=self._incarnation, link_id=link_id, secret=secret)
        self.num_links += 1
        try:
            for server in self._servers:
                server.admit(link_id, secret)
                if (offer := server.offer()) is not None:
                    welcome.offers.append(offer)
            await context.write(kvlink_pb2.LinkReply(welcome=welcome))
            while isinstance(message := await context.read(), kvlink_pb2.LinkRequest):
                self.chosen[link_id] = (request.hello.agent_address, message.chosen)
                _log_choice(request.hello.agent_address, message.chosen)
            logger.debug("%s closed its link", request.hello.agent_address)
        except asyncio.CancelledError:
            logger.debug("the link from %s ended", request.hello.agent_address)
            raise
        finally:
            self.num_links -= 1
            self.chosen.pop(link_id, None)
            for server in self._servers:
                server.end_link(link_id)


def _log_choice(peer: str, chosen: kvlink_pb2.LinkChosen) -> None:
    figures = Figures(chosen.bytes_per_second, chosen.latency_seconds, chosen.num_connections)
    logger.info("link from %s: %s, %s: %s", peer, chosen.transport, describe(figures), chosen.reason)
