"""Fixtures that several folders use."""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest

from services.common.nixl import NotInstalled, is_nixl_loaded, leave, load_nixl

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


@pytest.fixture(params=["stand-in", "nixl"])
def any_nixl(request: pytest.FixtureRequest) -> Iterator[None]:
    """NIXL, and again with a stand-in, which is everywhere."""
    from tests.support.fake_nixl import fake_nixl

    if request.param == "stand-in":
        with fake_nixl():
            yield
        return
    try:
        load_nixl()
    except NotInstalled as error:
        pytest.skip(f"NIXL is not installed (pip install 'relevo[nixl]'): {error}")
    yield


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
