"""Which transports there are, by name."""

from __future__ import annotations

import logging
import ssl
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from relevo.core.errors import StartupError
from services.kvtransfer.arena import Arena
from services.kvtransfer.links import OpenPuller
from services.kvtransfer.transports import Puller
from services.kvtransfer.transports.tcp_puller import TcpPuller
from services.pb import kvlink_pb2

if TYPE_CHECKING:
    from services.kvtransfer.transports.nixl import NixlDataServer

logger = logging.getLogger(__name__)

NAMES = ("nixl", "tcp")


def usable_names(names: Sequence[str], *, encrypted: bool) -> list[str]:
    """Those that may be used where blocks must be encrypted on their way, or need not.

    Raises StartupError for a transport that is unknown, or if none is left.
    """
    for name in names:
        if name not in NAMES:
            raise StartupError(f"--transports {name}: there is no such transport; {', '.join(NAMES)} are right")
    if not encrypted or "nixl" not in names:
        return list(names)
    usable = [name for name in names if name != "nixl"]
    if not usable:
        raise StartupError(
            "--transports nixl: NIXL does not encrypt, and with --tls-cert blocks are encrypted on their way: add tcp,"
            " or give --no-data-tls"
        )
    logger.info("no transport nixl: it does not encrypt, as --tls-cert asks for; --no-data-tls allows it")
    return usable


def open_nixl(names: Sequence[str], arena: Arena, name: str) -> NixlDataServer | None:
    """Blocking: takes a second. None if it is not wanted, not installed, or does not work here, which is logged."""
    if "nixl" not in names:
        return None
    from services.kvtransfer.transports.nixl import NixlDataServer, NotInstalled

    try:
        return NixlDataServer(arena, name)
    except NotInstalled as error:
        logger.debug("no transport nixl: %s", error)
    except Exception as error:  # NIXL's own classes, which only its package knows
        logger.warning("no transport nixl: it is installed and does not start: %s", error)
    return None


def open_pullers(
    names: Sequence[str], arena: Arena, tls: ssl.SSLContext | None, *, has_nixl: bool
) -> Mapping[str, OpenPuller]:
    """What makes pulling ends, by the transport's name."""

    def open_tcp(offer: kvlink_pb2.TransportOffer, welcome: kvlink_pb2.LinkWelcome) -> Puller:
        return TcpPuller(offer, welcome.link_id, welcome.secret, tls)

    def open_nixl(offer: kvlink_pb2.TransportOffer, welcome: kvlink_pb2.LinkWelcome) -> Puller:
        from services.kvtransfer.transports.nixl import NixlPuller

        return NixlPuller(offer, arena, f"pull-{welcome.link_id.hex()}")

    pullers: dict[str, OpenPuller] = {}
    if "tcp" in names:
        pullers["tcp"] = open_tcp
    if has_nixl:
        pullers["nixl"] = open_nixl
    return pullers
