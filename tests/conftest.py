"""Fixtures that several folders use."""

from __future__ import annotations

import atexit
import os
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest

from services.common.nixl import is_nixl_loaded, leave

if TYPE_CHECKING:
    from tests.support.tiny_models import TinyModels

# Triton looks when a kernel is defined: without a GPU its interpreter runs them.
os.environ.setdefault("TRITON_INTERPRET", "1")

# The same examples in every run: a red test is somebody's change. HYPOTHESIS_PROFILE=explore looks for new ones.
hypothesis.settings.register_profile("relevo", derandomize=True, deadline=None)
hypothesis.settings.register_profile("explore", deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "relevo"))


def pytest_sessionfinish(exitstatus: int) -> None:
    """A process that has loaded NIXL ends by leave(), which says why: after pytest, before the interpreter's end."""
    if is_nixl_loaded():
        atexit.register(leave, int(exitstatus))


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> TinyModels:
    """Tiny random checkpoints, made when first asked for."""
    from tests.support.tiny_models import TinyModels  # imports torch, which many tests do without

    return TinyModels(tmp_path_factory.mktemp("tiny-models"))


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ca.pem, and NAME.pem and NAME.key for "peer" and "stranger", made when first asked for."""
    from tests.support.certificates import make_certificates

    folder = tmp_path_factory.mktemp("tls")
    make_certificates(folder)
    return folder
