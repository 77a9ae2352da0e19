"""Settings of the router."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, SecretStr, field_validator, model_validator

from services.common.config import ByteSize, StringList
from services.common.security import PeerSettings


class RouterSettings(PeerSettings, cli_prog_name="relevo-router"):
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
    discovery: Literal["static"] = Field("static", description="how workers are found; static: --prefill and --decode")
    prefill: StringList = Field(default_factory=list, description="a prefill worker's host:port; may be repeated")
    decode: StringList = Field(default_factory=list, description="a decode worker's host:port; may be repeated")
    api_key: SecretStr | None = Field(
        None, description="key that clients must send, or several: k1,k2; open to everybody if none"
    )
    salt_by_api_key: bool = Field(
        False, description="cached blocks are shared only by requests with the same API key; needs --api-key"
    )
    max_body_bytes: ByteSize = Field(16 << 20, ge=1024, description="largest HTTP request body, such as 16MiB")

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
        if self.salt_by_api_key and self.api_key is None:
            raise ValueError("--salt-by-api-key is given without --api-key (or RELEVO_API_KEY): there are no keys")
        return self

    @model_validator(mode="after")
    def _check_workers(self) -> Self:
        if not self.decode:
            raise ValueError("--decode is missing: the host:port of at least one decode worker")
        if both := sorted(set(self.prefill) & set(self.decode)):
            raise ValueError(f"{both[0]} is given as --prefill and as --decode: a worker is one of them")
        return self
