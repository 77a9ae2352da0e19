"""Settings of the router."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, SecretStr, field_validator, model_validator

from services.common.config import ByteSize, StringList
from services.common.discovery.settings import FleetSettings


class RouterSettings(FleetSettings, cli_prog_name="relevo-router"):
    """The router: OpenAI's HTTP API in front of prefill and decode workers.

    Example: python -m services.router --model demo --prefill 127.0.0.1:50052 --decode 127.0.0.1:50053
    """

    port: int = Field(50050, ge=0, le=65535, description="gRPC port; 0: any that is free")
    http_host: str = Field("127.0.0.1", description="address on which the HTTP API listens")
    http_port: int = Field(8000, ge=0, le=65535, description="port of the HTTP API; 0: any that is free")
    http_shared: bool = Field(
        False, description="other routers may listen on the same HTTP port; each connection goes to one of them"
    )
    model: str | None = Field(
        None, description="folder or Hugging Face id, for tokenizer and defaults; 'demo' or nothing: the bundled model"
    )
    served_model_name: StringList = Field(
        default_factory=list,
        description="name under which clients ask for the model; may be repeated; --model's if none",
    )
    discovery: Literal["static", "redis", "dns"] = Field(
        "static",
        description="how workers are found; static: --prefill and --decode are they; dns: each of those names has an"
        " address for each worker; redis: workers sign in at --redis-url",
    )
    prefill: StringList = Field(default_factory=list, description="a prefill worker's host:port; may be repeated")
    decode: StringList = Field(default_factory=list, description="a decode worker's host:port; may be repeated")
    dns_seconds: float = Field(5.0, ge=0.1, le=3600, description="of --discovery dns: how often names are resolved")
    silence_seconds: float = Field(
        15.0, ge=1.5, le=3600, description="a worker that says nothing for so long is dead; one that is well says more"
    )
    api_key: SecretStr | None = Field(
        None, description="key that clients must send, or several: k1,k2; open to everybody if none"
    )
    api_keys_file: Path | None = Field(
        None, description="file with a name:sha256 of a key a line, and its limits (docs/http.md)"
    )
    salt_by_api_key: bool = Field(
        False, description="cached blocks are shared only by requests with the same API key; needs keys"
    )
    http_tls_cert: Path | None = Field(None, description="PEM file: certificate of the HTTP port, which is HTTPS then")
    http_tls_key: Path | None = Field(None, description="PEM file: its key")
    cors_origin: StringList = Field(
        default_factory=list,
        description="origin whose pages may use the API from a browser; may be repeated; '*': any; none unless given",
    )
    max_body_bytes: ByteSize = Field(16 << 20, ge=1024, description="largest HTTP request body, such as 16MiB")
    max_head_bytes: ByteSize = Field(32 << 10, ge=1024, description="largest request line and headers together")
    max_connections: int = Field(4096, ge=1, description="HTTP connections at the same time; a 503 beyond them")
    head_seconds: float = Field(15.0, gt=0, description="time that a client has for a request's head")
    body_seconds: float = Field(60.0, gt=0, description="time that it has for the request's body")
    write_seconds: float = Field(
        30.0, gt=0, description="time that it has to take some 48 KiB of an answer that waits for it"
    )
    max_running: int | None = Field(
        None, ge=1, description="requests at the workers at once, others queue; not given: until workers refuse"
    )
    max_queued: int = Field(256, ge=0, description="requests in the router's queue; a 429 beyond them")
    queue_seconds: float = Field(30.0, gt=0, description="longest wait there; a 429 then")
    absent_seconds: float = Field(
        10.0,
        ge=0,
        description="longest wait there where no decode worker is that can take requests on: one may be starting anew;"
        " a 503 then",
    )
    otlp_endpoint: str | None = Field(
        None,
        description="OTLP collector (gRPC) for traces: host:port or a URL; not given: OTEL_EXPORTER_OTLP_ENDPOINT",
    )
    trace_ratio: float | None = Field(
        None,
        ge=0,
        le=1,
        description="of the requests, whose traces are kept; OTEL_TRACES_SAMPLER_ARG's, or 0.01, if not given",
    )
    trace_slow_ms: float | None = Field(
        None, gt=0, description="a request that takes so long is kept in any case, as one that fails is"
    )
    keep_alive_seconds: float = Field(30.0, gt=0, description="how long a connection may wait for its next request")

    @field_validator("prefill", "decode")
    @classmethod
    def _check_addresses(cls, addresses: list[str]) -> list[str]:
        for address in addresses:
            host, _, port = address.rpartition(":")
            if not host or not port.isdigit() or not 0 < int(port) < 65536:
                raise ValueError(f"{address!r} is no address: host:port is, such as 127.0.0.1:50053")
        return addresses

    @model_validator(mode="after")
    def _check_salt(self) -> Self:
        if self.salt_by_api_key and self.api_key is None and self.api_keys_file is None:
            raise ValueError(
                "--salt-by-api-key is given without --api-key (or RELEVO_API_KEY) or --api-keys-file: there are no keys"
            )
        return self

    @model_validator(mode="after")
    def _check_workers(self) -> Self:
        if self.discovery == "redis":
            if self.redis_url is None:
                raise ValueError("--discovery redis needs --redis-url (or RELEVO_REDIS_URL): redis://HOST:PORT/0")
            if self.prefill or self.decode:
                raise ValueError("--prefill and --decode are for --discovery static or dns: redis finds them itself")
            return self
        if not self.decode:
            raise ValueError("--decode is missing: the host:port of at least one decode worker")
        if both := sorted(set(self.prefill) & set(self.decode)):
            raise ValueError(f"{both[0]} is given as --prefill and as --decode: a worker is one of them")
        return self
