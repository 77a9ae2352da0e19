"""Certificates for tests, made by openssl."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from services.common.security import PeerSettings, Security, read_security


def make_certificates(folder: Path) -> None:
    """ca.pem, and NAME.pem and NAME.key for "peer", which it signed, and "stranger", which it did not.

    Skips the test where openssl is not installed.
    """
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("openssl is not installed: it makes the certificates")

    def run(*arguments: str) -> None:
        subprocess.run([openssl, *arguments], cwd=folder, check=True, capture_output=True)

    new_key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-noenc")
    (folder / "san").write_text("subjectAltName=IP:127.0.0.1")
    run("req", "-x509", *new_key, "-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=test CA", "-days", "2")
    run("req", *new_key, "-keyout", "peer.key", "-out", "peer.csr", "-subj", "/CN=peer")
    signed = ("-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-extfile", "san", "-days", "2")
    run("x509", "-req", "-in", "peer.csr", "-out", "peer.pem", *signed)
    stranger = ("-keyout", "stranger.key", "-out", "stranger.pem", "-subj", "/CN=stranger", "-days", "2")
    run("req", "-x509", *new_key, *stranger, "-addext", "subjectAltName=IP:127.0.0.1")


def tls_settings(folder: Path, name: str) -> dict[str, Any]:
    """Settings of a process that proves to be NAME, and asks for certificates that the CA signed."""
    return {"tls_cert": folder / f"{name}.pem", "tls_key": folder / f"{name}.key", "tls_ca": folder / "ca.pem"}


def identity(folder: Path, name: str) -> Security:
    return read_security(PeerSettings(**tls_settings(folder, name)))
