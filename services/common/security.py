"""Who may talk to a process of a fleet over gRPC, and how a peer proves that it may: a shared token, TLS with
certificates on both sides, or both. Agents, workers and routers of one fleet have the same settings.
"""

from __future__ import annotations

import hmac
import ipaddress
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from pydantic import Field, SecretStr

from relevo.core.errors import StartupError, Unauthenticated
from services.common.config import ServiceSettings

logger = logging.getLogger(__name__)

MIN_TOKEN_CHARS = 16

_KEY = "authorization"
_SCHEME = "Bearer "
_OPEN_METHODS = "/grpc.health.v1.Health/"  # probes have no token
_REFUSAL = (
    "only peers that know the token get in here: set RELEVO_KV_TOKEN (or --kv-token-file) to the one that this was"
    " started with"
)


class PeerSettings(ServiceSettings):
    """Settings of a process that talks gRPC with others: agent, worker, router."""

    kv_token: SecretStr | None = Field(
        None, description="secret that agents, workers and routers share; better not as a flag: flags show in `ps`"
    )
    kv_token_file: Path | None = Field(None, description="file that holds that secret")
    tls_cert: Path | None = Field(None, description="PEM file: this process's certificate, for TLS with the others")
    tls_key: Path | None = Field(None, description="PEM file: its key")
    tls_ca: Path | None = Field(None, description="PEM file: who signs peers' certificates; peers must show one then")


@dataclass(frozen=True)
class Tls:
    """PEM texts. ca_path, cert_path, key_path: for the ssl module, which takes files."""

    cert: bytes | None = None
    key: bytes | None = field(default=None, repr=False)
    ca: bytes | None = None
    cert_path: Path | None = None
    key_path: Path | None = None
    ca_path: Path | None = None


@dataclass(frozen=True)
class Security:
    """token: None = not asked for. tls: None = plain."""

    token: str | None = field(default=None, repr=False)
    tls: Tls | None = None

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """Sent with every call on a channel of make_channel."""
        return ((_KEY, _SCHEME + self.token),) if self.token is not None else ()

    @property
    def authenticates(self) -> bool:
        """A stranger cannot get in."""
        return self.token is not None or (self.tls is not None and self.tls.ca is not None)

    def server_credentials(self) -> grpc.ServerCredentials | None:
        """None: plain. Raises StartupError without a certificate."""
        if self.tls is None:
            return None
        if self.tls.cert is None or self.tls.key is None:
            raise StartupError("--tls-cert and --tls-key are missing: who listens with TLS needs both")
        return grpc.ssl_server_credentials(
            [(self.tls.key, self.tls.cert)], self.tls.ca, require_client_auth=self.tls.ca is not None
        )

    def channel_credentials(self) -> grpc.ChannelCredentials | None:
        if self.tls is None:
            return None
        return grpc.ssl_channel_credentials(self.tls.ca, self.tls.key, self.tls.cert)

    def interceptors(self) -> list[grpc.aio.ServerInterceptor]:
        return [TokenInterceptor(self.token)] if self.token is not None else []

    def check_host(self, host: str) -> None:
        """Raises StartupError if listening there would let strangers in; warns if it lets them listen."""
        if is_loopback(host):
            return
        if not self.authenticates:
            raise StartupError(
                f"--host {host} can be reached from other hosts, and nothing keeps strangers out: set RELEVO_KV_TOKEN"
                " (or --kv-token-file) to a secret that all agents, workers and routers share, or give --tls-cert,"
                " --tls-key and --tls-ca"
            )
        if self.tls is None:
            logger.warning(
                "--host %s can be reached from other hosts and there is no TLS: the token and everything else travels"
                " in the clear; give --tls-cert, --tls-key and --tls-ca, unless nobody else is on that network",
                host,
            )


NO_SECURITY = Security()


def read_security(settings: PeerSettings) -> Security:
    """Raises StartupError naming the flag."""
    token = settings.kv_token.get_secret_value().strip() if settings.kv_token is not None else None
    if settings.kv_token_file is not None:
        if token is not None:
            raise StartupError("--kv-token-file and RELEVO_KV_TOKEN are both given: one of them is right")
        token = _read(settings.kv_token_file, "--kv-token-file").decode(errors="replace").strip()
    if token is not None and (len(token) < MIN_TOKEN_CHARS or not token.isascii() or not token.isprintable()):
        raise StartupError(
            f"the token (RELEVO_KV_TOKEN or --kv-token-file) must have at least {MIN_TOKEN_CHARS} printable ASCII"
            " characters: openssl rand -hex 32 makes a good one"
        )
    return Security(token, _read_tls(settings))


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class TokenInterceptor(grpc.aio.ServerInterceptor):
    """Calls without the token end with UNAUTHENTICATED, health checks apart."""

    def __init__(self, token: str) -> None:
        self._expected = (_SCHEME + token).encode()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        handler: Any = await continuation(handler_call_details)
        if handler is None or self._is_allowed(handler_call_details):
            return handler  # type: ignore[no-any-return]  # gRPC's handlers are untyped inside
        requests, replies = (
            "stream" if streaming else "unary" for streaming in (handler.request_streaming, handler.response_streaming)
        )
        make_handler = getattr(grpc, f"{requests}_{replies}_rpc_method_handler")
        return make_handler(  # type: ignore[no-any-return]
            _refuse,
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )

    def _is_allowed(self, details: grpc.HandlerCallDetails) -> bool:
        if str(details.method).startswith(_OPEN_METHODS):
            return True
        given = [value for key, value in details.invocation_metadata or () if key == _KEY]
        value = given[0] if len(given) == 1 else ""
        return hmac.compare_digest(value.encode() if isinstance(value, str) else value, self._expected)


async def _refuse(_request: Any, _context: grpc.aio.ServicerContext[Any, Any]) -> None:
    raise Unauthenticated(_REFUSAL)


def _read_tls(settings: PeerSettings) -> Tls | None:
    cert, key, ca = settings.tls_cert, settings.tls_key, settings.tls_ca
    if cert is None and key is None and ca is None:
        return None
    if (cert is None) != (key is None):
        raise StartupError("--tls-cert and --tls-key belong together: give both, or neither")
    return Tls(
        cert=_read(cert, "--tls-cert") if cert is not None else None,
        key=_read(key, "--tls-key") if key is not None else None,
        ca=_read(ca, "--tls-ca") if ca is not None else None,
        cert_path=cert,
        key_path=key,
        ca_path=ca,
    )


def _read(path: Path, flag: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise StartupError(f"{flag} {path}: {error.strerror}") from error
