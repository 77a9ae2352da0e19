"""Who may import whom (docs/architecture.md), read off the sources, and what starts without torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.no_torch import HIDE_TORCH

ROOT = Path(__file__).parent.parent
SERVICES = ("router", "prefill", "kvtransfer", "decode")
WITHOUT_TORCH = ("services.router.__main__", "services.kvtransfer.__main__", "relevo.cli", "relevo.core.scheduler")


def imports_of(path: Path) -> set[str]:
    """Modules that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return found


def files_below(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def test_core_imports_the_standard_library_only() -> None:
    for path in files_below("relevo/core"):
        for name in imports_of(path):
            top = name.split(".")[0]
            assert top in sys.stdlib_module_names or name.startswith("relevo.core"), f"{path} imports {name}"


def test_relevo_never_imports_services() -> None:
    for path in files_below("relevo"):
        assert not [name for name in imports_of(path) if name.split(".")[0] == "services"], path


@pytest.mark.parametrize("service", SERVICES)
def test_no_service_imports_another_but_the_agents_client(service: str) -> None:
    others = [f"services.{other}" for other in SERVICES if other != service]
    if service in ("router", "kvtransfer"):
        others.append("services.worker")
    for path in files_below(f"services/{service}"):
        for name in imports_of(path):
            if name.startswith("services.kvtransfer.client") and service in ("prefill", "decode"):
                continue
            assert not any(name == other or name.startswith(f"{other}.") for other in others), f"{path} imports {name}"


def test_shared_code_imports_no_service_but_the_agents_client() -> None:
    for path in files_below("services/common", "services/worker"):
        for name in imports_of(path):
            if name.startswith("services.kvtransfer.client") and "worker" in path.parts:
                continue
            assert not any(name.startswith(f"services.{service}") for service in SERVICES), f"{path} imports {name}"


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_starts_where_torch_is_not_installed(module: str) -> None:
    code = f"{HIDE_TORCH}\nimport sys, {module}\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_does_not_import_torch_where_it_is(module: str) -> None:
    code = f"import sys, {module}\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)
