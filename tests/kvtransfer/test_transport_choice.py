"""Which transports an agent may use at all."""

from __future__ import annotations

import pytest

from relevo.core.errors import StartupError
from services.kvtransfer.transports.catalog import usable_names


def test_unknown_transport_is_refused_by_name() -> None:
    with pytest.raises(StartupError, match="--transports rdma: there is no such transport; nixl, tcp are right"):
        usable_names(["tcp", "rdma"], encrypted=False)


def test_blocks_that_must_be_encrypted_do_not_travel_by_nixl() -> None:
    assert usable_names(["nixl", "tcp"], encrypted=False) == ["nixl", "tcp"]
    assert usable_names(["nixl", "tcp"], encrypted=True) == ["tcp"]
    with pytest.raises(StartupError, match=r"NIXL does not encrypt.*add tcp, or give --no-data-tls"):
        usable_names(["nixl"], encrypted=True)
