"""API keys: who calls. Only hashes are kept, and a key is compared in constant time."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import secrets
import tomllib
from dataclasses import dataclass
from pathlib import Path

from ..errors import UsageError
from .refusals import Refused


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls. ``salt`` keeps the tenant's computed prefixes apart from those of others; "" where nobody else is."""

    tenant: str = ""
    salt: str = ""


ANYONE = Caller()


class Keys:
    """The accepted keys by their SHA-256. Keys are random (``new_key``), so a fast hash is enough."""

    def __init__(self, tenants: dict[str, str]) -> None:
        """``tenants``: hexadecimal SHA-256 of a key -> its tenant."""
        self._tenants = {bytes.fromhex(digest): Caller(name, _salt(name)) for digest, name in tenants.items()}
        self.num_tenants = len(set(tenants.values()))

    @property
    def salts(self) -> dict[str, str]:
        """Tenant -> its salt."""
        return {caller.tenant: caller.salt for caller in self._tenants.values()}

    @classmethod
    def read(cls, path: str | None) -> Keys | None:
        """Keys of a TOML file: [[keys]] with tenant and sha256. None without a file. Raises UsageError."""
        if path is None:
            return None
        try:
            entries = tomllib.loads(Path(path).read_text(encoding="utf-8")).get("keys", [])
            tenants = {str(entry["sha256"]).lower(): str(entry["tenant"]) for entry in entries}
        except OSError as error:
            raise UsageError(f"{path}: cannot be read: {error.strerror or error}") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(f"{path}: needs entries [[keys]] with tenant and sha256 ({error})") from error
        wrong = [digest[:16] for digest in tenants if len(digest) != 64 or set(digest) - set("0123456789abcdef")]
        if wrong or not tenants:
            what = f"{wrong[0]}... is no SHA-256" if wrong else "there is no key"
            raise UsageError(f"{path}: {what}; make entries with moe-prefill api-key TENANT")
        return cls(tenants)

    def caller(self, authorization: str | None) -> Caller:
        """Who sent this Authorization header: Bearer KEY, or Basic with the key as password. Raises 401."""
        key = _key_of(authorization or "")
        if key is None:
            raise Refused(401, "no_key", "this server needs an API key: send Authorization: Bearer KEY")
        digest = hashlib.sha256(key).digest()
        found = None
        for known, caller in self._tenants.items():
            if hmac.compare_digest(known, digest):
                found = caller
        if found is None:
            raise Refused(401, "wrong_key", "the API key is not one of this server's")
        return found


def new_key(tenant: str) -> tuple[str, str]:
    """A fresh key, and its entry for the file of keys."""
    key = "mp-" + secrets.token_urlsafe(32)
    digest = hashlib.sha256(key.encode()).hexdigest()
    escaped = tenant.replace("\\", "\\\\").replace('"', '\\"')
    return key, f'[[keys]]\ntenant = "{escaped}"\nsha256 = "{digest}"\n'


def _key_of(authorization: str) -> bytes | None:
    scheme, _, value = authorization.partition(" ")
    if scheme.lower() == "bearer" and value:
        return value.strip().encode("utf-8", errors="replace")
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(value, validate=True).partition(b":")[2] or None
        except (binascii.Error, ValueError):
            return None
    return None


def _salt(tenant: str) -> str:
    return hashlib.sha256(b"tenant:" + tenant.encode()).hexdigest()[:32]
