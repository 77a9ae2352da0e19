"""One process for each module that forks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.stack import MODEL
from tests.faults.zygote import Zygote, running_zygote
from tests.support.tiny_models import TinyModels


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    with running_zygote() as zygote:
        yield zygote


@pytest.fixture(scope="session")
def model(tiny_models: TinyModels) -> Path:
    return tiny_models.path(MODEL)
