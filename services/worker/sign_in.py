"""A worker writes itself into its fleet's list in Redis, and out of it first thing when it shuts down."""

from __future__ import annotations

import socket

from relevo.core.errors import StartupError
from services.common.discovery.settings import open_fleet_redis
from services.common.grpc import format_address
from services.common.lifecycle import Process
from services.common.security import is_loopback
from services.pb import worker_pb2
from services.worker.config import WorkerSettings

_ROLES = {worker_pb2.ROLE_PREFILL: "prefill", worker_pb2.ROLE_DECODE: "decode"}
_EVERYWHERE = ("0.0.0.0", "::", "[::]")
_AUTO = "auto"


def check_sign_in(settings: WorkerSettings) -> None:
    """Before minutes of loading. Raises StartupError for settings with which no router would find this worker."""
    if settings.discovery != "redis":
        return
    if settings.redis_url is None:
        raise StartupError("--discovery redis needs --redis-url (or RELEVO_REDIS_URL): redis://HOST:PORT/0")
    if settings.advertise_address == _AUTO:
        _own_host()
    elif settings.advertise_address:
        host, _, port = settings.advertise_address.rpartition(":")
        if not host or not port.isdigit() or not 0 < int(port) < 65536:
            raise StartupError(
                f"--advertise-address {settings.advertise_address}: host:port is right, such as 10.0.0.7:50053"
            )
    elif settings.host in _EVERYWHERE:
        raise StartupError(
            f"--advertise-address is missing: with --host {settings.host} nobody knows under which host:port routers"
            " reach this worker; 'auto' is what this host's name stands for"
        )


def sign_in(settings: WorkerSettings, process: Process, info: worker_pb2.WorkerInfo, address: str) -> None:
    """From now on, in the background. What runs at shutdown before all that was started up to here: signing out.

    address: that this worker listens at
    """
    redis = open_fleet_redis(settings)
    process.stack.push_async_callback(redis.close)
    from services.common.discovery.fleet_redis import Member  # as in open_fleet_redis
    from services.common.discovery.lease import Lease

    advertised = settings.advertise_address or address
    if advertised == _AUTO:
        advertised = format_address(_own_host(), int(address.rpartition(":")[2]))
    member = Member(_ROLES[info.role], advertised, info.incarnation, info.worker_id)
    lease = Lease(redis, member, settings.discovery_ttl_seconds)
    process.stack.push_async_callback(lease.leave)  # when the lease is renewed no more
    process.spawn(lease.run(), "lease in Redis")


def _own_host() -> str:
    """What this host's name stands for: in a container or a pod, its address on the network. Raises StartupError."""
    name = socket.gethostname()
    try:
        host = str(socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)[0][4][0])
    except OSError as error:
        raise StartupError(f"--advertise-address auto: this host's name {name} has no address: {error}") from error
    if is_loopback(host):
        raise StartupError(
            f"--advertise-address auto: this host's name {name} stands for {host}, where nobody else reaches it: give"
            " host:port"
        )
    return host
