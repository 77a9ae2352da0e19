"""Fixtures that several folders use."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.support.tiny_models import TinyModels


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> TinyModels:
    """Tiny random checkpoints, made when first asked for."""
    from tests.support.tiny_models import TinyModels  # imports torch, which many tests do without

    return TinyModels(tmp_path_factory.mktemp("tiny-models"))
