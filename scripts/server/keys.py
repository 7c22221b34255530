"""API keys: made at random, kept as hashes, bound to tenants.

A key is 256 random bits, so its SHA-256 cannot be searched for, and a slow hash (scrypt, bcrypt)
would protect nothing while it made every request, and every wrong key that somebody sends, cost the
server tens of milliseconds. Slow hashes are for secrets that people choose; keys of that kind are
not offered.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from common.errors import MoetelError

PREFIX = "moetel-"
SCHEME = "sha256:"
ALL = "*"
"""In place of a tenant's name: every tenant, those that are added later too."""


class KeyFileError(MoetelError):
    """A file of API keys that cannot be used."""


@dataclass(frozen=True)
class Key:
    """One entry: name (for logs and rate limits), the key's hash, its tenants, whether it may
    change the server."""

    name: str
    digest: bytes
    tenants: frozenset[str]
    admin: bool = False

    def allows(self, tenant: str) -> bool:
        return ALL in self.tenants or tenant in self.tenants


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).digest()


def new_key(
    tenants: Sequence[str], admin: bool = False, name: str | None = None
) -> tuple[str, str]:
    """A new key: (the secret, the line for the file of keys, which does not tell the secret)."""
    secret = PREFIX + secrets.token_urlsafe(32)
    entry = {
        "name": name or f"key-{secrets.token_hex(4)}",
        "hash": SCHEME + _digest(secret).hex(),
        "tenants": list(tenants),
        "admin": admin,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    return secret, json.dumps(entry)


class KeyRing:
    """All keys of a server."""

    def __init__(self, keys: Sequence[Key]):
        self.keys = tuple(keys)

    def find(self, secret: str) -> Key | None:
        """The key with this secret. Takes as long whichever it is, and if there is none."""
        digest = _digest(secret)
        found = None
        for key in self.keys:
            if hmac.compare_digest(key.digest, digest):
                found = key
        return found

    @classmethod
    def read(cls, path: Path) -> KeyRing:
        """A file of JSON objects, one a line as `moetel keys new` prints them, or of one JSON list.

        Raises KeyFileError.
        """
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise KeyFileError(
                f"{path}: cannot be read ({error}); make it with moetel keys new"
            ) from error
        if text.lstrip().startswith("["):
            entries = [(f"{path}[{i}]", entry) for i, entry in enumerate(_parse(str(path), text))]
        else:
            lines = [(f"{path}:{i}", line.strip()) for i, line in enumerate(text.splitlines(), 1)]
            entries = [
                (at, _parse(at, line)) for at, line in lines if line and not line.startswith("#")
            ]
        if not entries:
            raise KeyFileError(
                f"{path}: holds no key; add one with moetel keys new --tenant NAME >> {path}"
            )
        keys = [_key(at, entry) for at, entry in entries]
        names = [key.name for key in keys]
        repeated = [n for n in names if names.count(n) > 1]
        if repeated:
            raise KeyFileError(
                f"{path}: the name {repeated[0]!r} is given to two keys; each needs its own"
            )
        return cls(keys)


def _parse(at: str, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise KeyFileError(f"{at}: no JSON ({error}); lines are made by moetel keys new") from error


def _key(at: str, entry: Any) -> Key:
    """Check one entry. Messages never quote a value: somebody may have put a secret there."""
    if not isinstance(entry, dict):
        raise KeyFileError(f"{at}: no JSON object; lines are made by moetel keys new")
    unknown = sorted(set(entry) - {"name", "hash", "tenants", "admin", "created"})
    if unknown:
        raise KeyFileError(
            f"{at}: has a field that means nothing here; allowed are name, hash, tenants, admin, "
            "created"
        )
    name, found, tenants, admin = (entry.get(k) for k in ("name", "hash", "tenants", "admin"))
    if not isinstance(name, str) or not name:
        raise KeyFileError(f"{at}: name is missing or no text")
    if not isinstance(found, str) or not re.fullmatch(SCHEME + "[0-9a-f]{64}", found):
        raise KeyFileError(
            f"{at}: hash is not {SCHEME} and 64 hexadecimal digits; make keys with moetel keys new"
        )
    if (
        not isinstance(tenants, list)
        or not tenants
        or not all(isinstance(t, str) and t for t in tenants)
    ):
        raise KeyFileError(
            f"{at}: tenants is not a list of names; give at least one, or {ALL!r} for all"
        )
    if not isinstance(admin, bool | None):
        raise KeyFileError(f"{at}: admin is neither true nor false")
    return Key(name, bytes.fromhex(found.removeprefix(SCHEME)), frozenset(tenants), bool(admin))
