"""Fixtures that several folders use."""

from __future__ import annotations

import pytest

from tests.support.tiny_models import TinyModels


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> TinyModels:
    """Tiny random checkpoints, made when first asked for."""
    return TinyModels(tmp_path_factory.mktemp("tiny-models"))
