"""API keys: who may use the server, under which name, and with which limits.

A file has one key a line, `name:sha256` or `name:sha256:rps=5,burst=10,concurrency=8,weight=2,priority=-1`. The hash is
of the key, so that who reads the file cannot use it; names are for logs and metrics, where a key never stands.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import math
import re
import secrets
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from relevo.core.errors import StartupError

logger = logging.getLogger(__name__)

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
_LIMITS = ("rps", "burst", "concurrency", "weight", "priority")


@dataclass(frozen=True, slots=True)
class ApiKey:
    """One client.

    digest: SHA-256 of the key
    rps: requests a second in the long run; None = as many as it likes
    burst: requests at once, after a rest
    concurrency: requests at the same time; None = as many as it likes
    weight: its share of a full fleet, relative to the others'
    priority: the most urgent, that is the lowest, that its requests may ask for
    """

    name: str
    digest: bytes
    rps: float | None = None
    burst: float = 1.0
    concurrency: int | None = None
    weight: float = 1.0
    priority: int = 0

    @property
    def is_limited(self) -> bool:
        return self.rps is not None or self.concurrency is not None


class KeyRing:
    """Finds the client of a key in a time that tells nothing of the keys there are, however many."""

    def __init__(self, keys: Iterable[ApiKey]) -> None:
        """Raises StartupError if there is none, or if two have the same name or the same key."""
        self.keys = tuple(keys)
        self._secret = secrets.token_bytes(32)
        self._by_tag = {self._tag(key.digest): key for key in self.keys}
        if not self.keys:
            raise StartupError("there are no API keys in what was given, so that nobody could get in")
        names = [key.name for key in self.keys]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise StartupError(f"two API keys have the name {twice[0]!r}")
        if len(self._by_tag) < len(self.keys):
            raise StartupError("the same API key is given twice")

    def find(self, key: bytes) -> ApiKey | None:
        digest = hashlib.sha256(key).digest()
        # The table is looked up by what nobody outside can compute, so that how long it takes says nothing.
        found = self._by_tag.get(self._tag(digest))
        return found if found is not None and hmac.compare_digest(found.digest, digest) else None

    def _tag(self, digest: bytes) -> bytes:
        return hashlib.blake2b(digest, key=self._secret, digest_size=16).digest()


def plain_keys(text: str) -> list[ApiKey]:
    """Of --api-key: `k1,k2`. Their names are key-1, key-2 …, in the order given; the same one twice counts once."""
    keys = dict.fromkeys(each.strip().encode() for each in text.split(",") if each.strip())
    return [ApiKey(f"key-{nth}", hashlib.sha256(key).digest()) for nth, key in enumerate(keys, 1)]


def read_keys_file(path: Path) -> list[ApiKey]:
    """Raises StartupError naming the line. Who may write the file may let anybody in: only its owner may."""
    try:
        mode = path.stat().st_mode
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise StartupError(f"--api-keys-file {path}: {error}") from error
    if mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise StartupError(f"--api-keys-file {path}: others than its owner may write it: chmod go-w {path}")
    if mode & stat.S_IROTH:
        logger.warning("--api-keys-file %s: everybody on this machine may read the keys' hashes; chmod o-r it", path)
    keys = []
    for number, line in enumerate(text.splitlines(), 1):
        content = line.partition("#")[0].strip()
        if content:
            try:
                keys.append(_parse(content))
            except ValueError as error:
                raise StartupError(f"--api-keys-file {path}, line {number}: {error}") from None
    return keys


def _parse(line: str) -> ApiKey:
    """Raises ValueError, which does not repeat what may be a key."""
    name, _, rest = line.partition(":")
    digest, _, limits = rest.partition(":")
    if not _NAME.fullmatch(name.strip()) or not digest:
        raise ValueError("a line is name:sha256, the name of at most 64 letters, digits and ._@-")
    if not re.fullmatch(r"[0-9a-fA-F]{64}", digest.strip()):
        raise ValueError(
            f'what follows {name.strip()!r} is no SHA-256 in hexadecimal: printf %s "$KEY" | sha256sum makes it'
        )
    numbers = dict(map(_parse_limit, filter(None, (each.strip() for each in limits.split(",")))))
    concurrency = numbers.get("concurrency")
    rps = numbers.get("rps")
    return ApiKey(
        name.strip(),
        bytes.fromhex(digest.strip()),
        rps=rps,
        burst=max(1.0, numbers.get("burst", rps or 1.0)),
        concurrency=None if concurrency is None else max(1, int(concurrency)),
        weight=numbers.get("weight", 1.0),
        priority=int(numbers.get("priority", 0)),
    )


def _parse_limit(text: str) -> tuple[str, float]:
    name, _, value = (part.strip() for part in text.partition("="))
    if name not in _LIMITS:
        raise ValueError(f"{name!r} is no limit: {', '.join(_LIMITS)} are")
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not (number.is_integer() if name == "priority" else 0 < number < math.inf):
        kind = "an integer" if name == "priority" else "a number above 0"
        raise ValueError(f"{name} must be {kind}, not {value!r}")
    return name, number
